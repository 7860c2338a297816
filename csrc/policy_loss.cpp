// Policy loss, value loss and importance weights: one pass over the tokens that yields the loss, its gradient
// and every statistic. The equations are those of react_fast/reference/policy_loss.py.
//
// Roofline, per token of e bytes an element: logprobs, old_logprobs, advantages 3 e, mask 1, gradient 4 written
// (float32: 17 bytes), plus e for each of ref_logprobs, entropy, importance, for 60 to 100 flops: at the border
// of bandwidth and arithmetic on AVX-512, arithmetic below. The mask is read once more to count tokens.
#include "policy_loss.h"

#include "memory.h"

#include "importance_weights.h"
#include "kl_rewards.h"
#include "selection.h"
#include "sequence_objectives.h"

namespace rf {
namespace RF_ISA {
namespace {

// Slots of the running sums: those of Stat, the squares of the importance weights, and the loss.
enum Sum : int { kImportanceSquare = kEffective, kLoss = kStats, kSums };

inline bool is_maximum(int slot) { return slot == kRatioMax || slot == kImportanceMax; }

// One pass over the tokens for a kernel of objectives.h or sequence_objectives.h.
template <class V, template <class> class Kernel>
class Pass {
  using Real = typename LaneScalar<V>::type;
  static constexpr bool kByRow = std::is_same<Kernel<V>, RowKernel<V>>::value;

 public:
  Pass(const PolicyLossArgs& args, const uint8_t* selected) : args_(args), in_(args, selected), kernel_(args) {}

  void run() {
    const Layout& layout = args_.layout;
    const int64_t blocks = block_count(layout.tokens);
    Weights weights(layout, args_.aggregation, args_.denominator, args_.threads);
    RowStates<V> states(args_, in_);
    Buffer<double> partial(blocks * kSums);
    parallel_for(blocks, layout.tokens, args_.threads, [&](int64_t block) {
      double* sums = partial.data + block * kSums;
      for (int slot = 0; slot < kSums; ++slot) sums[slot] = 0;
      for_each_piece(layout, kByRow || weights.by_row || args_.row_advantages, block,
                     [&](int64_t row, int64_t begin, int64_t end) {
                       const Piece piece = piece_of(row, weights[row], states);
                       for_chunks(in_, begin, end, [&](const Inputs<V>& in, int64_t count) {
                         chunk(in, count, piece, sums);
                       });
                       sums[kTokens] += static_cast<double>(count_set(layout.mask + begin, end - begin));
                     });
    });
    double total[kSums] = {};
    for (int64_t block = 0; block < blocks; ++block) merge(partial.data + block * kSums, total);
    finish(total);
  }

 private:
  // What the tokens of a row share.
  struct Piece {
    double weight;
    V token_weight, advantage, ratio, a, b;
    bool weigh_value, weigh_slope;  // by the importance
  };

  Piece piece_of(int64_t row, double weight, RowStates<V>& states) const {
    Piece piece{weight, all<V>(weight), V{}, V{}, V{}, V{}, true, true};
    if (args_.row_advantages) piece.advantage = all<V>(states.row_advantage(row));
    if (kByRow) {
      const RowState state = states[row];
      piece.ratio = all<V>(state.ratio);
      piece.a = all<V>(state.a);
      piece.b = all<V>(state.b);
      piece.weigh_value = args_.objective != Objective::vespo;
      piece.weigh_slope = args_.objective == Objective::gspo_token;
    }
    return piece;
  }

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

  template <bool kRare>
  RF_INLINE static Surrogate<V> surrogate(const Kernel<V>& kernel, const Token<V, kRare>& token, const Piece& piece) {
    if constexpr (kByRow) {
      return kernel(token, piece.ratio, piece.a, piece.b);
    } else {
      return kernel(token);
    }
  }

  RF_INLINE static void count(V& lanes, Flag<V> flag) { lanes = select(flag, lanes + all<V>(1.0), lanes); }
  static void add(double* sums, int slot, V lanes) { sums[slot] += static_cast<double>(sum_lanes(lanes)); }
  static void raise(double* sums, int slot, V lanes) {
    sums[slot] = larger(static_cast<double>(max_lanes(lanes)), sums[slot]);
  }

  // The running sums of a chunk in float lanes; each has a name, so that it stays in a register.
  struct Lanes {
    V loss{}, k1{}, k3{}, clamped{}, ratio{}, ratio_max{}, low{}, high{}, dual{};
    V importance{}, squares{}, importance_max{}, kl_loss{}, kl{}, entropy{};
  };

  // What the loop over a chunk reads of the call, copied: for all the compiler knows a store could change the call.
  struct Given {
    const Inputs<V> in;
    const Piece piece;
    const Kernel<V> kernel;
    const KlEstimator estimator;
    const KlGradient gradient;
    const V kl_coef, entropy_slope;
    const bool row_ratio;
  };

  // One vector of tokens. Steps that a call does without are branches that never change.
  template <bool kRare>
  RF_INLINE static void step(const Given& g, int64_t i, Flag<V> counts, Token<V, kRare>& t, V ref, V raw_ref, Lanes& sums) {
    const Inputs<V>& in = g.in;
    const LogRatio<V> l = kRare ? log_ratio(t.logprob, t.old) : LogRatio<V>{t.raw, never<V>()};
    const Exp<V> e = exp20(l.value);
    t.ratio = e.value;
    if constexpr (kRare) {
      t.clamped = l.clamped;
      count(sums.clamped, l.clamped);
    }
    t.advantage = in.advantages ? in.advantages(i, counts) : select(counts, g.piece.advantage, V{});
    t.selected = in.selected != nullptr ? counts & flags<V>(in.selected + i) : never<V>();
    sums.k1 -= l.value;
    sums.k3 += e.minus_one - l.value;
    const V ratio = g.row_ratio ? g.piece.ratio : e.value;
    sums.ratio = select(counts, sums.ratio + ratio, sums.ratio);
    sums.ratio_max = larger(select(counts, ratio, V{}), sums.ratio_max);
    Surrogate<V> s = surrogate(g.kernel, t, g.piece);
    count(sums.low, s.low);  // the masked have A = 0, so nothing holds them but a cap
    count(sums.high, s.high);
    count(sums.dual, counts & s.dual);
    if (in.importance) {
      const V importance = in.importance(i, counts);
      sums.importance += importance;
      sums.squares += importance * importance;
      sums.importance_max = larger(importance, sums.importance_max);
      if (g.piece.weigh_value) s.value *= importance;
      if (g.piece.weigh_slope) s.slope *= importance;
    }
    sums.loss += kByRow ? select(counts, s.value, V{}) : s.value;  // 0 where masked, but for a row's NaN
    if (in.ref_logprobs) {
      const Penalty<V> kl = penalty(g.estimator, g.gradient, t, ref, raw_ref);
      sums.kl += kl.estimate;
      if (g.gradient == KlGradient::ratio) sums.kl_loss += kl.value;
      s.slope += g.kl_coef * kl.slope;
    }
    if (in.d_logprobs != nullptr) store_whole(in.d_logprobs + i, select(counts, g.piece.token_weight * s.slope, V{}));
    if (in.entropy) {
      sums.entropy += in.entropy(i, counts);
      if (in.d_entropy != nullptr) store_whole(in.d_entropy + i, select(counts, g.entropy_slope, V{}));
    }
  }

  // Up to kChunk tokens. A vector without a log-ratio outside of +-20, or NaN, or a forbidden token has an eighth of
  // the work less; the sum of squares finds all of them.
  void chunk(const Inputs<V>& inputs, int64_t tokens, const Piece& piece, double* sums) const {
    const bool row_ratio = kByRow && args_.objective != Objective::gmpo;
    const Given g{inputs, piece, kernel_, args_.kl_estimator, args_.kl_gradient, all<V>(args_.kl_coef),
                  all<V>(-args_.entropy_coef) * piece.token_weight, row_ratio};
    const Inputs<V>& in = g.in;
    Lanes lanes;
    for (int64_t i = 0; i < tokens; i += kWidth<V>) {
      const Flag<V> counts = flags<V>(in.mask + i);
      Token<V, false> t;
      t.logprob = in.logprobs(i, counts);
      t.old = in.old_logprobs ? in.old_logprobs(i, counts) : t.logprob;
      t.raw = t.logprob - t.old;
      V ref{}, raw_ref{}, reach = t.raw * t.raw;
      if (in.ref_logprobs) {
        ref = in.ref_logprobs(i, counts);
        raw_ref = t.logprob - ref;
        reach += raw_ref * raw_ref;
      }
      if (__builtin_expect(every(le(reach, all<V>(400.0))), true)) {
        step<false>(g, i, counts, t, ref, raw_ref, lanes);
      } else {
        Token<V, true> rare;
        rare.logprob = t.logprob;
        rare.old = t.old;
        step<true>(g, i, counts, rare, ref, raw_ref, lanes);
      }
    }
    add(sums, kClipLow, lanes.low);
    add(sums, kClipHigh, lanes.high);
    add(sums, kClipDual, lanes.dual);
    add(sums, kApproxK1, lanes.k1);
    add(sums, kApproxK3, lanes.k3);
    add(sums, kRatio, lanes.ratio);
    add(sums, kClamped, lanes.clamped);
    raise(sums, kRatioMax, lanes.ratio_max);
    double terms = static_cast<double>(sum_lanes(lanes.loss));
    if (in.ref_logprobs) {
      add(sums, kKl, lanes.kl);
      terms += args_.kl_coef * static_cast<double>(sum_lanes(g.gradient == KlGradient::ratio ? lanes.kl_loss : lanes.kl));
    }
    if (in.entropy) {
      add(sums, kEntropy, lanes.entropy);
      terms -= args_.entropy_coef * static_cast<double>(sum_lanes(lanes.entropy));
    }
    if (in.importance) {
      add(sums, kImportance, lanes.importance);
      add(sums, kImportanceSquare, lanes.squares);
      raise(sums, kImportanceMax, lanes.importance_max);
    }
    sums[kLoss] += piece.weight * terms;
  }

  const PolicyLossArgs& args_;
  const Inputs<V> in_;
  const Kernel<V> kernel_;
};

template <class V>
void policy_loss_lanes(const PolicyLossArgs& args) {
  if (args.objective == Objective::ppo_clip) return Pass<V, PPOClipKernel>(args, nullptr).run();
  if (by_row(args.objective)) return Pass<V, RowKernel>(args, nullptr).run();
  if (!selects(args.objective)) return Pass<V, TokenKernel>(args, nullptr).run();
  Buffer<uint8_t> selected(args.layout.tokens);
  Selection<V>(args).run(selected.data);
  Pass<V, TokenKernel>(args, selected.data).run();
}

void policy_loss(const PolicyLossArgs& args) {
  // Smaller ones come back from the allocator with their pages.
  constexpr int64_t kFresh = int64_t{1} << 24;
  const int64_t bytes = args.layout.tokens * (args.dtype == DType::float64 ? 8 : 4);
  if (bytes >= kFresh) prefer_large_pages(args.d_logprobs, static_cast<size_t>(bytes));
  if (args.dtype == DType::float64) return policy_loss_lanes<double>(args);
  policy_loss_lanes<f32v>(args);
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
          const Flag<V> held = gt(abs(clipped), abs(error));
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
const PolicyLoss policy_loss_table = {&policy_loss, &value_loss, &importance_weights, &high_entropy_mask, &kl_rewards};

}  // namespace RF_ISA
}  // namespace rf
