#pragma once

#include <cstdint>

#include "dtype.h"

namespace rf {

// Sequences of a padded [rows, length] array (offsets null) or of a packed one ([rows + 1] offsets).
struct Sequences {
  const int64_t* offsets;
  int64_t rows, length;

  int64_t begin(int64_t row) const { return offsets != nullptr ? offsets[row] : row * length; }
  int64_t end(int64_t row) const { return offsets != nullptr ? offsets[row + 1] : (row + 1) * length; }
  int64_t elements() const { return rows == 0 ? 0 : end(rows - 1); }
};

// count, mean, sum of squared distances to the mean.
struct Moments {
  double count, mean, m2;
};

Moments merge(const Moments& a, const Moments& b);

// Contiguous arrays; null: absent. "Real" is float32, float64 for float64 input.
struct GaeInput {
  const void* values;            // dtype; null: V = 0
  const void* last_values;       // [rows] dtype; null: 0
  const void* bootstrap_values;  // dtype
  const uint8_t* terminated;
  const uint8_t* truncated;
  const uint8_t* mask;  // null: every step counts
  const double* lams;   // [rows]; null: lam
  Sequences sequences;
  DType dtype;
  double gamma, lam;
  int threads;
};

struct GaeArgs {
  GaeInput in;
  const void* rewards;
  void* advantages;  // Real; null when not wanted
  void* returns;     // Real
  Moments* row_moments;  // [rows], of the advantages; null when not wanted
  bool carried;          // masked steps get the advantage of the next counting one (0 behind the last), A + V returned
};

struct GaeBackwardArgs {
  GaeInput in;
  const void* d_advantages;  // Real; null: 0
  const void* d_returns;     // Real
  void* d_rewards;           // Real
  void* d_values;            // Real; null when not wanted
  void* d_last_values;       // [rows] Real; null when not wanted
  void* d_bootstrap_values;  // Real; null when not wanted
};

// y_t = b_t + a_t y_{t+1}; `init` [rows] stands behind a row's last step, null: 0.
struct ScanArgs {
  const void* a;
  const void* b;
  const void* init;
  Sequences sequences;
  DType dtype;
  void* out;  // Real
  int threads;
};

struct ScanBackwardArgs {
  const void* a;
  const void* y;         // Real, the forward's result
  const void* init;      // dtype
  const void* upstream;  // Real
  Sequences sequences;
  DType dtype;
  void* d_a;     // Real
  void* d_b;     // Real
  void* d_init;  // [rows] Real; null when not wanted
  int threads;
};

struct Advantage {
  // Whether a mask of int32, int64, float32 or float64 holds zeros and ones alone; `flags` is it in bytes.
  bool (*zeros_and_ones)(const void* mask, DType dtype, int64_t count, uint8_t* flags);
  void (*gae)(const GaeArgs&);
  void (*gae_backward)(const GaeBackwardArgs&);
  void (*scan)(const ScanArgs&);
  void (*scan_backward)(const ScanBackwardArgs&);
};

// A group's rewards relative to each other; see group_advantages.cpp.
struct GroupArgs {
  const double* rewards;   // [count]
  const int64_t* groups;   // [count]
  const uint8_t* valid;    // null: all
  const double* upstream;  // null: forward
  const double* aside;     // [count]: weights of length_weighted, or the given baselines
  int64_t count;
  int baseline;  // 0 mean, 1 leave_one_out, 2 none, 3 length_weighted, 4 given
  int scale;     // 0 none, 1 std of the group, 2 std of the batch
  bool raw_singleton;
  double eps, ddof, min_std;
  double* out;  // [count]: advantages, or the gradient of the rewards
};

void group_advantages(const GroupArgs& args);

}  // namespace rf
