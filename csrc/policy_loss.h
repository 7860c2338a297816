#pragma once

#include <cstdint>

#include "dtype.h"

namespace rf {

// The tags and their order are part of the Python side (react_fast/ops/policy_loss.py).
enum class Objective : int { reinforce = 0, ppo_clip = 1 };
enum class Aggregation : int { token_mean = 0, seq_mean_token_mean = 1, seq_mean_token_sum = 2, token_sum_norm = 3 };
enum class KlEstimator : int { k1 = 0, k2 = 1, k3 = 2 };
enum class KlGradient : int { value = 0, k2 = 1, ratio = 2 };
enum class Level : int { token = 0, sequence = 1, geometric = 2 };
enum class Bound : int { truncate = 0, mask = 1 };

// Which tokens count and to which row they belong: rows x row_length, or packed with cu_seqlens [rows + 1].
struct Layout {
  const uint8_t* mask;        // [tokens], 0 or 1
  const int64_t* cu_seqlens;  // null: padded
  int64_t tokens, rows, row_length;
};

// Statistics of a pass, in the order of the `stats` output. Means are over counting tokens.
enum Stat : int {
  kTokens, kClipLow, kClipHigh, kClipDual, kApproxK1, kApproxK3, kRatio, kClamped, kRatioMax, kKl, kEntropy,
  kImportance, kEffective, kImportanceMax, kStats
};

// Every array is contiguous and has `dtype` unless said; null: absent.
struct PolicyLossArgs {
  const void* logprobs;
  const void* old_logprobs;
  const void* advantages;  // [tokens], or [rows] with row_advantages
  const void* ref_logprobs;
  const void* entropy;
  const void* importance;
  Layout layout;
  DType dtype;
  bool row_advantages;
  Objective objective;
  double parameters[4];
  Aggregation aggregation;
  double denominator;  // 0: count
  double kl_coef;
  KlEstimator kl_estimator;
  KlGradient kl_gradient;
  double entropy_coef;
  void* loss;        // [1] float32, float64 for float64; so are the ones below
  void* stats;       // [kStats]
  void* d_logprobs;  // [tokens]; null when not wanted
  void* d_entropy;   // [tokens]; null when not wanted
  int threads;
};

struct ValueLossArgs {
  const void* values;
  const void* old_values;  // null: no clipping
  const void* returns;
  Layout layout;
  DType dtype;
  double clip;
  double denominator;  // 0: count
  void* loss;
  void* d_values;  // null when not wanted
  int threads;
};

struct ImportanceArgs {
  const void* logprobs;
  const void* behavior_logprobs;
  Layout layout;
  DType dtype;
  Level level;
  Bound mode;
  double low, high;
  bool normalize;
  void* weights;  // [tokens]
  void* stats;    // [6]: raw mean, raw max, mean, max, effective fraction, out-of-bounds fraction
  int threads;
};

struct PolicyLoss {
  void (*policy_loss)(const PolicyLossArgs&);
  void (*value_loss)(const ValueLossArgs&);
  void (*importance_weights)(const ImportanceArgs&);
};

}  // namespace rf
