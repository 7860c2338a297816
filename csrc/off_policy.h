#pragma once

#include "advantage.h"

namespace rf {

// Contiguous arrays; null: absent. "Real" is float32, float64 for float64 input.
struct OffPolicyInput {
  const void* rewards;      // dtype, as the next four
  const void* values;       // V-trace: V_t; Retrace: Q_t of the action taken
  const void* log_rhos;     // log of pi / mu
  const void* aside;        // V-trace: the value behind a truncated step; Retrace: the value behind every step
  const void* last_values;  // V-trace: [rows], the value behind a row's last counting step; null: 0
  const uint8_t* terminated;
  const uint8_t* truncated;
  const uint8_t* mask;  // null: every step counts
  const double* lams;   // [rows]; null: lam
  Sequences sequences;
  DType dtype;
  double gamma, lam;
  int threads;
};

struct VtraceArgs {
  OffPolicyInput in;
  double rho_clip, c_clip, advantage_rho_clip;
  void* targets;     // Real
  void* advantages;  // Real
};

struct RetraceArgs {
  OffPolicyInput in;
  void* targets;  // Real
};

struct OffPolicy {
  void (*vtrace)(const VtraceArgs&);
  void (*retrace)(const RetraceArgs&);
};

}  // namespace rf
