#pragma once

#include <cstdint>

#include "dtype.h"

namespace rf {

// The tags and their order are part of the Python side (react_fast/ops/_objectives.py and _policy_loss.py).
enum class Objective : int {
  reinforce = 0, ppo_clip = 1, cispo = 2, sapo = 3, dppo_tv = 4, dppo_kl = 5, dro = 6, kl_cov = 7, clip_cov = 8,
  gspo = 9, gspo_token = 10, luspo = 11, gmpo = 12, vespo = 13
};
constexpr int kParameters = 6;  // of an objective, in the order of its attributes

// Selected over the batch; and a loss that depends on the rest of the row.
inline bool selects(Objective o) { return o == Objective::kl_cov || o == Objective::clip_cov; }
inline bool by_row(Objective o) { return o >= Objective::gspo; }

enum class Aggregation : int { token_mean = 0, seq_mean_token_mean = 1, seq_mean_token_sum = 2, token_sum_norm = 3 };
enum class KlEstimator : int { k1 = 0, k2 = 1, k3 = 2, abs = 3 };
enum class KlGradient : int { value = 0, k2 = 1, ratio = 2 };
enum class Level : int { token = 0, sequence = 1, geometric = 2 };
enum class Bound : int { truncate = 0, mask = 1 };
enum class Normalize : int { none = 0, tokens = 1, sequences = 2 };

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
  double parameters[kParameters];
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
  Level bound_level;  // whose weight the bounds hold; `level` for Bound::truncate
  double veto;        // a row with a token ratio below it weighs 0; 0: none
  Normalize normalize;
  void* weights;  // [tokens]
  void* stats;    // [7]: raw mean, raw max, mean, max, effective fraction, out-of-bounds fraction, vetoed fraction
  int threads;
};

struct EntropyMaskArgs {
  const void* entropy;
  const uint8_t* mask;
  int64_t tokens;
  DType dtype;
  double fraction;
  uint8_t* kept;  // [tokens]
  int threads;
};

struct KlRewardsArgs {
  const void* rewards;  // [tokens], or [rows] with row_rewards
  const void* logprobs;
  const void* ref_logprobs;
  Layout layout;
  DType dtype;
  bool row_rewards;
  double kl_coef;
  KlEstimator estimator;
  double clip;
  void* shaped;  // [tokens]
  void* stats;   // [1]: mean of the estimates
  int threads;
};

struct PolicyLoss {
  void (*policy_loss)(const PolicyLossArgs&);
  void (*value_loss)(const ValueLossArgs&);
  void (*importance_weights)(const ImportanceArgs&);
  void (*high_entropy_mask)(const EntropyMaskArgs&);
  void (*kl_rewards)(const KlRewardsArgs&);
};

}  // namespace rf
