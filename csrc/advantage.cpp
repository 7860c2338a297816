// Generalised advantage estimation and discounted returns; moments and whitening.
//
//   m_t = b_t + a_t m_{t+1},  m_t = (1 - lam) V_t + lam G_t,  G_t = r_t + gamma m_{t+1},  A_t = G_t - V_t
//   an action: a = gamma lam, b = (1 - lam) V_t + lam r_t;   terminated: a = 0
//   truncated: a = 0, b = (1 - lam) V_t + lam (r_t + gamma V_boot);   masked: a = 1, b = 0
//
// m is what a step tells its predecessor, so gaps, cuts and packing need no second pass (DESIGN, hot path 2).
// Discounted returns are V = 0, lam = 1.
//
// Roofline: r, V, mask read and A, G written, 17 bytes a step in float32, for 6 flops (2 log2(lanes) more in
// the scan): bandwidth-bound. A block of kLanes steps is scanned in a register, its suffix products being
// constants, and joined to the carry by one multiply-add; blocks are counted from the row's first step, so
// neither padding nor packing changes a bit. A block with a gap or a cut goes step by step.
#include "advantage.h"

#include "memory.h"
#include "parallel.h"
#include "scan.h"

namespace rf {
namespace RF_ISA {
namespace {

// ---- the scan over the lanes of a vector, constant coefficients --------------------------------------------

// What the scan of a row needs of gamma and lam; c = gamma lam.
struct Row {
  double gamma, lam;
  f32v powers[4];  // c, c^2, c^4, c^8
  f32v to_end;     // c^(kLanes - i)

  Row(double gamma, double lam) : gamma(gamma), lam(lam) {
    const double c = gamma * lam;
    double power = c;
    for (f32v& p : powers) {
      p = splat(static_cast<float>(power));
      power *= power;
    }
    power = c;
    for (int i = kLanes; i-- > 0; power *= c) to_end[i] = static_cast<float>(power);
  }
};

// b_i + c b_{i+1} + c^2 b_{i+2} + ... to the vector's end, by doubling.
inline f32v suffix_sums(f32v b, const Row& row) {
  b = row.powers[0] * shift<1>(b, f32v{}) + b;
  b = row.powers[1] * shift<2>(b, f32v{}) + b;
  if constexpr (kLanes > 4) b = row.powers[2] * shift<4>(b, f32v{}) + b;
  if constexpr (kLanes > 8) b = row.powers[3] * shift<(kLanes > 8 ? 8 : 0)>(b, f32v{}) + b;
  return b;
}

// ---- one row -----------------------------------------------------------------------------------------------

inline double real(double x) { return x; }
template <class T>
inline float real(T x) {
  return to_float(x);
}

// The arrays of one sequence, each at its first step; Real is float, or double for double.
template <class T, class Real>
struct Steps {
  const T* rewards;
  const T* values;
  const T* bootstrap;
  const uint8_t* terminated;
  const uint8_t* truncated;
  const uint8_t* mask;
  Real* advantages;
  Real* returns;

  bool counts(int64_t t) const { return mask == nullptr || mask[t]; }
  bool ends(int64_t t) const { return terminated != nullptr && terminated[t]; }
  bool cut(int64_t t) const { return truncated != nullptr && truncated[t]; }

  void write(int64_t t, Real advantage, Real value) const {
    if (advantages != nullptr) advantages[t] = advantage;
    returns[t] = value;
  }
};

// Step by step from end - 1 down to begin; takes and returns the message m of the step behind.
template <class T, class Real>
Real walk(const Steps<T, Real>& s, int64_t begin, int64_t end, Real m, const Row& row) {
  const Real gamma = static_cast<Real>(row.gamma), lam = static_cast<Real>(row.lam), keep = Real(1) - lam;
  for (int64_t t = end; t-- > begin;) {
    if (!s.counts(t)) {
      s.write(t, Real(0), Real(0));
      continue;
    }
    const Real value = s.values != nullptr ? real(s.values[t]) : Real(0);
    const Real next = s.ends(t) ? Real(0) : (s.cut(t) ? real(s.bootstrap[t]) : m);
    const Real target = real(s.rewards[t]) + gamma * next;
    s.write(t, target - value, target);
    m = keep * value + lam * target;
  }
  return m;
}

template <class T>
float block(const Steps<T, float>& s, int64_t t, float m, const Row& row) {
  const bool whole = s.mask == nullptr || all(s.mask + t, 1);
  if (!whole && all(s.mask + t, 0)) {
    if (s.advantages != nullptr) store(s.advantages + t, f32v{});
    store(s.returns + t, f32v{});
    return m;
  }
  const bool uncut = (s.terminated == nullptr || all(s.terminated + t, 0)) &&
                     (s.truncated == nullptr || all(s.truncated + t, 0));
  if (!whole || !uncut) return walk(s, t, t + kLanes, m, row);
  const f32v r = load(s.rewards + t), v = s.values != nullptr ? load(s.values + t) : f32v{};
  const f32v lam = splat(static_cast<float>(row.lam));
  const f32v b = (splat(1.0f) - lam) * v + lam * r;
  const f32v message = row.to_end * splat(m) + suffix_sums(b, row);
  const f32v target = splat(static_cast<float>(row.gamma)) * shift<1>(message, splat(m)) + r;
  if (s.advantages != nullptr) store(s.advantages + t, target - v);
  store(s.returns + t, target);
  return message[0];
}

template <class T>
void scan(const Steps<T, float>& s, int64_t n, float m, const Row& row) {
  const int64_t blocks = n / kLanes * kLanes;
  m = walk(s, blocks, n, m, row);
  for (int64_t t = blocks; (t -= kLanes) >= 0;) m = block(s, t, m, row);
}
void scan(const Steps<double, double>& s, int64_t n, double m, const Row& row) { walk(s, 0, n, m, row); }

// ---- rows --------------------------------------------------------------------------------------------------

template <class T>
T* from(T* pointer, int64_t offset) {
  return pointer == nullptr ? nullptr : pointer + offset;
}
template <class T>
const T* typed(const void* pointer, int64_t offset) {
  return from(static_cast<const T*>(pointer), offset);
}
template <class T>
T* typed(void* pointer, int64_t offset) {
  return from(static_cast<T*>(pointer), offset);
}

template <class T, class Real>
Steps<T, Real> steps(const GaeInput& in, int64_t begin) {
  return {nullptr,
          typed<T>(in.values, begin),
          typed<T>(in.bootstrap_values, begin),
          from(in.terminated, begin),
          from(in.truncated, begin),
          from(in.mask, begin),
          nullptr,
          nullptr};
}

template <class Body>
void for_rows(const GaeInput& in, const Body& body) {
  parallel_for(in.sequences.rows, in.sequences.elements(), in.threads, [&](int64_t i) {
    const int64_t begin = in.sequences.begin(i);
    body(i, begin, in.sequences.end(i) - begin, in.lams != nullptr ? in.lams[i] : in.lam);
  });
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
    s.returns = typed<Real>(args.returns, begin);
    const Real m = last != nullptr ? real(last[i]) : Real(0);
    if (in.lams == nullptr) return scan(s, n, m, shared);
    scan(s, n, m, Row(in.gamma, lam));
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

template <class T, class Real>
Real scan_steps(const T* a, const T* b, Real* y, int64_t begin, int64_t end, Real carry) {
  for (int64_t t = end; t-- > begin;) y[t] = carry = real(b[t]) + real(a[t]) * carry;
  return carry;
}

template <class T>
void scan_row(const T* a, const T* b, float* y, int64_t n, float carry) {
  const int64_t blocks = n / kLanes * kLanes;
  carry = scan_steps(a, b, y, blocks, n, carry);
  for (int64_t t = blocks; (t -= kLanes) >= 0;) {
    const f32v found = compose(load(a + t), load(b + t), splat(carry));
    store(y + t, found);
    carry = found[0];
  }
}
void scan_row(const double* a, const double* b, double* y, int64_t n, double carry) {
  scan_steps(a, b, y, 0, n, carry);
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

// ---- moments and whitening ---------------------------------------------------------------------------------

// The unit of work, folded in order: 16 KiB of float32 stay in L1 for the second look.
constexpr int64_t kBlock = 4096;
// Block results kept on the stack at a time: 48 KiB, so that a barrier is behind 8 million elements.
constexpr int64_t kBatch = 2048;

template <class T>
Moments block_moments(const T* x, const uint8_t* mask, int64_t n) {
  double count = 0, sum = 0, m2 = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool counts = mask == nullptr || mask[i];
    count += counts;
    sum += counts ? static_cast<double>(real(x[i])) : 0.0;
  }
  const double mean = count > 0 ? sum / count : 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const bool counts = mask == nullptr || mask[i];
    const double d = counts ? static_cast<double>(real(x[i])) - mean : 0.0;
    m2 += d * d;
  }
  return {count, mean, m2};
}

// Calls part(begin, size) for every block of [0, count) and join(result) in the blocks' order.
template <class Result, class Part, class Join>
void fold(int64_t count, int threads, const Part& part, const Join& join) {
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  Result results[kBatch];
  for (int64_t first = 0; first < blocks; first += kBatch) {
    const int64_t size = blocks - first < kBatch ? blocks - first : kBatch;
    parallel_for(size, size * kBlock, threads, [&](int64_t i) {
      const int64_t begin = (first + i) * kBlock;
      results[i] = part(begin, count - begin < kBlock ? count - begin : kBlock);
    });
    for (int64_t i = 0; i < size; ++i) join(results[i]);
  }
}

template <class T, class Real>
Moments moments_of(const MomentsArgs& args) {
  Moments total{0, 0, 0};
  fold<Moments>(
      args.count, args.threads,
      [&](int64_t begin, int64_t n) {
        return block_moments(typed<T>(args.x, begin), from(args.mask, begin), n);
      },
      [&](const Moments& part) { total = merge(total, part); });
  return total;
}

template <class Body>
void for_blocks(int64_t count, int threads, const Body& body) {
  parallel_for((count + kBlock - 1) / kBlock, count, threads, [&](int64_t block) {
    const int64_t begin = block * kBlock;
    body(begin, count - begin < kBlock ? count : begin + kBlock);
  });
}

template <class T, class Real>
void whiten_of(const WhitenArgs& args) {
  const T* x = static_cast<const T*>(args.x);
  Real* out = static_cast<Real*>(args.out);
  const Real shift = static_cast<Real>(args.shift), scale = static_cast<Real>(args.scale);
  const Real offset = static_cast<Real>(args.offset);
  for_blocks(args.count, args.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Real y = (real(x[i]) - shift) * scale + offset;
      out[i] = args.mask == nullptr || args.mask[i] ? y : Real(0);
    }
  });
}

struct Sums {
  double plain, weighted;
};

template <class T, class Real>
Sums whiten_sums_of(const WhitenBackwardArgs& args) {
  Sums total{0, 0};
  const T* x = static_cast<const T*>(args.x);
  const Real* g = static_cast<const Real*>(args.upstream);
  fold<Sums>(
      args.count, args.threads,
      [&](int64_t begin, int64_t n) {
        Sums part{0, 0};
        for (int64_t i = begin; i < begin + n; ++i) {
          if (args.mask != nullptr && !args.mask[i]) continue;
          part.plain += static_cast<double>(g[i]);
          part.weighted += static_cast<double>(g[i]) * (static_cast<double>(real(x[i])) - args.mean);
        }
        return part;
      },
      [&](const Sums& part) {
        total.plain += part.plain;
        total.weighted += part.weighted;
      });
  return total;
}

template <class T, class Real>
void whiten_backward_of(const WhitenBackwardArgs& args) {
  const T* x = static_cast<const T*>(args.x);
  const Real* g = static_cast<const Real*>(args.upstream);
  Real* d_x = static_cast<Real*>(args.d_x);
  for_blocks(args.count, args.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (args.mask != nullptr && !args.mask[i]) {
        d_x[i] = Real(0);
        continue;
      }
      const double distance = static_cast<double>(real(x[i])) - args.mean;
      d_x[i] = static_cast<Real>(args.slope * static_cast<double>(g[i]) + args.constant + args.linear * distance);
    }
  });
}

// ---- dispatch on the dtype -----------------------------------------------------------------------------------

#define RF_BY_DTYPE(function, dtype)                                  \
  switch (dtype) {                                                    \
    case DType::float64: return function<double, double>(args);       \
    case DType::float16: return function<f16, float>(args);           \
    case DType::bfloat16: return function<bf16, float>(args);         \
    default: return function<float, float>(args);                     \
  }

void gae(const GaeArgs& args) { RF_BY_DTYPE(gae_of, args.in.dtype) }
void gae_backward(const GaeBackwardArgs& args) { RF_BY_DTYPE(gae_backward_of, args.in.dtype) }
void scan(const ScanArgs& args) { RF_BY_DTYPE(scan_of, args.dtype) }
void scan_backward(const ScanBackwardArgs& args) { RF_BY_DTYPE(scan_backward_of, args.dtype) }
Moments moments(const MomentsArgs& args) { RF_BY_DTYPE(moments_of, args.dtype) }
void whiten(const WhitenArgs& args) { RF_BY_DTYPE(whiten_of, args.dtype) }
void whiten_backward(const WhitenBackwardArgs& args) { RF_BY_DTYPE(whiten_backward_of, args.dtype) }
Sums sums_by_dtype(const WhitenBackwardArgs& args) { RF_BY_DTYPE(whiten_sums_of, args.dtype) }
void whiten_sums(const WhitenBackwardArgs& args, double out[2]) {
  const Sums total = sums_by_dtype(args);
  out[0] = total.plain;
  out[1] = total.weighted;
}

}  // namespace

extern const Advantage advantage_table;
const Advantage advantage_table = {gae,         gae_backward, scan,   scan_backward,
                                   moments, whiten_sums, whiten, whiten_backward};

}  // namespace RF_ISA
}  // namespace rf
