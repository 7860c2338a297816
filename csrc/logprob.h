#pragma once

#include <cstdint>

#include "dtype.h"

namespace rf {

// rows x vocab, unit stride inside a row; row i starts at (i / inner) * outer_stride + (i % inner) * stride, so
// that logits[:, :-1] needs no copy. Strides count elements.
struct LogprobInput {
  const void* logits;
  const void* ids;             // [rows]
  const bool* mask;            // [rows], true: counts; null: every row counts
  const double* temperatures;  // [rows]; null: `temperature` everywhere
  DType dtype, id_dtype;
  int64_t rows, vocab, inner, outer_stride, stride;
  double temperature, softcap;  // softcap 0: none
  int threads;
};

// Outputs are float32, float64 for float64.
struct LogprobArgs {
  LogprobInput in;
  void* logp;     // [rows]
  void* entropy;  // [rows]; null when not wanted
  void* stats;    // [2, rows]: largest (capped) logit, and log of the sum of exp((u - largest) / temperature)
};

struct LogprobBackwardArgs {
  LogprobInput in;
  const void* stats;
  const void* entropy;    // read with d_entropy only
  const void* d_logp;     // [rows]; null: zero
  const void* d_entropy;  // [rows]; null: zero
  void* d_logits;         // [rows, vocab] contiguous, dtype of the logits
};

enum class LogprobFault : int { none = 0, token_ids = 1, temperature = 2 };

struct LogprobCheck {
  LogprobFault fault;
  int64_t row;
};

struct Logprob {
  // The first counting row with an id outside [0, vocab) or a temperature outside [low, high].
  LogprobCheck (*check)(const LogprobInput&, double low, double high);
  void (*forward)(const LogprobArgs&);  // an id outside [0, vocab) gives NaN
  void (*backward)(const LogprobBackwardArgs&);
};

}  // namespace rf
