#pragma once

#include <cstdint>

#include "policy_loss.h"

namespace rf {

// e = prediction - target; the tags are part of the Python side (react_fast/ops/_q_loss.py).
//   squared: e^2 / 2      huber: e^2 / 2 up to |e| = parameter, parameter (|e| - parameter / 2) beyond
//   expectile: parameter e^2 where e <= 0, (1 - parameter) e^2 where e > 0
enum class Regression : int { squared = 0, huber = 1, expectile = 2 };

// Means over counting tokens, and over the heads, in the order of the `stats` output.
enum QStat : int { kQTokens, kQError, kQAbsolute, kQErrorMax, kQPrediction, kQTarget, kQAbove, kQStats };

// Contiguous float32 or float64 arrays ("Real"); null: absent.
struct QLossArgs {
  const void* first;
  const void* second;  // the other head
  const void* targets;
  const void* weights;
  Layout layout;
  bool wide;  // Real is float64
  Regression kind;
  double parameter;
  Aggregation aggregation;
  double denominator;  // 0: count
  void* loss;
  void* stats;     // [kQStats]
  void* d_first;   // null when not wanted
  void* d_second;  // null when not wanted
  int threads;
};

struct QLoss {
  void (*q_loss)(const QLossArgs&);
};

}  // namespace rf
