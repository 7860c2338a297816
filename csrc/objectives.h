// What each objective says about one token: its loss, its derivative by log p, and the bounds that hold it. The
// equations are those of react_fast/reference/surrogates.py. Included by policy_loss.cpp, once per instruction set.
#pragma once

#include "policy_loss_lanes.h"

namespace rf {
namespace RF_ISA {
namespace {

template <class V>
struct Surrogate {
  V value, slope;
  Flag<V> low, high, dual;
};

// kRare: some log-ratio of the vector is outside of +-20, or NaN, or some log p is -inf.
template <class V, bool kRare>
struct Token {
  V logprob, old, advantage;
  V raw;             // log p - log p_old
  V ratio;           // of log-ratios clamped to +-20
  Flag<V> clamped;   // what follows the ratio has no gradient there
  Flag<V> selected;  // by kl_cov or clip_cov

  RF_INLINE V live(V slope) const {
    if constexpr (kRare) return select(clamped, V{}, slope);
    return slope;
  }
  RF_INLINE V log_ratio() const {
    if constexpr (kRare) return rf::RF_ISA::log_ratio(logprob, old).value;
    return raw;
  }
};

template <class V>
inline Flag<V> never() {
  return lt(V{}, V{});
}

// -weight A log p; the weight is a constant, and a token the policy forbids stays put.
template <class V, bool kRare>
RF_INLINE Surrogate<V> weighted_logp(const Token<V, kRare>& t, V weight) {
  V slope = -weight * t.advantage, logprob = t.logprob;
  if constexpr (kRare) {
    const Flag<V> forbidden = eq(logprob, all<V>(-HUGE_VAL));
    slope = select(forbidden, V{}, slope);
    logprob = select(forbidden, V{}, logprob);
  }
  return {slope * logprob, slope, never<V>(), never<V>(), never<V>()};
}

// L = -min(min(r, cap) A, clip(r, low, high) A), and at most -dual A where A < 0. The sign of A decides which bounds
// the ratio has: above min(high, cap) where A >= 0; below low, above min(max(high, cap), dual) where A < 0. So
// L = -A bound, and the gradient passes where the bound is the ratio itself.
template <class V>
struct Clip {
  V low, high, over;
  explicit Clip(const double* p)
      : low(all<V>(p[0])), high(all<V>(at_most(p[1], p[3]))), over(all<V>(at_most(larger(p[1], p[3]), p[2]))) {}
  RF_INLINE Surrogate<V> operator()(V advantage, V ratio, V live_ratio) const {
    const Flag<V> negative = lt(advantage, V{});
    const V bound = at_most(at_least(ratio, select(negative, low, V{})), select(negative, over, high));
    const Flag<V> raised = gt(bound, ratio), lowered = lt(bound, ratio);  // both false for NaN
    const Flag<V> held = lowered & gt(advantage, V{}), dual = lowered & negative;
    const V passing = select(raised | lowered, V{}, live_ratio);
    return {-advantage * bound, -advantage * passing, raised, held, dual};
  }
};

// A soft gate says that it holds a token where it is below one half: by the side of the ratio and of the advantage.
template <class V>
inline void faded(Surrogate<V>& s, V gate, V ratio, V advantage, Flag<V> positive) {
  const Flag<V> closed = lt(gate, all<V>(0.5)) & ne(advantage, V{});
  const Flag<V> above = closed & gt(ratio, all<V>(1.0));
  s.low = closed & lt(ratio, all<V>(1.0));
  s.high = above & positive;
  s.dual = above & !positive;
}

// The commonest objective has its own pass; its constants stay in registers.
template <class V>
struct PPOClipKernel {
  const Clip<V> clip;
  explicit PPOClipKernel(const PolicyLossArgs& args) : clip(args.parameters) {}
  template <bool kRare>
  RF_INLINE Surrogate<V> operator()(const Token<V, kRare>& t) const { return clip(t.advantage, t.ratio, t.live(t.ratio)); }
};

// The others share one: a switch that never changes costs less than a copy of the pass for each.
template <class V>
struct TokenKernel {
  const Objective objective;
  const double* const p;
  explicit TokenKernel(const PolicyLossArgs& args) : objective(args.objective), p(args.parameters) {}

  V parameter(int i) const { return all<V>(p[i]); }

  template <bool kRare>
  RF_INLINE Surrogate<V> operator()(const Token<V, kRare>& t) const {
    switch (objective) {
      case Objective::cispo: return cispo(t);
      case Objective::sapo: return sapo(t);
      case Objective::dppo_tv: return dppo_tv(t);
      case Objective::dppo_kl: return dppo_kl(t);
      case Objective::dro: return dro(t);
      case Objective::kl_cov: return kl_cov(t);
      case Objective::clip_cov: return clip_cov(t);
      default: return weighted_logp(t, all<V>(1.0));
    }
  }

  template <bool kRare>
  RF_INLINE Surrogate<V> cispo(const Token<V, kRare>& t) const {
    Surrogate<V> s = weighted_logp(t, bounded(t.ratio, parameter(0), parameter(1)));
    const Flag<V> above = gt(t.ratio, parameter(1));
    s.low = lt(t.ratio, parameter(0)) & ne(t.advantage, V{});
    s.high = above & gt(t.advantage, V{});
    s.dual = above & lt(t.advantage, V{});
    return s;
  }

  // sigmoid(x) and its complement from exp(-|x|), which cannot overflow
  template <bool kRare>
  RF_INLINE Surrogate<V> sapo(const Token<V, kRare>& t) const {
    const V tau = select(gt(t.advantage, V{}), parameter(0), parameter(1));
    const V x = tau * (t.ratio - all<V>(1.0)), e = exp_minus_abs(x), inverse = all<V>(1.0) / (all<V>(1.0) + e);
    const V sigmoid = select(lt(x, V{}), e, all<V>(1.0)) * inverse;
    const V gate = all<V>(4.0) * e * inverse * inverse;
    Surrogate<V> s{-t.advantage * (all<V>(4.0) / tau) * sigmoid, -t.advantage * gate * t.live(t.ratio),
                   never<V>(), never<V>(), never<V>()};
    faded(s, gate, t.ratio, t.advantage, gt(t.advantage, V{}));
    return s;
  }

  template <bool kRare>
  RF_INLINE Surrogate<V> dppo(const Token<V, kRare>& t, Flag<V> kept) const {
    const V cap = parameter(2);
    Surrogate<V> s = weighted_logp(t, select(kept, at_most(t.ratio, cap), V{}));
    const Flag<V> stopped = !kept;
    s.low = stopped & lt(t.advantage, V{});
    s.high = stopped & gt(t.advantage, V{});
    s.dual = kept & gt(t.ratio, cap);
    return s;
  }
  static V within(V x) { return bounded(x, all<V>(-20.0), all<V>(20.0)); }

  template <bool kRare>
  RF_INLINE Surrogate<V> dppo_tv(const Token<V, kRare>& t) const {
    const V move = exp20(within(t.logprob)).value - exp20(within(t.old)).value;
    const Flag<V> up = gt(t.advantage, V{});
    return dppo(t, le(select(up, move, -move), select(up, parameter(1), parameter(0))));
  }

  // The probability of every other token is 1 - p = -(exp(log p) - 1), without cancellation.
  template <bool kRare>
  RF_INLINE Surrogate<V> dppo_kl(const Token<V, kRare>& t) const {
    const V floor = all<V>(1e-8);
    const Exp<V> p_new = exp20(within(t.logprob)), p_old = exp20(within(t.old));
    const V rest = log_positive((floor - p_old.minus_one) / (floor - p_new.minus_one));
    const V kl = -p_old.minus_one * rest - p_old.value * t.log_ratio();
    const Flag<V> up = gt(t.advantage, V{});
    const V away = select(up, p_new.value - p_old.value, p_old.value - p_new.value);
    return dppo(t, le(kl, select(up, parameter(1), parameter(0))) | le(away, V{}));
  }

  template <bool kRare>
  RF_INLINE Surrogate<V> dro(const Token<V, kRare>& t) const {
    Surrogate<V> s = weighted_logp(t, all<V>(1.0));
    const V l = t.log_ratio(), pull = parameter(0) * l;
    s.value += all<V>(0.5) * pull * l;
    s.slope += t.live(pull);
    return s;
  }

  template <bool kRare>
  RF_INLINE Surrogate<V> kl_cov(const Token<V, kRare>& t) const {
    const Flag<V> down = t.selected & lt(t.advantage, V{}), up = t.selected & gt(t.advantage, V{});
    const V l = t.log_ratio(), pull = select(t.selected, parameter(1), V{});
    const V side = select(gt(l, V{}), all<V>(1.0), select(lt(l, V{}), all<V>(-1.0), V{}));
    return {pull * abs(l) - t.advantage * t.ratio, t.live(pull * side - t.advantage * t.ratio), down, up, never<V>()};
  }

  template <bool kRare>
  RF_INLINE Surrogate<V> clip_cov(const Token<V, kRare>& t) const {
    const double bounds[4] = {p[0], p[1], HUGE_VAL, HUGE_VAL};
    Surrogate<V> s = Clip<V>(bounds)(t.advantage, t.ratio, t.live(t.ratio));
    s.value = select(t.selected, V{}, s.value);
    s.slope = select(t.selected, V{}, s.slope);
    s.dual = t.selected;
    return s;
  }
};

// ---- KL to the reference policy ----------------------------------------------------------------------------

template <class V>
struct Penalty {
  V estimate;      // k1, k2, k3 or |x| as it stands, for the statistics
  V value, slope;  // what enters the loss
};

// An estimate of KL(policy || reference) from x = log p - log ref, and its derivative by x.
template <class V>
RF_INLINE V estimate(KlEstimator estimator, V x, V& slope) {
  switch (estimator) {
    case KlEstimator::k1: slope = all<V>(1.0); return x;
    case KlEstimator::k2: slope = x; return all<V>(0.5) * x * x;
    case KlEstimator::abs:
      slope = select(gt(x, V{}), all<V>(1.0), select(lt(x, V{}), all<V>(-1.0), V{}));
      return abs(x);
    default: break;
  }
  const V m = exp20(-x).minus_one;
  slope = -m;
  return m + x;
}

template <class V, bool kRare>
RF_INLINE Penalty<V> penalty(KlEstimator estimator, KlGradient gradient, const Token<V, kRare>& t, V ref, V raw) {
  const LogRatio<V> x = kRare ? log_ratio(t.logprob, ref) : LogRatio<V>{raw, never<V>()};
  V slope{};
  const V k = rf::RF_ISA::estimate(estimator, x.value, slope);
  if (gradient == KlGradient::k2) slope = x.value;
  if constexpr (kRare) slope = select(x.clamped, V{}, slope);
  if (gradient != KlGradient::ratio) return {k, k, slope};
  return {k, t.ratio * k, t.ratio * (t.live(k) + slope)};
}

}  // namespace
}  // namespace RF_ISA
}  // namespace rf
