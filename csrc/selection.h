// Choices over the whole batch: the tokens of large covariance (KLCov, ClipCov), those of high entropy. Included by
// policy_loss.cpp, once per instruction set. The equations are `selection` of react_fast/reference/surrogates.py and
// `high_entropy_mask` of importance_weights.py there.
//
// Roofline: two streams of the inputs and three of one number a token; what is sorted through is a small part of them.
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

  // hit(i) for every token whose covariance `among` accepts, in order: whole vectors without one are passed over.
  template <class Among, class Hit>
  void scan(const Among& among, const Hit& hit) {
    const int64_t tokens = args_.layout.tokens, whole = tokens / kWidth<V> * kWidth<V>;
    for (int64_t i = 0; i < whole; i += kWidth<V>) {
      if (every(!among(load_whole(covariance_.data + i)))) continue;
      for (int64_t lane = i; lane < i + kWidth<V>; ++lane) test(lane, among, hit);
    }
    for (int64_t i = whole; i < tokens; ++i) test(i, among, hit);
  }
  template <class Among, class Hit>
  void test(int64_t i, const Among& among, const Hit& hit) {
    if (every(among(all<V>(static_cast<double>(covariance_[i]))))) hit(i);
  }

  // The `wanted` largest, the earlier first among equals. A bound that a sample suggests leaves few to sort through;
  // should it leave too few, all are.
  void largest(int64_t wanted, uint8_t* selected) {
    std::vector<std::pair<Real, int64_t>> found;
    for (const Real bound : {sampled_bound(wanted), std::numeric_limits<Real>::lowest()}) {
      found.clear();
      const V least = all<V>(static_cast<double>(bound));
      scan([&](V c) { return le(least, c); }, [&](int64_t i) { found.emplace_back(-covariance_[i], i); });
      if (static_cast<int64_t>(found.size()) >= wanted) break;
    }
    choose(found, wanted, selected);
  }

  // Below the wanted-th largest with near certainty: the sample's share of it, and five standard deviations more.
  Real sampled_bound(int64_t wanted) {
    constexpr int64_t step = 61;
    std::vector<Real> sample;
    for (int64_t i = 0; i < args_.layout.tokens; i += step) {
      if (covariance_[i] > kNever) sample.push_back(covariance_[i]);
    }
    const double share = static_cast<double>(wanted) / static_cast<double>(step);
    const int64_t position = static_cast<int64_t>(share + 5 * std::sqrt(share) + 5);
    if (position >= static_cast<int64_t>(sample.size())) return std::numeric_limits<Real>::lowest();
    std::nth_element(sample.begin(), sample.begin() + position, sample.end(), std::greater<Real>());
    return sample[static_cast<size_t>(position)];
  }

  // Those whose rank among the counting tokens has the smallest hash. Few hashes can be among them: the others are passed
  // over before the clip is looked at; should that leave too few, none is.
  void draw(int64_t wanted, uint8_t* selected) {
    const double* p = args_.parameters;
    const uint32_t seed = static_cast<uint32_t>(p[5]);
    const V low = all<V>(p[3]), high = all<V>(p[4]);
    std::vector<std::pair<uint32_t, int64_t>> found;
    for (const uint32_t bound : {likely_hash(wanted), ~uint32_t{0}}) {
      found.clear();
      int64_t rank = 0, seen = 0;
      scan([&](V c) { return lt(low, c) & lt(c, high); },
           [&](int64_t i) {
             rank += count_set(args_.layout.mask + seen, i - seen);
             seen = i;
             const uint32_t hash = mixed(static_cast<uint32_t>(rank) * 0x9e3779b9u + seed);
             if (hash > bound || held(i, args_.row_advantages ? row_of(args_.layout, i) : i)) return;
             found.emplace_back(hash, i);
           });
      if (static_cast<int64_t>(found.size()) >= wanted) break;
    }
    choose(found, wanted, selected);
  }

  // A hash above those of the wanted, if the clip holds less than half: hashes are uniform over the candidates, whose
  // number a sample tells.
  uint32_t likely_hash(int64_t wanted) {
    constexpr int64_t step = 61;
    double candidates = 0;
    for (int64_t i = 0; i < args_.layout.tokens; i += step) {
      candidates += covariance_[i] > args_.parameters[3] && covariance_[i] < args_.parameters[4] ? step : 0;
    }
    const double share = 2 * (static_cast<double>(wanted) + 5 * std::sqrt(static_cast<double>(wanted)) + 5);
    return share < candidates ? static_cast<uint32_t>(4294967295.0 * share / candidates) : ~uint32_t{0};
  }

  // The `wanted` smallest keys, or all.
  template <class Key>
  static void choose(std::vector<std::pair<Key, int64_t>>& found, int64_t wanted, uint8_t* selected) {
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
