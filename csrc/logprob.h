#pragma once

#include <cstdint>

#include "dtype.h"

namespace rf {

// rows x vocab, unit stride inside a row; row i starts at (i / inner) * outer_stride + (i % inner) * stride, so
// that logits[:, :-1] needs no copy. Strides count elements.
struct LogprobInput {
  const void* logits;
  const void* ids;             // [rows, tokens]
  const bool* mask;            // [rows], true: counts; null: every row counts
  const double* temperatures;  // [rows]; null: `temperature` everywhere
  const double* floors;        // [rows], the smallest logit kept beside the chosen ones; null: all are kept
  DType dtype, id_dtype;
  int64_t rows, vocab, tokens, inner, outer_stride, stride;
  double temperature, softcap;  // softcap 0: none
  int threads;
};

// Outputs are float32, float64 for float64.
struct LogprobArgs {
  LogprobInput in;
  void* logp;     // [rows, tokens]
  void* entropy;  // [rows]; null when not wanted
  void* stats;    // [2, rows]: largest (capped) logit, and log of the sum of exp((u - largest) / temperature)
};

struct LogprobBackwardArgs {
  LogprobInput in;
  const void* stats;
  const void* entropy;    // read with d_entropy only
  const void* d_logp;     // [rows, tokens]; null: zero
  const void* d_entropy;  // [rows]; null: zero
  void* d_logits;         // [rows, vocab] contiguous, dtype of the logits; or the logits themselves, laid out so
};

enum class LogprobFault : int { none = 0, token_ids = 1, temperature = 2, logit_floor = 3 };

struct LogprobCheck {
  LogprobFault fault;
  int64_t index;  // the row, or for token_ids the element of [rows, tokens]
};

struct Logprob {
  // The first counting row with an id outside [0, vocab), a temperature outside [low, high] or a floor of NaN.
  LogprobCheck (*check)(const LogprobInput&, double low, double high);
  void (*forward)(const LogprobArgs&);  // an id outside [0, vocab) gives NaN
  void (*backward)(const LogprobBackwardArgs&);
};

}  // namespace rf
