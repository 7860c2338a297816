#pragma once

#include <cstdint>

#include "dtype.h"

namespace rf {

// Some columns of the logits of `rows` rows, as the GEMM leaves them; overwritten. Logit j of a row is
// x_j = scale * (tile_j + bias_j), capped u_j = softcap * tanh(x_j / softcap) or x_j, and z_j = u_j / T.
struct LogitTile {
  void* tile;                  // [rows, columns], unit stride inside a row
  const void* bias;            // [columns], dtype of the tile; null: 0
  const int64_t* ids;          // [rows], chosen token, counted from the vocabulary's start
  const double* temperatures;  // [rows]; null: `temperature` everywhere
  DType dtype;
  int64_t rows, columns, stride, first;  // `first`: vocabulary index of column 0
  double scale, temperature, softcap;    // softcap 0: none
  int threads;
};

// Running state of a row, five doubles: largest u, how many equal it, sum of exp(d_j) of the others with
// d_j = (u_j - largest) / T, sum of exp(d_j) d_j, and the chosen token's u (-inf until it is met).
constexpr int kLogprobState = 5;

struct FoldTileArgs {
  LogitTile in;
  double* state;  // [rows, 5]
  bool moment;    // the fourth is wanted
  // With `factor`, the weights exp(d_j) du_j/dx_j, 0 for the chosen token, in terms of the new largest, are written,
  // and factor [rows] (float32, float64 for float64) is what sums over earlier columns must be multiplied by;
  // `shift` [rows] what their d_j must be raised by.
  void* factor;
  void* shift;
  void* weights;   // [rows, columns] contiguous, dtype of the tile; null: over the tile
  void* weighted;  // the same: weights times d_j; null: not wanted
};

// The gradient of a_i logp_i + b_i H_i with respect to tile + bias.
struct TurnTileArgs {
  LogitTile in;
  void* out;            // [rows, columns] contiguous, dtype of the tile; null: over the tile
  const double* stats;  // [rows, 5]: largest, log of the sum of exp(d_j), H, upstream of logp, upstream of H
};

struct LinearLogprob {
  void (*fold)(const FoldTileArgs&);
  void (*turn)(const TurnTileArgs&);
};

}  // namespace rf
