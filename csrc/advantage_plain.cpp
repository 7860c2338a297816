// Generalised advantage estimation without gaps, as other trainers keep their arrays and round their numbers.
//
//   delta_t = r_t + gamma V'_t - V_t      A_t = delta_t + gamma lam A_{t+1}      G_t = A_t + V_t
//
// Compiled without contraction: products and sums round one by one, as numpy and torch round them, so that advantages
// are 0 where rewards and values cancel.
//
// Roofline: by_time reads 9 and writes 8 bytes a step in float32 for 7 flops, ahead reads 14 and writes 8 for some 20:
// bandwidth-bound. by_time takes one step of all rows at a time, which are neighbours; ahead scans the lanes of a
// vector as reverse_linear_scan does, to the same bits.
#include "advantage_plain.h"

#include <type_traits>

#include "parallel.h"
#include "steps.h"

namespace rf {
namespace RF_ISA {
namespace {

// ---- [length, rows] ----------------------------------------------------------------------------------------

// One step of n rows: `next` and `carry` are value and advantage of the step behind, and become this one's.
template <class T, class Real>
struct Step {
  const T* r;
  const T* v;
  const uint8_t* ends;
  Real* advantages;
  Real* returns;
  Real gamma, decay;

  void rows(int64_t first, int64_t n, Real* next, Real* carry) const {
    for (int64_t i = first; i < n; ++i) {
      const bool on = ends == nullptr || ends[i] == 0;
      const Real value = real(v[i]);
      const Real delta = real(r[i]) + (on ? gamma * next[i] : Real(0)) - value;
      carry[i] = delta + (on ? decay * carry[i] : Real(0));
      next[i] = value;
      advantages[i] = carry[i];
      returns[i] = carry[i] + value;
    }
  }

  // The same over lanes; returns the rows that are done.
  int64_t vectors(int64_t n, Real* next, Real* carry) const {
    int64_t i = 0;
    if constexpr (std::is_same_v<Real, float>) {
      for (; i + kLanes <= n; i += kLanes) {
        const f32v value = load(v + i);
        f32v behind = splat(gamma) * load(next + i), kept = splat(decay) * load(carry + i);
        if (ends != nullptr && !all<0>(ends + i)) {
          const i32v stops = load_flags(ends + i);
          behind = select(stops, f32v{}, behind), kept = select(stops, f32v{}, kept);
        }
        const f32v advantage = load(r + i) + behind - value + kept;
        store(next + i, value);
        store(carry + i, advantage);
        store(advantages + i, advantage);
        store(returns + i, advantage + value);
      }
    }
    return i;
  }
};

template <class T, class Real>
void by_time_of(const PlainGaeArgs& args) {
  constexpr int64_t kBlock = 256;  // rows whose state stays in L1
  const T* last = static_cast<const T*>(args.last_values);
  const int64_t rows = args.rows;
  parallel_for((rows + kBlock - 1) / kBlock, rows * args.length, args.threads, [&](int64_t block) {
    const int64_t first = block * kBlock, n = rows - first < kBlock ? rows - first : kBlock;
    Real next[kBlock], carry[kBlock];
    for (int64_t i = 0; i < n; ++i) next[i] = last != nullptr ? real(last[first + i]) : Real(0), carry[i] = 0;
    for (int64_t t = args.length; t-- > 0;) {
      const int64_t begin = t * rows + first;
      const Step<T, Real> step{typed<T>(args.rewards, begin),       typed<T>(args.values, begin),
                               from(args.terminated, begin),        typed<Real>(args.advantages, begin),
                               typed<Real>(args.returns, begin),    static_cast<Real>(args.gamma),
                               static_cast<Real>(args.decay)};
      step.rows(step.vectors(n, next, carry), n, next, carry);
    }
  });
}

// ---- [rows, length] with the value behind every step --------------------------------------------------------

struct Ahead {
  const float* r;
  const float* v;
  const float* next;
  const uint8_t* terminated;
  const uint8_t* done;
  float gamma;

  f32v delta(int64_t t) const {
    f32v behind = load(next + t);
    if (!all<0>(terminated + t)) behind = select(load_flags(terminated + t), f32v{}, behind);
    return splat(gamma) * behind + load(r + t) - load(v + t);
  }
  float delta_at(int64_t t) const { return gamma * (terminated[t] ? 0.0f : next[t]) + r[t] - v[t]; }
};

void ahead(const PlainGaeArgs& args) {
  const float decay = static_cast<float>(args.decay);
  const Powers powers(decay);
  parallel_for(args.rows, args.rows * args.length, args.threads, [&](int64_t row) {
    const int64_t begin = row * args.length, blocks = args.length / kLanes * kLanes;
    const Ahead in{typed<float>(args.rewards, begin),     typed<float>(args.values, begin),
                   typed<float>(args.next_values, begin), from(args.terminated, begin),
                   from(args.done, begin),                static_cast<float>(args.gamma)};
    float* advantages = typed<float>(args.advantages, begin);
    float* returns = typed<float>(args.returns, begin);
    float carry = 0;
    for (int64_t t = args.length; t-- > blocks;) {
      carry = mul_add(in.done[t] ? 0.0f : decay, carry, in.delta_at(t));
      advantages[t] = carry, returns[t] = carry + in.v[t];
    }
    f32v behind = splat(carry);
    for (int64_t t = blocks; (t -= kLanes) >= 0;) {
      const f32v b = in.delta(t);
      const f32v found = all<0>(in.done + t)
                             ? compose(powers, b, behind)
                             : compose(select(load_flags(in.done + t), f32v{}, splat(decay)), b, behind);
      behind = first_lane(found);
      store(advantages + t, found);
      store(returns + t, found + load(in.v + t));
    }
  });
}

void by_time(const PlainGaeArgs& args) { RF_BY_DTYPE(by_time_of, args.dtype) }

}  // namespace

extern const PlainAdvantage plain_advantage_table;
const PlainAdvantage plain_advantage_table = {by_time, ahead};

}  // namespace RF_ISA
}  // namespace rf
