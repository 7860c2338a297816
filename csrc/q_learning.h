#pragma once

#include <cstdint>

#include "advantage.h"
#include "dtype.h"

namespace rf {

// Rows of a [rows, vocab] array, unit stride inside; row i starts at (i / inner) * outer_stride + (i % inner) * stride.
struct VocabRows {
  const void* data;  // null: absent
  int64_t inner, outer_stride, stride;

  int64_t start(int64_t row) const { return row / inner * outer_stride + row % inner * stride; }
};

// What the vocabulary kernels share. "Real" is float32, float64 for float64 input.
struct VocabShape {
  DType dtype;
  const uint8_t* mask;  // [rows], null: every row counts
  int64_t rows, vocab;
  int threads;
};

// max_j min(q_j, other_j) and the first j that has it; -1 and NaN for a row with NaN, -1 and -inf for no token.
struct BestArgs {
  VocabShape shape;
  VocabRows q, other;
  void* values;  // [rows] Real; 0 where masked
  int64_t* ids;  // [rows]; -1 where masked
};

// sum_j p_j q_j, p = softmax(logits / temperature); q_j is not looked at where p_j is 0.
struct ExpectedArgs {
  VocabShape shape;
  VocabRows logits, q;
  double temperature;
  void* out;  // [rows] Real
};

// d_q_j = g exp((q_j - largest) / alpha - log_sum)
struct SoftBackwardArgs {
  VocabShape shape;
  VocabRows q;
  const void* stats;     // [2, rows] Real: largest, log_sum
  const void* upstream;  // [rows] Real
  double alpha;
  void* d_q;  // [rows, vocab] contiguous, dtype of q
};

// logits_j + beta (min(q_j, other_j) - v); -inf where the logit or the lower q is.
struct GuideArgs {
  VocabShape shape;
  VocabRows logits, q, other;
  const void* values;  // [rows] Real, null: 0
  double beta;
  void* out;  // [rows, vocab] contiguous Real
};

// y_t = sum_{i<n} gamma^i r_{t+i} + gamma^n w, over counting steps, never across a cut.
struct NStepInput {
  const uint8_t* terminated;
  const uint8_t* truncated;
  const uint8_t* mask;
  Sequences sequences;
  DType dtype;
  double gamma;
  int64_t n;
  bool behind;  // `values` stand behind their step; false: at its state
  int threads;
};

struct NStepArgs {
  NStepInput in;
  const void* rewards;
  const void* values;
  const void* last_values;       // [rows]; null: 0, or the step's own value with `behind`
  const void* bootstrap_values;  // null with `behind`: the step's own value
  void* out;                     // Real
};

struct NStepBackwardArgs {
  NStepInput in;
  bool has_last, has_bootstrap;
  const void* upstream;  // Real, as are all below
  void* d_rewards;
  void* d_values;
  void* d_last_values;       // null without last values
  void* d_bootstrap_values;  // null without bootstrap values
};

struct QLearning {
  void (*best)(const BestArgs&);
  void (*expected)(const ExpectedArgs&);
  void (*soft_backward)(const SoftBackwardArgs&);
  void (*guide)(const GuideArgs&);
  void (*n_step)(const NStepArgs&);
  void (*n_step_backward)(const NStepBackwardArgs&);
};

}  // namespace rf
