// Choices over the whole batch: the tokens of large covariance (KLCov, ClipCov), those of high entropy. Included by
// policy_loss.cpp, once per instruction set. The equations are `selection` of react_fast/reference/surrogates.py and
// `high_entropy_mask` of importance_weights.py there.
//
// Roofline: two or three streams of the inputs and of one number a token; the selection itself is linear on average.
#pragma once

#include <algorithm>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "sequence_objectives.h"

namespace rf {
namespace RF_ISA {
namespace {

// The finaliser of MurmurHash3: a bijection of 32 bits.
inline uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

template <class V>
class Selection {
  using Real = typename LaneScalar<V>::type;

 public:
  explicit Selection(const PolicyLossArgs& args)
      : args_(args), in_(args, nullptr), logprobs_{args.logprobs, args.dtype}, covariance_(args.layout.tokens) {
    in_.d_logprobs = in_.d_entropy = nullptr;
  }

  void run(uint8_t* selected) {
    std::memset(selected, 0, static_cast<size_t>(args_.layout.tokens));
    const int64_t tokens = covariances();
    if (tokens == 0) return;
    const bool clips = args_.objective == Objective::clip_cov;
    const double fraction = args_.parameters[clips ? 2 : 0] * static_cast<double>(tokens);
    const int64_t wanted = fraction > 1 ? static_cast<int64_t>(fraction) : 1;
    clips ? draw(wanted, selected) : largest(wanted, selected);
  }

 private:
  static constexpr Real kNever = -std::numeric_limits<Real>::infinity();

  // body(in, count, advantage of the row) for every chunk of every row, block by block
  template <class Body>
  void for_blocks(const Body& body) {
    const Layout& layout = args_.layout;
    parallel_for(block_count(layout.tokens), layout.tokens, args_.threads, [&](int64_t block) {
      for_each_piece(layout, args_.row_advantages, block, [&](int64_t row, int64_t begin, int64_t end) {
        const Input<V> advantages{args_.advantages, args_.dtype};
        const V advantage = args_.row_advantages ? all<V>(advantages.scalar(row)) : V{};
        for_chunks(in_, begin, end, [&](const Inputs<V>& in, int64_t count) { body(block, in, count, advantage); });
      });
    });
  }

  // (A - mean A)(log p - mean log p) of every counting token, -inf elsewhere; the number of counting tokens.
  int64_t covariances() {
    const int64_t blocks = block_count(args_.layout.tokens);
    enum { kCount, kPossible, kAdvantage, kLogprob, kParts };
    Buffer<double> partial(blocks * kParts);
    std::fill_n(partial.data, blocks * kParts, 0.0);
    for_blocks([&](int64_t block, const Inputs<V>& in, int64_t count, V row) {
      V lanes[kParts] = {};
      for (int64_t i = 0; i < count; i += kWidth<V>) {
        const Flag<V> counts = flags<V>(in.mask + i);
        const V logprob = in.logprobs(i), one = all<V>(1.0);
        const Flag<V> possible = counts & ne(logprob, all<V>(-HUGE_VAL));
        lanes[kCount] += select(counts, one, V{});
        lanes[kPossible] += select(possible, one, V{});
        lanes[kAdvantage] += select(counts, in.advantages ? in.advantages(i) : row, V{});
        lanes[kLogprob] += select(possible, logprob, V{});
      }
      double* sums = partial.data + block * kParts;
      for (int part = 0; part < kParts; ++part) sums[part] += static_cast<double>(sum_lanes(lanes[part]));
    });
    double total[kParts] = {};
    for (int64_t i = 0; i < blocks * kParts; ++i) total[i % kParts] += partial[i];
    const V advantage = all<V>(total[kAdvantage] * inverse(total[kCount]));
    const V logprob = all<V>(total[kLogprob] * inverse(total[kPossible]));
    // The covariances go where the slopes would, so that tails are written back.
    in_.d_logprobs = covariance_.data;
    for_blocks([&](int64_t, const Inputs<V>& in, int64_t count, V row) {
      for (int64_t i = 0; i < count; i += kWidth<V>) {
        const V x = in.logprobs(i), A = in.advantages ? in.advantages(i) : row;
        const Flag<V> possible = flags<V>(in.mask + i) & ne(x, all<V>(-HUGE_VAL));
        store_whole(in.d_logprobs + i, select(possible, (A - advantage) * (x - logprob), all<V>(-HUGE_VAL)));
      }
    });
    return static_cast<int64_t>(total[kCount]);
  }

  void largest(int64_t wanted, uint8_t* selected) {
    std::vector<Real> found;
    for (int64_t i = 0; i < args_.layout.tokens; ++i) {
      if (covariance_[i] > kNever) found.push_back(covariance_[i]);
    }
    wanted = smaller(wanted, static_cast<int64_t>(found.size()));
    if (wanted == 0) return;
    std::nth_element(found.begin(), found.begin() + (wanted - 1), found.end(), std::greater<Real>());
    const Real bound = found[static_cast<size_t>(wanted - 1)];
    int64_t above = 0;
    for (int64_t i = 0; i < args_.layout.tokens; ++i) above += selected[i] = covariance_[i] > bound;
    for (int64_t i = 0; i < args_.layout.tokens && above < wanted; ++i) {
      if (covariance_[i] == bound) above += selected[i] = 1;
    }
  }

  // Those whose rank among the counting tokens has the smallest hash.
  void draw(int64_t wanted, uint8_t* selected) {
    const double* p = args_.parameters;
    const uint32_t seed = static_cast<uint32_t>(p[5]);
    std::vector<std::pair<uint32_t, int64_t>> found;
    uint32_t rank = 0;
    for (int64_t row = 0; row < args_.layout.rows; ++row) {
      for (int64_t i = row_begin(args_.layout, row); i < row_begin(args_.layout, row + 1); ++i) {
        if (!args_.layout.mask[i]) continue;
        const uint32_t own = rank++;
        if (covariance_[i] > p[3] && covariance_[i] < p[4] && !held(i, args_.row_advantages ? row : i)) {
          found.emplace_back(mixed(own * 0x9e3779b9u + seed), i);
        }
      }
    }
    wanted = smaller(wanted, static_cast<int64_t>(found.size()));
    if (wanted == 0) return;
    std::nth_element(found.begin(), found.begin() + (wanted - 1), found.end());
    for (int64_t i = 0; i < wanted; ++i) selected[found[static_cast<size_t>(i)].second] = 1;
  }

  bool held(int64_t i, int64_t advantage_at) const {
    if (args_.old_logprobs == nullptr) return outside(1.0, advantage_at);
    const double old = Input<V>{args_.old_logprobs, args_.dtype}.scalar(i);
    return outside(std::exp(bounded(logprobs_.scalar(i) - old, -20.0, 20.0)), advantage_at);
  }
  bool outside(double ratio, int64_t advantage_at) const {
    const double A = Input<V>{args_.advantages, args_.dtype}.scalar(advantage_at);
    return (A < 0 && ratio < args_.parameters[0]) || (A > 0 && ratio > args_.parameters[1]);
  }

  const PolicyLossArgs& args_;
  Inputs<V> in_;
  const Input<V> logprobs_;
  Buffer<Real> covariance_;
};

// ---- high entropy ------------------------------------------------------------------------------------------

template <class V>
void high_entropy_mask_lanes(const EntropyMaskArgs& args) {
  const Input<V> entropy{args.entropy, args.dtype};
  const auto sortable = [&](int64_t i) {  // NaN as large as can be
    const double h = entropy.scalar(i);
    return h == h ? h : HUGE_VAL;
  };
  std::vector<typename LaneScalar<V>::type> values;
  for (int64_t i = 0; i < args.tokens; ++i) {
    if (args.mask[i]) values.push_back(static_cast<typename LaneScalar<V>::type>(sortable(i)));
  }
  double bound = HUGE_VAL;
  if (!values.empty()) {
    const double position = (1 - args.fraction) * static_cast<double>(values.size() - 1);
    const auto below = values.begin() + static_cast<int64_t>(position);
    std::nth_element(values.begin(), below, values.end());
    const double low = *below, part = position - static_cast<double>(static_cast<int64_t>(position));
    const double high = below + 1 < values.end() ? *std::min_element(below + 1, values.end()) : low;
    bound = part > 0 ? low + part * (high - low) : low;
  }
  parallel_for(block_count(args.tokens), args.tokens, args.threads, [&](int64_t block) {
    const int64_t end = smaller((block + 1) * kBlock, args.tokens);
    for (int64_t i = block * kBlock; i < end; ++i) args.kept[i] = args.mask[i] && entropy.scalar(i) >= bound;
  });
}

void high_entropy_mask(const EntropyMaskArgs& args) {
  if (args.dtype == DType::float64) return high_entropy_mask_lanes<double>(args);
  high_entropy_mask_lanes<f32v>(args);
}

}  // namespace
}  // namespace RF_ISA
}  // namespace rf
