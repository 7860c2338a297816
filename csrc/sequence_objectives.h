// Objectives whose tokens share a ratio of their row: a first sweep reduces the row to a few numbers, the pass over the
// tokens uses them. Rows are summed from their own begin in chunks, so padding and other rows change nothing.
// Included by policy_loss.cpp, once per instruction set.
//
// Roofline: the sweep reads what the pass reads (17 bytes a token in float32); rows up to the size of the second-level
// cache are still there when the pass follows.
#pragma once

#include "objectives.h"

namespace rf {
namespace RF_ISA {
namespace {

// What a row says to its tokens: the ratio of the row, and per objective two numbers more.
struct RowState {
  double ratio;  // GSPO kinds: s; GMPO: g; VESPO: W
  double a, b;   // GSPO, LUSPO: slope of every live token, scale of the value; GMPO: slope, -; VESPO: phi of A >= 0, A < 0
};

// The inputs of a call, as every sweep reads them.
template <class V>
struct Inputs {
  Input<V> logprobs, old_logprobs, advantages, ref_logprobs, entropy, importance;
  const uint8_t* mask;
  const uint8_t* selected;
  typename LaneScalar<V>::type* d_logprobs;
  typename LaneScalar<V>::type* d_entropy;

  Inputs(const PolicyLossArgs& a, const uint8_t* chosen)
      : logprobs{a.logprobs, a.dtype}, old_logprobs{a.old_logprobs, a.dtype},
        advantages{a.advantages, a.dtype}, ref_logprobs{a.ref_logprobs, a.dtype}, entropy{a.entropy, a.dtype},
        importance{a.importance, a.dtype}, mask(a.layout.mask), selected(chosen),
        d_logprobs(static_cast<decltype(d_logprobs)>(a.d_logprobs)),
        d_entropy(static_cast<decltype(d_entropy)>(a.d_entropy)) {
    if (a.row_advantages) advantages.data = nullptr;  // one number a piece
  }

  Inputs from(int64_t i) const {
    Inputs out = *this;
    for (Input<V> Inputs::*member : {&Inputs::logprobs, &Inputs::old_logprobs, &Inputs::advantages,
                                     &Inputs::ref_logprobs, &Inputs::entropy, &Inputs::importance}) {
      out.*member = (this->*member).from(i);
    }
    out.mask += i;
    if (selected != nullptr) out.selected += i;
    if (d_logprobs != nullptr) out.d_logprobs += i;
    if (d_entropy != nullptr) out.d_entropy += i;
    return out;
  }
};

// The last tokens of a sweep, fewer than a vector, behind whole vectors: the rest of each is masked.
template <class V>
class Tail {
 public:
  Tail(const Inputs<V>& from, int64_t count) : padded(from), from_(from), count_(count) {
    int slot = 0;
    for (Input<V> Inputs<V>::*member : {&Inputs<V>::logprobs, &Inputs<V>::old_logprobs, &Inputs<V>::advantages,
                                        &Inputs<V>::ref_logprobs, &Inputs<V>::entropy, &Inputs<V>::importance}) {
      Input<V>& input = padded.*member;
      if (input) std::memcpy(values_[slot], input.data, static_cast<size_t>(count * element_size(input.dtype)));
      if (input) input.data = values_[slot];
      ++slot;
    }
    std::memcpy(mask_, from.mask, static_cast<size_t>(count));
    padded.mask = mask_;
    if (from.selected != nullptr) {
      std::memcpy(selected_, from.selected, static_cast<size_t>(count));
      padded.selected = selected_;
    }
    if (from.d_logprobs != nullptr) padded.d_logprobs = slopes_;
    if (from.d_entropy != nullptr) padded.d_entropy = entropy_slopes_;
  }
  void write_back() const {
    const size_t bytes = static_cast<size_t>(count_) * sizeof(slopes_[0]);
    if (from_.d_logprobs != nullptr) std::memcpy(from_.d_logprobs, slopes_, bytes);
    if (from_.d_entropy != nullptr) std::memcpy(from_.d_entropy, entropy_slopes_, bytes);
  }

  Inputs<V> padded;

 private:
  const Inputs<V>& from_;
  const int64_t count_;
  alignas(64) char values_[6][64] = {};
  uint8_t mask_[kWidth<V>] = {}, selected_[kWidth<V>] = {};
  typename LaneScalar<V>::type slopes_[kWidth<V>], entropy_slopes_[kWidth<V>];
};

// body(vectors, count) for [begin, end) in chunks; count is a whole number of vectors.
template <class V, class Body>
inline void for_chunks(const Inputs<V>& in, int64_t begin, int64_t end, const Body& body) {
  for (int64_t start = begin; start < end; start += kChunk) {
    const int64_t count = smaller(kChunk, end - start), whole = count / kWidth<V> * kWidth<V>;
    if (whole > 0) body(in.from(start), whole);
    if (whole < count) {
      const Inputs<V> rest = in.from(start + whole);
      Tail<V> tail(rest, count - whole);
      body(tail.padded, kWidth<V>);
      tail.write_back();
    }
  }
}

// ---- the first sweep ---------------------------------------------------------------------------------------

template <class V>
class RowStates {
 public:
  RowStates(const PolicyLossArgs& args, const Inputs<V>& in)
      : args_(args), in_(in), clip_(args.parameters), states_(by_row(args.objective) ? args.layout.rows : 0) {
    if (!by_row(args.objective)) return;
    in_.d_logprobs = in_.d_entropy = nullptr;  // this sweep writes nothing
    parallel_for(args.layout.rows, args.layout.tokens, args.threads, [&](int64_t row) {
      const int64_t begin = row_begin(args.layout, row), end = row_begin(args.layout, row + 1);
      const int64_t count = count_set(args.layout.mask + begin, end - begin);
      const V advantage = args.row_advantages ? all<V>(row_advantage(row)) : V{};
      if (args.objective == Objective::gmpo) {
        states_[row] = gmpo(begin, end, count, advantage);
      } else if (args.objective == Objective::vespo) {
        states_[row] = vespo(begin, end);
      } else {
        states_[row] = gspo(begin, end, count, advantage);
      }
    });
  }
  RowState operator[](int64_t row) { return by_row(args_.objective) ? states_[row] : RowState{}; }
  double row_advantage(int64_t row) const { return Input<V>{args_.advantages, args_.dtype}.scalar(row); }

 private:
  // sum over the counting tokens of what `of` makes of a vector
  template <class Of>
  double sum(int64_t begin, int64_t end, const Of& of) const {
    double total = 0;
    for_chunks(in_, begin, end, [&](const Inputs<V>& in, int64_t count) {
      V lanes{};
      for (int64_t i = 0; i < count; i += kWidth<V>) lanes += of(in, i, flags<V>(in.mask + i));
      total += static_cast<double>(sum_lanes(lanes));
    });
    return total;
  }

  static V log_ratio_at(const Inputs<V>& in, int64_t i, Flag<V> counts, Flag<V>* clamped = nullptr) {
    const V logprob = in.logprobs(i, counts);
    const V old = in.old_logprobs ? in.old_logprobs(i, counts) : logprob;
    const LogRatio<V> l = log_ratio(logprob, old);
    if (clamped != nullptr) *clamped = l.clamped;
    return l.value;
  }
  static V advantage_at(const Inputs<V>& in, int64_t i, Flag<V> counts, V row) {
    return in.advantages ? in.advantages(i, counts) : select(counts, row, V{});
  }
  static V importance_at(const Inputs<V>& in, int64_t i, Flag<V> counts) {
    return in.importance ? in.importance(i, counts) : all<V>(1.0);
  }

  RowState gspo(int64_t begin, int64_t end, int64_t count, V row) const {
    const double per_token = inverse(static_cast<double>(count));
    const double mean = per_token * sum(begin, end, [](const Inputs<V>& in, int64_t i, Flag<V> counts) {
      return log_ratio_at(in, i, counts);
    });
    const double s = std::exp(mean), scale = args_.objective == Objective::luspo ? static_cast<double>(count) : 1.0;
    if (args_.objective == Objective::gspo_token) return {s, 0.0, scale};
    const V ratio = all<V>(s), one = all<V>(1.0);
    const double passing = sum(begin, end, [&](const Inputs<V>& in, int64_t i, Flag<V> counts) {
      return importance_at(in, i, counts) * clip_(advantage_at(in, i, counts, row), ratio, one).slope;
    });
    return {s, scale * s * per_token * passing, scale};
  }

  RowState gmpo(int64_t begin, int64_t end, int64_t count, V row) const {
    const double per_token = inverse(static_cast<double>(count));
    const V low = all<V>(std::log(args_.parameters[0])), high = all<V>(std::log(args_.parameters[1]));
    const double held = sum(begin, end, [&](const Inputs<V>& in, int64_t i, Flag<V> counts) {
      const V A = advantage_at(in, i, counts, row), l = log_ratio_at(in, i, counts);
      return select(gt(A, V{}), at_most(l, high), select(lt(A, V{}), at_least(l, low), V{}));
    });
    const double gain = sum(begin, end, [&](const Inputs<V>& in, int64_t i, Flag<V> counts) {
      return importance_at(in, i, counts) * advantage_at(in, i, counts, row);
    });
    const double g = std::exp(per_token * held);
    return {g, -g * per_token * gain, 1.0};
  }

  RowState vespo(int64_t begin, int64_t end) const {
    const double floor = std::log(1e-8);
    const V low = all<V>(1e-8), high = all<V>(std::exp(20.0));
    const double total = sum(begin, end, [&](const Inputs<V>& in, int64_t i, Flag<V> counts) {
      const V l = log_ratio_at(in, i, counts);
      if (!in.importance) return l;
      return l + select(counts, log_positive(bounded(importance_at(in, i, counts), low, high)), V{});
    });
    const double log_w = bounded(total, floor, 20.0), w = std::exp(log_w);
    const auto phi = [&](double k, double lambda) { return std::exp(k * log_w - lambda * std::expm1(log_w)); };
    const double* p = args_.parameters;
    return {w, phi(p[0], p[1]), phi(p[2], p[3])};
  }

  const PolicyLossArgs& args_;
  Inputs<V> in_;
  const Clip<V> clip_;
  Buffer<RowState> states_;
};

// ---- a token of such a row ---------------------------------------------------------------------------------

template <class V>
struct RowKernel {
  const Objective objective;
  const Clip<V> clip;
  const V log_low, log_high;
  explicit RowKernel(const PolicyLossArgs& args)
      : objective(args.objective), clip(args.parameters),
        log_low(all<V>(gmpo(args) ? std::log(args.parameters[0]) : 0.0)),
        log_high(all<V>(gmpo(args) ? std::log(args.parameters[1]) : 0.0)) {}
  static bool gmpo(const PolicyLossArgs& args) { return args.objective == Objective::gmpo; }

  template <bool kRare>
  RF_INLINE Surrogate<V> operator()(const Token<V, kRare>& t, V ratio, V a, V b) const {
    if (objective == Objective::gmpo) {
      const V l = t.log_ratio();
      const Flag<V> low = lt(t.advantage, V{}) & lt(l, log_low), high = gt(t.advantage, V{}) & gt(l, log_high);
      const V slope = select(low | high | eq(t.advantage, V{}), V{}, t.live(a));
      return {-t.advantage * ratio, slope, low, high, never<V>()};
    }
    if (objective == Objective::vespo) {
      const Flag<V> positive = ge(t.advantage, V{});
      const V phi = select(positive, a, b);
      Surrogate<V> s = weighted_logp(t, phi);
      faded(s, phi, ratio, t.advantage, positive);
      return s;
    }
    Surrogate<V> s = clip(t.advantage, ratio, t.live(ratio));
    if (objective != Objective::gspo_token) s.slope = t.live(a);
    s.value *= b;
    return s;
  }
};

}  // namespace
}  // namespace RF_ISA
}  // namespace rf
