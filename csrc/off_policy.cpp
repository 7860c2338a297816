// V-trace and Retrace.
//
//   V-trace   x_t = rho_t (r_t + gamma V' - V_t) + gamma c_t x',   target V_t + x_t,
//             advantage rho_t (r_t + gamma (V' + x') - V_t)
//   Retrace   m_t = c_t (r_t + gamma V' - Q_t) + gamma c_t m',     target r_t + gamma (V' + m')
//
// ' is the next counting step; x' = m' = 0 behind a cut. rho and c are clipped ratios, c times lam. m is what a
// step tells its predecessor, so Retrace needs nothing of the next step but m.
//
// Roofline: V-trace reads 13 and writes 8 bytes a step in float32 with a mask, Retrace reads 17 and writes 4, for
// some 40 flops, half of them the exponential: bandwidth-bound from the second-level cache on.
//
// A row is taken from its end in blocks of kLanes counting steps, wherever they stand: a block without a gap is
// read as vectors, one with a gap goes through the stack. The numbers of a block depend on its counting steps
// alone, so padding on either side, gaps and packing change no bit.
#include "off_policy.h"

#include <cmath>

#include "memory.h"
#include "parallel.h"
#include "scan.h"

namespace rf {
namespace RF_ISA {
namespace {

// kLanes counting steps, the last one in the last lane; lanes before `first` are no steps.
struct Lanes {
  f32v r, v, log_rho, aside;
  i32v ends, cut;  // cut: truncated and not terminated
  int first;
  bool stops;  // some lane ends or is cut
};

// ---- the arrays of one sequence, each at its first step ------------------------------------------------------

template <class T, class Real>
struct Steps {
  const T* rewards;
  const T* values;
  const T* log_rhos;
  const T* aside;
  const uint8_t* terminated;
  const uint8_t* truncated;
  const uint8_t* mask;
  Real* targets;
  Real* advantages;

  bool counts(int64_t t) const { return mask == nullptr || mask[t]; }
  bool ends(int64_t t) const { return terminated != nullptr && terminated[t]; }
  bool cut(int64_t t) const { return truncated != nullptr && truncated[t] && !ends(t); }

  void write(int64_t t, Real target, Real advantage) const {
    targets[t] = target;
    if (advantages != nullptr) advantages[t] = advantage;
  }

  Lanes load(int64_t t) const {
    Lanes in{RF_ISA::load(rewards + t), RF_ISA::load(values + t), RF_ISA::load(log_rhos + t), f32v{}, i32v{}, i32v{},
             0, false};
    if (aside != nullptr) in.aside = RF_ISA::load(aside + t);
    in.stops = (terminated != nullptr && !all(terminated + t, 0)) || (truncated != nullptr && !all(truncated + t, 0));
    if (in.stops) {
      if (terminated != nullptr) in.ends = load_flags(terminated + t);
      if (truncated != nullptr) in.cut = load_flags(truncated + t) & ~in.ends;
    }
    return in;
  }

  // Steps back from `end` over up to kLanes counting steps; masked ones on the way are written.
  int collect(int64_t& end, int64_t (&places)[kLanes]) const {
    int first = kLanes;
    while (end > 0 && first > 0) {
      if (end >= kLanes && all(mask + end - kLanes, 0)) {
        end -= kLanes;
        store(targets + end, f32v{});
        if (advantages != nullptr) store(advantages + end, f32v{});
      } else if (counts(--end)) {
        places[--first] = end;
      } else {
        write(end, 0, 0);
      }
    }
    return first;
  }

  Lanes gather(const int64_t (&places)[kLanes], int first) const {
    Lanes in{f32v{}, f32v{}, f32v{}, f32v{}, i32v{}, i32v{}, first, false};
    for (int i = first; i < kLanes; ++i) {
      const int64_t t = places[i];
      in.r[i] = to_float(rewards[t]), in.v[i] = to_float(values[t]), in.log_rho[i] = to_float(log_rhos[t]);
      if (aside != nullptr) in.aside[i] = to_float(aside[t]);
      in.ends[i] = -static_cast<int>(ends(t)), in.cut[i] = -static_cast<int>(cut(t));
      in.stops = in.stops || ends(t) || cut(t);
    }
    return in;
  }
};

// x_t = b_t + a_t x_{t+1} over the lanes; nothing, not even NaN, crosses a stop.
inline f32v scan_lanes(const Lanes& in, f32v a, f32v b, float carry) {
  if (!in.stops) return compose(a, b, splat(carry));
  const i32v stops = in.ends | in.cut;
  f32v x{};
  for (int i = kLanes; i-- > in.first;) x[i] = carry = stops[i] ? b[i] : b[i] + a[i] * carry;
  return x;
}

// ---- the two rules, over lanes for float and step by step for double ----------------------------------------

struct Found {
  f32v target, advantage;
};
struct FoundStep {
  double target, advantage;
};

struct VtraceRule {
  double gamma, lam, rho_clip, c_clip, advantage_clip;
  double value, x;  // of the next counting step

  Found operator()(const Lanes& in) {
    const f32v g = splat(static_cast<float>(gamma)), rho = exp(in.log_rho);
    const i32v stops = in.ends | in.cut;
    const f32v kept = select(in.cut, in.aside, f32v{});
    const f32v next = select(stops, kept, shift<1>(in.v, splat(static_cast<float>(value))));
    const f32v a = splat(static_cast<float>(gamma * lam)) * min(splat(static_cast<float>(c_clip)), rho);
    const f32v b = min(splat(static_cast<float>(rho_clip)), rho) * ((in.r - in.v) + g * next);
    const f32v found = scan_lanes(in, a, b, static_cast<float>(x));
    const f32v behind = select(stops, f32v{}, shift<1>(found, splat(static_cast<float>(x))));
    const f32v weight = min(splat(static_cast<float>(advantage_clip)), rho);
    value = in.v[0], x = found[0];
    return {in.v + found, weight * ((in.r - in.v) + g * (next + behind))};
  }

  FoundStep operator()(double r, double v, double log_rho, double aside, bool ends, bool cut) {
    const double rho = std::exp(log_rho), next = ends ? 0 : (cut ? aside : value), behind = ends || cut ? 0 : x;
    const double step = r - v + gamma * next;
    const auto least = [&](double clip) { return rho > clip ? clip : rho; };
    const double advantage = least(advantage_clip) * (step + gamma * behind);
    x = least(rho_clip) * step + gamma * lam * least(c_clip) * behind;
    value = v;
    return {v + x, advantage};
  }
};

struct RetraceRule {
  double gamma, lam;
  double m;  // of the next counting step

  Found operator()(const Lanes& in) {
    const f32v g = splat(static_cast<float>(gamma));
    const f32v c = splat(static_cast<float>(lam)) * min(splat(1.0f), exp(in.log_rho));
    const f32v next = select(in.ends, f32v{}, in.aside);
    const f32v one_step = in.r + g * next;
    const f32v found = scan_lanes(in, g * c, c * (one_step - in.v), static_cast<float>(m));
    const f32v behind = select(in.ends | in.cut, f32v{}, shift<1>(found, splat(static_cast<float>(m))));
    m = found[0];
    return {one_step + g * behind, f32v{}};
  }

  FoundStep operator()(double r, double v, double log_rho, double aside, bool ends, bool cut) {
    const double rho = std::exp(log_rho), c = lam * (rho > 1 ? 1 : rho);
    const double one_step = r + gamma * (ends ? 0 : aside), behind = ends || cut ? 0 : m;
    const double target = one_step + gamma * behind;
    m = c * (target - v);
    return {target, 0};
  }
};

// ---- rows ------------------------------------------------------------------------------------------------------

template <class Rule, class T>
void scan(const Steps<T, float>& s, int64_t n, Rule rule) {
  int64_t places[kLanes];
  for (int64_t end = n; end > 0;) {
    // Both ways of reading meet in one place, so that they meet in the same arithmetic.
    const bool whole = end >= kLanes && (s.mask == nullptr || all(s.mask + end - kLanes, 1));
    const int first = whole ? 0 : s.collect(end, places);
    if (first == kLanes) break;
    if (whole) end -= kLanes;
    const Lanes in = whole ? s.load(end) : s.gather(places, first);
    const Found found = rule(in);
    if (whole) {
      store(s.targets + end, found.target);
      if (s.advantages != nullptr) store(s.advantages + end, found.advantage);
    } else {
      for (int i = first; i < kLanes; ++i) s.write(places[i], found.target[i], found.advantage[i]);
    }
  }
}

template <class Rule>
void scan(const Steps<double, double>& s, int64_t n, Rule rule) {
  for (int64_t t = n; t-- > 0;) {
    if (!s.counts(t)) {
      s.write(t, 0, 0);
      continue;
    }
    const double aside = s.aside != nullptr ? s.aside[t] : 0.0;
    const FoundStep found = rule(s.rewards[t], s.values[t], s.log_rhos[t], aside, s.ends(t), s.cut(t));
    s.write(t, found.target, found.advantage);
  }
}

template <class T>
const T* typed(const void* pointer, int64_t offset) {
  return pointer == nullptr ? nullptr : static_cast<const T*>(pointer) + offset;
}
template <class T>
T* typed(void* pointer, int64_t offset) {
  return pointer == nullptr ? nullptr : static_cast<T*>(pointer) + offset;
}

template <class T, class Real, class Rule>
void for_rows(const OffPolicyInput& in, void* targets, void* advantages, const Rule& rule_of) {
  const std::size_t bytes = static_cast<std::size_t>(in.sequences.elements()) * sizeof(Real);
  prefer_large_pages(targets, bytes);
  if (advantages != nullptr) prefer_large_pages(advantages, bytes);
  parallel_for(in.sequences.rows, in.sequences.elements(), in.threads, [&](int64_t i) {
    const int64_t begin = in.sequences.begin(i);
    const Steps<T, Real> s{typed<T>(in.rewards, begin),          typed<T>(in.values, begin),
                           typed<T>(in.log_rhos, begin),         typed<T>(in.aside, begin),
                           typed<uint8_t>(in.terminated, begin), typed<uint8_t>(in.truncated, begin),
                           typed<uint8_t>(in.mask, begin),       typed<Real>(targets, begin),
                           typed<Real>(advantages, begin)};
    scan(s, in.sequences.end(i) - begin, rule_of(i, in.lams != nullptr ? in.lams[i] : in.lam));
  });
}

inline double real(double x) { return x; }
template <class T>
inline double real(T x) {
  return to_float(x);
}

template <class T, class Real>
void vtrace_of(const VtraceArgs& args) {
  const T* last = static_cast<const T*>(args.in.last_values);
  for_rows<T, Real>(args.in, args.targets, args.advantages, [&](int64_t row, double lam) {
    const double value = last != nullptr ? real(last[row]) : 0.0;
    return VtraceRule{args.in.gamma, lam, args.rho_clip, args.c_clip, args.advantage_rho_clip, value, 0.0};
  });
}

template <class T, class Real>
void retrace_of(const RetraceArgs& args) {
  for_rows<T, Real>(args.in, args.targets, nullptr,
                    [&](int64_t, double lam) { return RetraceRule{args.in.gamma, lam, 0.0}; });
}

#define RF_BY_DTYPE(function, dtype)                                  \
  switch (dtype) {                                                    \
    case DType::float64: return function<double, double>(args);       \
    case DType::float16: return function<f16, float>(args);           \
    case DType::bfloat16: return function<bf16, float>(args);         \
    default: return function<float, float>(args);                     \
  }

void vtrace(const VtraceArgs& args) { RF_BY_DTYPE(vtrace_of, args.in.dtype) }
void retrace(const RetraceArgs& args) { RF_BY_DTYPE(retrace_of, args.in.dtype) }

}  // namespace

extern const OffPolicy off_policy_table;
const OffPolicy off_policy_table = {vtrace, retrace};

}  // namespace RF_ISA
}  // namespace rf
