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
// A row is taken from its end in blocks of counting steps, see steps.h.
#include "off_policy.h"

#include <cmath>

#include "exp.h"
#include "memory.h"
#include "parallel.h"
#include "steps.h"

namespace rf {
namespace RF_ISA {
namespace {

// x_t = b_t + a_t x_{t+1} step by step; nothing, not even NaN, crosses a stop.
__attribute__((noinline)) f32v scan_steps(f32v a, f32v b, i32v stops, int first, float carry) {
  f32v x{};
  for (int i = kLanes; i-- > first;) x[i] = carry = stops[i] ? b[i] : b[i] + a[i] * carry;
  return x;
}
inline f32v scan_lanes(const Lanes& in, f32v a, f32v b, float carry) {
  return in.stops ? scan_steps(a, b, in.ends | in.cut, in.first, carry) : compose(a, b, splat(carry));
}

// ---- the two rules, over lanes for float and step by step for double ----------------------------------------

struct VtraceRule {
  double gamma, lam, rho_clip, c_clip, advantage_clip;
  double value, x;  // of the next counting step

  Found operator()(const Lanes& in) {
    const f32v g = splat(static_cast<float>(gamma)), rho = exp(in.log_rho);
    const i32v stops = in.ends | in.cut;
    const f32v kept = select(in.cut, in.aside, f32v{});
    const f32v next = select(stops, kept, shift<1>(in.v, splat(static_cast<float>(value))));
    const f32v a = splat(static_cast<float>(gamma * lam)) * min(splat(static_cast<float>(c_clip)), rho);
    const f32v b = min(splat(static_cast<float>(rho_clip)), rho) * mul_add(g, next, in.r - in.v);
    const f32v found = scan_lanes(in, a, b, static_cast<float>(x));
    const f32v behind = select(stops, f32v{}, shift<1>(found, splat(static_cast<float>(x))));
    const f32v weight = min(splat(static_cast<float>(advantage_clip)), rho);
    value = in.v[0], x = found[0];
    return {in.v + found, weight * mul_add(g, next + behind, in.r - in.v)};
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
    const f32v one_step = mul_add(g, next, in.r);
    const f32v found = scan_lanes(in, g * c, c * (one_step - in.v), static_cast<float>(m));
    const f32v behind = select(in.ends | in.cut, f32v{}, shift<1>(found, splat(static_cast<float>(m))));
    m = found[0];
    return {mul_add(g, behind, one_step), f32v{}};
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

template <class T, class Real, class Rule, class RuleOf>
void for_rows(const OffPolicyInput& in, void* targets, void* advantages, const RuleOf& rule_of) {
  const std::size_t bytes = static_cast<std::size_t>(in.sequences.elements()) * sizeof(Real);
  prefer_large_pages(targets, bytes);
  if (advantages != nullptr) prefer_large_pages(advantages, bytes);
  parallel_for(in.sequences.rows, in.sequences.elements(), in.threads, [&](int64_t i) {
    const int64_t begin = in.sequences.begin(i);
    const Steps<T, Real> s{typed<T>(in.rewards, begin),          typed<T>(in.values, begin),
                           typed<T>(in.log_rhos, begin),         typed<T>(in.aside, begin),
                           typed<uint8_t>(in.terminated, begin), typed<uint8_t>(in.truncated, begin),
                           typed<uint8_t>(in.mask, begin),       typed<Real>(targets, begin),
                           typed<Real>(advantages, begin),       false};
    Rule rule = rule_of(i, in.lams != nullptr ? in.lams[i] : in.lam);
    Unwatched watch;
    for_steps(s, in.sequences.end(i) - begin, rule, watch);
  });
}

template <class T, class Real>
void vtrace_of(const VtraceArgs& args) {
  const T* last = static_cast<const T*>(args.in.last_values);
  for_rows<T, Real, VtraceRule>(args.in, args.targets, args.advantages, [&](int64_t row, double lam) {
    const double value = last != nullptr ? real(last[row]) : 0.0;
    return VtraceRule{args.in.gamma, lam, args.rho_clip, args.c_clip, args.advantage_rho_clip, value, 0.0};
  });
}

template <class T, class Real>
void retrace_of(const RetraceArgs& args) {
  for_rows<T, Real, RetraceRule>(args.in, args.targets, nullptr,
                    [&](int64_t, double lam) { return RetraceRule{args.in.gamma, lam, 0.0}; });
}

void vtrace(const VtraceArgs& args) { RF_BY_DTYPE(vtrace_of, args.in.dtype) }
void retrace(const RetraceArgs& args) { RF_BY_DTYPE(retrace_of, args.in.dtype) }

}  // namespace

extern const OffPolicy off_policy_table;
const OffPolicy off_policy_table = {vtrace, retrace};

}  // namespace RF_ISA
}  // namespace rf
