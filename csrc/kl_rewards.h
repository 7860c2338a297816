// Rewards with a penalty for leaving the reference policy; included by policy_loss.cpp, once per instruction set.
//
// Roofline, per token of e bytes: log-probs 2 e and rewards e read, mask 1, rewards 4 written, for 10 to 30 flops: the
// stream of those bytes. One reward a row is added to its last counting token, found from the row's end.
#pragma once

#include "objectives.h"

namespace rf {
namespace RF_ISA {
namespace {

template <class V>
void kl_rewards_lanes(const KlRewardsArgs& args) {
  using Real = typename LaneScalar<V>::type;
  const Layout& layout = args.layout;
  const int64_t blocks = block_count(layout.tokens);
  const Input<V> logprobs{args.logprobs, args.dtype}, ref{args.ref_logprobs, args.dtype};
  const Input<V> rewards{args.rewards, args.dtype};
  Real* shaped = static_cast<Real*>(args.shaped);
  const V coefficient = all<V>(args.kl_coef), clip = all<V>(args.clip);
  // One vector of tokens: their rewards, and the estimates that count.
  const auto step = [&](V logprob, V reference, V reward, Flag<V> counts, V& estimates) {
    const LogRatio<V> x = log_ratio(select(counts, logprob, V{}), select(counts, reference, V{}));
    V slope;
    const V k = bounded(estimate(args.estimator, x.value, slope), -clip, clip);
    estimates += k;
    return select(counts, reward - coefficient * k, V{});
  };
  Buffer<double> partial(blocks);
  parallel_for(blocks, layout.tokens, args.threads, [&](int64_t block) {
    const int64_t end = smaller((block + 1) * kBlock, layout.tokens);
    double total = 0;
    for (int64_t start = block * kBlock; start < end; start += kChunk) {
      const int64_t stop = smaller(start + kChunk, end);
      V lanes{};
      int64_t i = start;
      for (; i + kWidth<V> <= stop; i += kWidth<V>) {
        const V reward = args.row_rewards ? V{} : rewards(i);
        store_whole(shaped + i, step(logprobs(i), ref(i), reward, flags<V>(layout.mask + i), lanes));
      }
      for (; i < stop; ++i) {
        const V reward = args.row_rewards ? V{} : all<V>(rewards.scalar(i));
        V own{};
        const V value = step(all<V>(logprobs.scalar(i)), all<V>(ref.scalar(i)), reward,
                             ne(all<V>(layout.mask[i]), V{}), own);
        Real several[kWidth<V>];
        store_whole(several, value);
        shaped[i] = several[0];
        store_whole(several, own);
        total += static_cast<double>(several[0]);
      }
      total += static_cast<double>(sum_lanes(lanes));
    }
    partial[block] = total;
  });
  if (args.row_rewards) {
    parallel_for(layout.rows, layout.tokens, args.threads, [&](int64_t row) {
      const int64_t begin = row_begin(layout, row);
      int64_t last = row_begin(layout, row + 1) - 1;
      while (last >= begin && !layout.mask[last]) --last;
      if (last >= begin) shaped[last] += static_cast<Real>(rewards.scalar(row));
    });
  }
  double total = 0;
  for (int64_t block = 0; block < blocks; ++block) total += partial[block];
  const double tokens = static_cast<double>(count_tokens(layout, args.threads));
  *static_cast<Real*>(args.stats) = static_cast<Real>(total * inverse(tokens));
}

void kl_rewards(const KlRewardsArgs& args) {
  if (args.dtype == DType::float64) return kl_rewards_lanes<double>(args);
  kl_rewards_lanes<f32v>(args);
}

}  // namespace
}  // namespace RF_ISA
}  // namespace rf
