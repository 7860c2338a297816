// Policy loss, value loss and importance weights: one pass over the tokens that yields the loss, its gradient
// and every statistic. The equations are those of react_fast/reference/policy_loss.py.
//
// Roofline, per token of e bytes an element: logprobs, old_logprobs, advantages 3 e, mask 1, gradient 4 written
// (float32: 17 bytes), plus e for each of ref_logprobs, entropy, importance, for 60 to 100 flops: at the border
// of bandwidth and arithmetic on AVX-512, arithmetic below. The mask is read once more to count tokens.
#include "policy_loss.h"

#include "importance_weights.h"
#include "policy_loss_lanes.h"

namespace rf {
namespace RF_ISA {
namespace {

// Slots of the running sums: those of Stat, the squares of the importance weights, and the loss.
enum Sum : int { kImportanceSquare = kEffective, kLoss = kStats, kSums };

inline bool is_maximum(int slot) { return slot == kRatioMax || slot == kImportanceMax; }

// What an objective says about one token: the loss, its derivative by log p, and the bounds that hold it.
template <class V>
struct Surrogate {
  V value, slope;
  Flag<V> low, high, dual;
};

template <class V>
struct Token {
  V logprob, advantage, ratio;
  V live_ratio;  // d ratio / d log p: the ratio, or 0 where the log-ratio was clamped
};

// L = -A log p
template <class V>
struct ReinforceKernel {
  explicit ReinforceKernel(const double*) {}
  Surrogate<V> operator()(const Token<V>& token) const {
    const Flag<V> forbidden = token.logprob == all<V>(-HUGE_VAL), never = forbidden & (token.logprob == V{});
    return {select(forbidden, V{}, -token.advantage * token.logprob),
            select(forbidden, V{}, -token.advantage), never, never, never};
  }
};

// L = -min(min(r, cap) A, clip(r, low, high) A), and at most -dual A where A < 0. The advantage's sign decides
// which ratio binds, so L = -A bound, and the gradient passes where the bound is the ratio itself.
template <class V>
struct PPOClipKernel {
  V low, high, dual, cap;
  explicit PPOClipKernel(const double* p)
      : low(all<V>(p[0])), high(all<V>(p[1])), dual(all<V>(p[2])), cap(all<V>(p[3])) {}
  Surrogate<V> operator()(const Token<V>& token) const {
    const V capped = at_most(token.ratio, cap), clipped = bounded(token.ratio, low, high);
    const Flag<V> negative = token.advantage < V{};
    const V bound = select(negative, at_most(at_least(capped, clipped), dual), at_most(capped, clipped));
    const Flag<V> raised = bound > token.ratio, lowered = bound < token.ratio;  // both false for NaN
    const Flag<V> high_held = lowered & (token.advantage > V{}), dual_held = lowered & negative;
    const V passing = select(raised, V{}, select(lowered, V{}, token.live_ratio));
    return {-token.advantage * bound, -token.advantage * passing, raised, high_held, dual_held};
  }
};

template <class V>
struct Penalty {
  V estimate;      // k1, k2 or k3 as it stands, for the statistics
  V value, slope;  // what enters the loss
};

// KL(policy || reference) from x = log p - log ref, and the gradient that was asked for.
template <class V>
inline Penalty<V> penalty(KlEstimator estimator, KlGradient gradient, V logprob, V ref, V ratio, V live_ratio) {
  const LogRatio<V> x = log_ratio(logprob, ref);
  const V inside = select(x.clamped, V{}, all<V>(1.0));
  V k = x.value, slope = inside;
  if (estimator == KlEstimator::k2) {
    k = all<V>(0.5) * x.value * x.value;
    slope = x.value * inside;
  } else if (estimator == KlEstimator::k3) {
    const V m = exp20(-x.value).minus_one;
    k = m + x.value;
    slope = -m * inside;
  }
  if (gradient == KlGradient::value) return {k, k, slope};
  if (gradient == KlGradient::k2) return {k, k, x.value * inside};
  return {k, ratio * k, live_ratio * k + ratio * slope};
}

constexpr int64_t kAhead = 2048;

template <class T, template <class> class Kernel>
class Pass {
  using V = typename LaneOf<T>::type;
  using Real = typename LaneOf<T>::scalar;

 public:
  explicit Pass(const PolicyLossArgs& args) : args_(args), objective_(args.parameters) {}

  void run() {
    const Layout& layout = args_.layout;
    const int64_t blocks = block_count(layout.tokens);
    Weights weights(layout, args_.aggregation, args_.denominator, args_.threads);
    Buffer<double> partial(blocks * kSums);
    parallel_for(blocks, layout.tokens, args_.threads, [&](int64_t block) {
      double* sums = partial.data + block * kSums;
      for (int slot = 0; slot < kSums; ++slot) sums[slot] = 0;
      for_each_piece(layout, weights.by_row || args_.row_advantages, block,
                     [&](int64_t row, int64_t begin, int64_t end) { piece(row, begin, end, weights[row], sums); });
    });
    double total[kSums] = {};
    for (int64_t block = 0; block < blocks; ++block) merge(partial.data + block * kSums, total);
    finish(total);
  }

 private:
  static void merge(const double* sums, double* total) {
    for (int slot = 0; slot < kSums; ++slot) {
      total[slot] = is_maximum(slot) ? larger(sums[slot], total[slot]) : total[slot] + sums[slot];
    }
  }

  void finish(const double* total) const {
    const double scale = inverse(total[kTokens]);
    Real* stats = static_cast<Real*>(args_.stats);
    for (int slot = 0; slot < kStats; ++slot) {
      const bool absolute = slot == kTokens || slot == kClamped || is_maximum(slot);
      stats[slot] = static_cast<Real>(absolute ? total[slot] : total[slot] * scale);
    }
    const double square = total[kImportanceSquare];
    const double effective = total[kImportance] * total[kImportance] * scale;
    stats[kEffective] = static_cast<Real>(square == 0 ? 0 : effective / square);
    *static_cast<Real*>(args_.loss) = static_cast<Real>(total[kLoss]);
  }

  // A chunk goes through one small loop per step, its intermediate results in the first-level cache: short
  // chains of dependent instructions overlap, and the sums stay in registers (one loop was 2x slower).
  struct Chunk {
    int64_t begin, end;
    double weight;
    V row_advantage;
    alignas(64) Real ratio[kChunk], live_ratio[kChunk];
    V slot(const Real* buffer, int64_t i) const { return load_whole(buffer + (i - begin)); }
  };

  // One row's part of a block: one weight, and one advantage if they are given a row.
  void piece(int64_t row, int64_t begin, int64_t end, double weight, double* sums) const {
    Chunk chunk;
    chunk.weight = weight;
    chunk.row_advantage = args_.row_advantages ? scalar(args_.advantages, row) : V{};
    for (chunk.begin = begin; chunk.begin < end; chunk.begin = chunk.end) {
      chunk.end = smaller(chunk.begin + kChunk, end);
      ratios(chunk, sums);
      surrogates(chunk, sums);
      if (args_.ref_logprobs != nullptr) penalties(chunk, sums);
      if (args_.entropy != nullptr) entropies(chunk, sums);
    }
  }

  static void add(double* sums, int slot, V lanes, double weight = 1.0) {
    sums[slot] += static_cast<double>(sum_lanes(lanes)) * weight;
  }
  static void raise(double* sums, int slot, V lanes) {
    sums[slot] = larger(static_cast<double>(max_lanes(lanes)), sums[slot]);
  }

  static V scalar(const void* array, int64_t i) {
    if constexpr (sizeof(T) == sizeof(double)) {
      return static_cast<const T*>(array)[i];
    } else {
      return splat(to_float(static_cast<const T*>(array)[i]));
    }
  }

  // The array at token i with 0 where the mask is false.
  static V at(const void* array, int64_t i, int64_t count, Flag<V> counts) {
    __builtin_prefetch(static_cast<const T*>(array) + i + kAhead);
    return select(counts, load_some(static_cast<const T*>(array) + i, count), V{});
  }

  void ratios(Chunk& chunk, double* sums) const {
    V tokens{}, k1{}, k3{}, total{}, clamped{}, maximum{};
    for (int64_t i = chunk.begin; i < chunk.end; i += kWidth<V>) {
      const int64_t count = chunk.end - i;
      const Flag<V> counts = flags_some<V>(args_.layout.mask + i, count);
      const V one = select(counts, all<V>(1.0), V{});
      const V logprob = at(args_.logprobs, i, count, counts);
      const V old = args_.old_logprobs != nullptr ? at(args_.old_logprobs, i, count, counts) : logprob;
      const LogRatio<V> l = log_ratio(logprob, old);
      const Exp<V> e = exp20(l.value);
      store_whole(chunk.ratio + (i - chunk.begin), e.value);
      store_whole(chunk.live_ratio + (i - chunk.begin), select(l.clamped, V{}, e.value));
      const V ratio = select(counts, e.value, V{});
      tokens += one;
      k1 -= l.value;
      k3 += e.minus_one - l.value;
      total += ratio;
      clamped += select(l.clamped, all<V>(1.0), V{});
      maximum = larger(ratio, maximum);
    }
    add(sums, kTokens, tokens);
    add(sums, kApproxK1, k1);
    add(sums, kApproxK3, k3);
    add(sums, kRatio, total);
    add(sums, kClamped, clamped);
    raise(sums, kRatioMax, maximum);
  }

  void surrogates(const Chunk& chunk, double* sums) const {
    V loss{}, low{}, high{}, dual{}, total{}, squares{}, maximum{};
    for (int64_t i = chunk.begin; i < chunk.end; i += kWidth<V>) {
      const int64_t count = chunk.end - i;
      const Flag<V> counts = flags_some<V>(args_.layout.mask + i, count);
      const V advantage = args_.row_advantages ? select(counts, chunk.row_advantage, V{})
                                               : at(args_.advantages, i, count, counts);
      const V logprob = at(args_.logprobs, i, count, counts);
      const Surrogate<V> s =
          objective_(Token<V>{logprob, advantage, chunk.slot(chunk.ratio, i), chunk.slot(chunk.live_ratio, i)});
      V importance = all<V>(1.0);
      if (args_.importance != nullptr) {
        importance = at(args_.importance, i, count, counts);
        total += importance;
        squares += importance * importance;
        maximum = larger(importance, maximum);
      }
      loss += importance * s.value;
      low += select(s.low, all<V>(1.0), V{});
      high += select(s.high, all<V>(1.0), V{});
      dual += select(s.dual, all<V>(1.0), V{});
      if (args_.d_logprobs != nullptr) {
        const V slope = importance * s.slope;
        store_some(static_cast<Real*>(args_.d_logprobs) + i, count,
                   select(counts, all<V>(chunk.weight) * slope, V{}));
      }
    }
    add(sums, kLoss, loss, chunk.weight);
    add(sums, kClipLow, low);
    add(sums, kClipHigh, high);
    add(sums, kClipDual, dual);
    add(sums, kImportance, total);
    add(sums, kImportanceSquare, squares);
    raise(sums, kImportanceMax, maximum);
  }

  void penalties(const Chunk& chunk, double* sums) const {
    V loss{}, total{};
    const V scale = all<V>(args_.kl_coef * chunk.weight);
    for (int64_t i = chunk.begin; i < chunk.end; i += kWidth<V>) {
      const int64_t count = chunk.end - i;
      const Flag<V> counts = flags_some<V>(args_.layout.mask + i, count);
      const Penalty<V> kl =
          penalty(args_.kl_estimator, args_.kl_gradient, at(args_.logprobs, i, count, counts),
                  at(args_.ref_logprobs, i, count, counts), chunk.slot(chunk.ratio, i), chunk.slot(chunk.live_ratio, i));
      loss += kl.value;
      total += kl.estimate;
      if (args_.d_logprobs != nullptr) {
        Real* slope = static_cast<Real*>(args_.d_logprobs) + i;
        store_some(slope, count, load_some(slope, count) + select(counts, scale * kl.slope, V{}));
      }
    }
    add(sums, kLoss, loss, args_.kl_coef * chunk.weight);
    add(sums, kKl, total);
  }

  void entropies(const Chunk& chunk, double* sums) const {
    V total{};
    const V slope = all<V>(-args_.entropy_coef * chunk.weight);
    for (int64_t i = chunk.begin; i < chunk.end; i += kWidth<V>) {
      const int64_t count = chunk.end - i;
      const Flag<V> counts = flags_some<V>(args_.layout.mask + i, count);
      total += at(args_.entropy, i, count, counts);
      if (args_.d_entropy != nullptr) {
        store_some(static_cast<Real*>(args_.d_entropy) + i, count, select(counts, slope, V{}));
      }
    }
    add(sums, kLoss, total, -args_.entropy_coef * chunk.weight);
    add(sums, kEntropy, total);
  }

  const PolicyLossArgs& args_;
  const Kernel<V> objective_;
};

template <class T>
void policy_loss_dtype(const PolicyLossArgs& args) {
  switch (args.objective) {
    case Objective::reinforce: return Pass<T, ReinforceKernel>(args).run();
    case Objective::ppo_clip: return Pass<T, PPOClipKernel>(args).run();
  }
}

void policy_loss(const PolicyLossArgs& args) {
  switch (args.dtype) {
    case DType::float32: return policy_loss_dtype<float>(args);
    case DType::float64: return policy_loss_dtype<double>(args);
    case DType::float16: return policy_loss_dtype<f16>(args);
    case DType::bfloat16: return policy_loss_dtype<bf16>(args);
    default: return;
  }
}

// ---- value loss --------------------------------------------------------------------------------------------

// L = max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2) / 2 over the number of tokens
template <class T>
void value_loss_dtype(const ValueLossArgs& args) {
  using V = typename LaneOf<T>::type;
  using Real = typename LaneOf<T>::scalar;
  const Layout& layout = args.layout;
  const double weight = Weights(layout, Aggregation::token_mean, args.denominator, args.threads)[0];
  const int64_t blocks = block_count(layout.tokens);
  Buffer<double> partial(blocks);
  const auto at = [](const void* array, int64_t i, int64_t count, Flag<V> counts) {
    return select(counts, load_some(static_cast<const T*>(array) + i, count), V{});
  };
  parallel_for(blocks, layout.tokens, args.threads, [&](int64_t block) {
    const int64_t end = smaller((block + 1) * kBlock, layout.tokens);
    double total = 0;
    for (int64_t start = block * kBlock; start < end; start += kChunk) {
      const int64_t stop = smaller(start + kChunk, end);
      V lanes{};
      for (int64_t i = start; i < stop; i += kWidth<V>) {
        const Flag<V> counts = flags_some<V>(layout.mask + i, stop - i);
        const V value = at(args.values, i, stop - i, counts), target = at(args.returns, i, stop - i, counts);
        const V error = value - target;
        V larger_error = error, slope = error;
        if (args.old_values != nullptr) {
          const V old = at(args.old_values, i, stop - i, counts), clip = all<V>(args.clip);
          const V clipped = bounded(value, old - clip, old + clip) - target;
          const Flag<V> held = abs(clipped) > abs(error);
          larger_error = select(held, clipped, error);
          slope = select(held, V{}, error);
        }
        lanes += larger_error * larger_error;
        if (args.d_values != nullptr) {
          store_some(static_cast<Real*>(args.d_values) + i, stop - i, select(counts, all<V>(weight) * slope, V{}));
        }
      }
      total += static_cast<double>(sum_lanes(lanes));
    }
    partial[block] = total;
  });
  double total = 0;
  for (int64_t block = 0; block < blocks; ++block) total += partial[block];
  *static_cast<Real*>(args.loss) = static_cast<Real>(0.5 * weight * total);
}

void value_loss(const ValueLossArgs& args) {
  switch (args.dtype) {
    case DType::float32: return value_loss_dtype<float>(args);
    case DType::float64: return value_loss_dtype<double>(args);
    case DType::float16: return value_loss_dtype<f16>(args);
    case DType::bfloat16: return value_loss_dtype<bf16>(args);
    default: return;
  }
}

}  // namespace

extern const PolicyLoss policy_loss_table;
const PolicyLoss policy_loss_table = {&policy_loss, &value_loss, &importance_weights};

}  // namespace RF_ISA
}  // namespace rf
