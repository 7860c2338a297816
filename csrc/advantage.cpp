// Generalised advantage estimation and discounted returns.
//
//   m_t = b_t + a_t m_{t+1},  m_t = (1 - lam) V_t + lam G_t,  G_t = r_t + gamma m_{t+1},  A_t = G_t - V_t
//   an action: a = gamma lam, b = (1 - lam) V_t + lam r_t;   terminated: a = 0
//   truncated: a = 0, b = (1 - lam) V_t + lam (r_t + gamma V_boot);   masked: a = 1, b = 0
//
// m is what a step tells its predecessor, so gaps, cuts and packing need no second pass (DESIGN, hot path 2).
// Discounted returns are V = 0, lam = 1.
//
// Roofline: r, V, mask read and A, G written, 17 bytes a step in float32, for 6 flops (2 log2(lanes) more in
// the scan): bandwidth-bound. A block of kLanes counting steps (steps.h) is scanned in a register, its suffix
// products being constants, and joined to the carry by one multiply-add; one with a cut goes step by step. The
// moments of the advantages, for whitening, are summed on the way.
#include "advantage.h"

#include <type_traits>

#include "memory.h"
#include "parallel.h"
#include "steps.h"

namespace rf {
namespace RF_ISA {
namespace {

// ---- the scan over the lanes of a vector, constant coefficients --------------------------------------------

// What the scan of a row needs of gamma and lam; c = gamma lam.
struct Row {
  double wide_gamma, wide_lam;
  f32v gamma, lam, keep;  // keep = 1 - lam
  f32v powers[4];         // c, c^2, c^4, c^8
  f32v to_end;            // c^(kLanes - i)
  f32v whole;             // c^kLanes

  Row(double g, double l) : wide_gamma(g), wide_lam(l) {
    gamma = splat(static_cast<float>(g)), lam = splat(static_cast<float>(l)), keep = splat(1.0f) - lam;
    const double c = g * l;
    double power = c;
    for (f32v& p : powers) {
      p = splat(static_cast<float>(power));
      power *= power;
    }
    power = c;
    for (int i = kLanes; i-- > 0; power *= c) to_end[i] = static_cast<float>(power);
    whole = first_lane(to_end);
  }
};

// b_i + c b_{i+1} + c^2 b_{i+2} + ... to the vector's end, by doubling.
inline f32v suffix_sums(f32v b, const Row& row) {
  b = mul_add(row.powers[0], shift<1>(b, f32v{}), b);
  b = mul_add(row.powers[1], shift<2>(b, f32v{}), b);
  if constexpr (kLanes > 4) b = mul_add(row.powers[2], shift<4>(b, f32v{}), b);
  if constexpr (kLanes > 8) b = mul_add(row.powers[3], shift<(kLanes > 8 ? 8 : 0)>(b, f32v{}), b);
  return b;
}

// ---- the recurrence, over lanes for float and step by step for double ---------------------------------------

// The values behind steps of which some end or are cut, and the first lane's message. Not inlined and by value, so
// that the common block stays in registers.
__attribute__((noinline)) f32v cross(f32v r, f32v v, f32v aside, i32v ends, i32v cut, int first, float gamma,
                                     float lam, float& m) {
  const float keep = 1.0f - lam;
  f32v next{};
  for (int i = kLanes; i-- > first;) {
    next[i] = ends[i] ? 0.0f : cut[i] ? aside[i] : m;
    m = keep * v[i] + lam * (r[i] + gamma * next[i]);
  }
  return next;
}

struct GaeRule {
  const Row row;  // a copy: results and constants are both floats, and a reference would be read again every block
  f32v behind;  // m of the next counting step, in every lane

  GaeRule(const Row& row, float m) : row(row), behind(splat(m)) {}

  Found operator()(const Lanes& in) {
    f32v next;
    if (!in.stops) {
      const f32v sums = suffix_sums(mul_add(row.keep, in.v, row.lam * in.r), row);
      next = shift<1>(mul_add(row.to_end, behind, sums), behind);
      behind = mul_add(row.whole, behind, first_lane(sums));  // one operation from block to block
    } else {
      float m = behind[0];
      next = cross(in.r, in.v, in.aside, in.ends, in.cut, in.first, row.gamma[0], row.lam[0], m);
      behind = splat(m);
    }
    const f32v target = mul_add(row.gamma, next, in.r);
    return {target, target - in.v};
  }
};

struct GaeStepRule {
  const Row& row;
  double m;  // of the next counting step

  // Not inlined: it has to round alike wherever it is called from.
  __attribute__((noinline)) FoundStep operator()(double r, double v, double, double aside, bool ends, bool cut) {
    const double target = r + row.wide_gamma * (ends ? 0.0 : cut ? aside : m);
    m = (1 - row.wide_lam) * v + row.wide_lam * target;
    return {target, target - v};
  }
};

template <class Real>
using RuleOf = std::conditional_t<std::is_same<Real, double>::value, GaeStepRule, GaeRule>;

// Moments of a row's advantages in one pass: sums of distances to its last advantage, in double.
struct MomentsWatch {
  double pivot = 0;
  int64_t count = 0;
  Doubles sum{}, square{};

  void operator()(f32v advantages, int first) {
    if (count == 0) pivot = advantages[kLanes - 1];
    count += kLanes - first;
    if (first != 0) advantages = from_lane(first, advantages, splat(static_cast<float>(pivot)));
    Doubles d = widen(advantages);
    d.low -= pivot, d.high -= pivot;
    sum.low += d.low, sum.high += d.high;
    square.low += d.low * d.low, square.high += d.high * d.high;
  }
  void operator()(double advantage) {
    if (count == 0) pivot = advantage;
    count += 1;
    sum.low[0] += advantage - pivot, square.low[0] += (advantage - pivot) * (advantage - pivot);
  }
  Moments found() const {
    if (count == 0) return {0, 0, 0};
    const double n = static_cast<double>(count), s = sum_lanes(sum), m2 = sum_lanes(square) - s * s / n;
    return {n, pivot + s / n, m2 < 0 ? 0.0 : m2};
  }
};

// ---- rows --------------------------------------------------------------------------------------------------

template <class T, class Real>
Steps<T, Real> steps(const GaeInput& in, int64_t begin) {
  Steps<T, Real> s{};
  s.values = typed<T>(in.values, begin);
  s.aside = typed<T>(in.bootstrap_values, begin);
  s.terminated = from(in.terminated, begin);
  s.truncated = from(in.truncated, begin);
  s.mask = from(in.mask, begin);
  s.aside_at_cuts = true;
  return s;
}

template <class Body>
void for_rows(const GaeInput& in, const Body& body) {
  parallel_for(in.sequences.rows, in.sequences.elements(), in.threads, [&](int64_t i) {
    const int64_t begin = in.sequences.begin(i);
    body(i, begin, in.sequences.end(i) - begin, in.lams != nullptr ? in.lams[i] : in.lam);
  });
}

// Masked steps of a row take over the next counting one's advantage.
template <class T, class Real>
void carry_over(const uint8_t* mask, const T* values, Real* advantages, Real* returns, int64_t n) {
  Real carry = 0;
  const auto fill = [&](int64_t t) { advantages[t] = carry, returns[t] = carry + real(values[t]); };
  for (int64_t t = n; t > 0;) {
    const bool whole = t >= kLanes;
    if (whole && all<1>(mask + t - kLanes)) {
      t -= kLanes;
      carry = advantages[t];
    } else if (whole && all<0>(mask + t - kLanes)) {
      t -= kLanes;
      if constexpr (std::is_same_v<Real, float>) {
        store(advantages + t, splat(carry));
        store(returns + t, splat(carry) + load(values + t));
      } else {
        for (int64_t i = t; i < t + kLanes; ++i) fill(i);
      }
    } else if (mask[--t]) {
      carry = advantages[t];
    } else {
      fill(t);
    }
  }
}

template <class T, class Real>
void gae_of(const GaeArgs& args) {
  const GaeInput& in = args.in;
  const T* last = static_cast<const T*>(in.last_values);
  const Row shared(in.gamma, in.lam);
  const std::size_t bytes = static_cast<std::size_t>(in.sequences.elements()) * sizeof(Real);
  prefer_large_pages(args.advantages, bytes);
  prefer_large_pages(args.returns, bytes);
  for_rows(in, [&](int64_t i, int64_t begin, int64_t n, double lam) {
    Steps<T, Real> s = steps<T, Real>(in, begin);
    s.rewards = typed<T>(args.rewards, begin);
    s.advantages = typed<Real>(args.advantages, begin);
    s.targets = typed<Real>(args.returns, begin);
    const auto walk = [&](const Row& row) {
      RuleOf<Real> rule{row, last != nullptr ? real(last[i]) : Real(0)};
      if (args.row_moments != nullptr) {
        MomentsWatch watch;
        for_steps(s, n, rule, watch);
        args.row_moments[i] = watch.found();
      } else {
        Unwatched watch;
        for_steps(s, n, rule, watch);
      }
    };
    walk(in.lams == nullptr ? shared : Row(in.gamma, lam));
    if (args.carried && s.mask != nullptr) carry_over(s.mask, s.values, s.advantages, s.targets, n);
  });
}

// The adjoint x_t = dL/dr_t runs forward: x_t = u_t + gamma lam x_p behind the counting step p, u_t = dL/dG_t.
template <class T, class Real>
void gae_backward_of(const GaeBackwardArgs& args) {
  const GaeInput& in = args.in;
  for_rows(in, [&](int64_t i, int64_t begin, int64_t n, double row_lam) {
    const Steps<T, Real> s = steps<T, Real>(in, begin);
    const Real gamma = static_cast<Real>(in.gamma), lam = static_cast<Real>(row_lam);
    const Real* d_advantages = typed<Real>(args.d_advantages, begin);
    const Real* d_returns = typed<Real>(args.d_returns, begin);
    Real* d_values = typed<Real>(args.d_values, begin);
    Real* d_bootstrap = typed<Real>(args.d_bootstrap_values, begin);
    Real* d_rewards = typed<Real>(args.d_rewards, begin);
    Real carry = 0;  // dL/dm_t
    for (int64_t t = 0; t < n; ++t) {
      const bool counts = s.counts(t), cut = s.cut(t) && !s.ends(t);
      const Real through = counts && d_advantages != nullptr ? d_advantages[t] : Real(0);
      const Real x = counts ? through + d_returns[t] + lam * carry : Real(0);
      d_rewards[t] = x;
      if (d_values != nullptr) d_values[t] = counts ? (Real(1) - lam) * carry - through : Real(0);
      if (d_bootstrap != nullptr) d_bootstrap[t] = counts && cut ? gamma * x : Real(0);
      if (counts) carry = s.ends(t) || cut ? Real(0) : gamma * x;
    }
    if (args.d_last_values != nullptr) static_cast<Real*>(args.d_last_values)[i] = carry;
  });
}

// ---- y_t = b_t + a_t y_{t+1} -------------------------------------------------------------------------------

template <class T>
void scan_row(const T* a, const T* b, float* y, int64_t n, float carry) {
  const int64_t blocks = n / kLanes * kLanes;
  for (int64_t t = n; t-- > blocks;) y[t] = carry = mul_add(to_float(a[t]), carry, to_float(b[t]));
  for (int64_t t = blocks; (t -= kLanes) >= 0;) {
    const f32v found = compose(load(a + t), load(b + t), splat(carry));
    store(y + t, found);
    carry = found[0];
  }
}
void scan_row(const double* a, const double* b, double* y, int64_t n, double carry) {
  for (int64_t t = n; t-- > 0;) y[t] = carry = b[t] + a[t] * carry;
}

template <class T, class Real>
void scan_of(const ScanArgs& args) {
  const Sequences& rows = args.sequences;
  const T* init = static_cast<const T*>(args.init);
  parallel_for(rows.rows, rows.elements(), args.threads, [&](int64_t i) {
    const int64_t begin = rows.begin(i);
    const Real carry = init != nullptr ? real(init[i]) : Real(0);
    scan_row(typed<T>(args.a, begin), typed<T>(args.b, begin), typed<Real>(args.out, begin), rows.end(i) - begin, carry);
  });
}

// The adjoint s_t = dL/dy_t runs forward: s_t = upstream_t + a_{t-1} s_{t-1}; db = s, da_t = s_t y_{t+1}.
template <class T, class Real>
void scan_backward_of(const ScanBackwardArgs& args) {
  const Sequences& rows = args.sequences;
  const T* init = static_cast<const T*>(args.init);
  parallel_for(rows.rows, rows.elements(), args.threads, [&](int64_t i) {
    const int64_t begin = rows.begin(i), n = rows.end(i) - begin;
    const T* a = typed<T>(args.a, begin);
    const Real* y = typed<Real>(args.y, begin);
    const Real* upstream = typed<Real>(args.upstream, begin);
    Real* d_a = typed<Real>(args.d_a, begin);
    Real* d_b = typed<Real>(args.d_b, begin);
    const Real last = init != nullptr ? real(init[i]) : Real(0);
    Real carry = 0;
    for (int64_t t = 0; t < n; ++t) {
      const Real s = upstream[t] + carry;
      d_b[t] = s;
      d_a[t] = s * (t + 1 < n ? y[t + 1] : last);
      carry = real(a[t]) * s;
    }
    if (args.d_init != nullptr) static_cast<Real*>(args.d_init)[i] = carry;
  });
}

// ---- masks -------------------------------------------------------------------------------------------------

// The bytes are right where all are zeros and ones, and of no use elsewhere.
template <class T>
bool flags_of(const T* mask, int64_t count, uint8_t* flags) {
  if constexpr (std::is_integral_v<T>) {
    T bits = 0;
    for (int64_t i = 0; i < count; ++i) bits |= mask[i], flags[i] = static_cast<uint8_t>(mask[i]);
    return (bits & ~T(1)) == 0;
  } else {
    bool other = false;
    for (int64_t i = 0; i < count; ++i) {
      flags[i] = mask[i] != T(0);
      other |= mask[i] != T(0) && mask[i] != T(1);
    }
    return !other;
  }
}

bool zeros_and_ones(const void* mask, DType dtype, int64_t count, uint8_t* flags) {
  switch (dtype) {
    case DType::int64: return flags_of(static_cast<const int64_t*>(mask), count, flags);
    case DType::int32: return flags_of(static_cast<const int32_t*>(mask), count, flags);
    case DType::float64: return flags_of(static_cast<const double*>(mask), count, flags);
    default: return flags_of(static_cast<const float*>(mask), count, flags);
  }
}

void gae(const GaeArgs& args) { RF_BY_DTYPE(gae_of, args.in.dtype) }
void gae_backward(const GaeBackwardArgs& args) { RF_BY_DTYPE(gae_backward_of, args.in.dtype) }
void scan(const ScanArgs& args) { RF_BY_DTYPE(scan_of, args.dtype) }
void scan_backward(const ScanBackwardArgs& args) { RF_BY_DTYPE(scan_backward_of, args.dtype) }

}  // namespace

extern const Advantage advantage_table;
const Advantage advantage_table = {zeros_and_ones, gae, gae_backward, scan, scan_backward};

}  // namespace RF_ISA
}  // namespace rf
