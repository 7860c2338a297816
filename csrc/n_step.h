// n-step returns in a constant number of operations a step, whatever n.
//
// A segment (what lies between two cuts) is divided into blocks of n counting steps. The window of the j-th step of
// a block is the rest of its block and the first j steps of the next one, so suffix sums, taken right to left, and
// prefix sums, taken left to right beside the writing, make every window. Nothing is subtracted: no cancellation,
// and a NaN stays in the windows that hold it. A segment's last reward carries the discounted value behind it.
//
// Roofline: r, V, mask read and y written, 13 bytes a step in float32, each read two or three times from cache, for
// 6 flops in two chains of dependent multiply-adds: bound by their latency. Few steps side by side are vectors of
// n_step_lanes.h; n = 1 behind its step is one vector pass. Included by q_learning.cpp alone, once per instruction set.
#pragma once

#include "buffer.h"
#include "memory.h"
#include "n_step_lanes.h"
#include "parallel.h"
#include "q_learning.h"

namespace rf {
namespace RF_ISA {
namespace {

// gamma^0 .. gamma^n
inline void fill_powers(double* powers, double gamma, int64_t n) {
  double power = 1;
  for (int64_t i = 0; i <= n; ++i, power *= gamma) powers[i] = power;
}

// Counting steps of one segment, [begin, end); direction +1 or -1.
template <int direction>
struct Walk {
  const uint8_t* mask;
  int64_t begin, end;

  bool inside(int64_t t) const { return direction > 0 ? t < end : t >= begin; }
  int64_t first() const { return settle(direction > 0 ? begin : end - 1); }
  int64_t next(int64_t t) const { return settle(t + direction); }

 private:
  int64_t settle(int64_t t) const {
    while (inside(t) && mask != nullptr && !mask[t]) t += direction;
    return t;
  }
};

// done(t, sum, full, farthest, beyond) for every step of the segment, in its direction: the window's sum
// sum_i gamma^i x(t + i), whether it has n steps, the last of them, and the step behind that (not inside: none).
template <int direction, class Real, class X, class Done>
void windows(const Walk<direction>& walk, int64_t n, const double* powers, Real* scratch, const X& x, const Done& done) {
  const Walk<-direction> back{walk.mask, walk.begin, walk.end};
  for (int64_t a = walk.first(); walk.inside(a);) {
    int64_t last = a, size = 1;
    for (int64_t t = walk.next(a); size < n && walk.inside(t); t = walk.next(t), ++size) last = t;
    double suffix = 0;
    for (int64_t t = last;; t = back.next(t)) {
      suffix = x(t) + powers[1] * suffix;
      scratch[t] = static_cast<Real>(suffix);
      if (t == a) break;
    }
    const int64_t after = walk.next(last);
    int64_t farthest = last, beyond = after, taken = 0;
    double prefix = 0;
    for (int64_t t = a, j = 0;; t = walk.next(t), ++j) {
      const double sum = static_cast<double>(scratch[t]) + (taken > 0 ? powers[size - j] * prefix : 0.0);
      done(t, sum, size == n && taken == j, farthest, beyond);
      if (t == last) break;
      if (walk.inside(beyond)) {
        prefix += powers[taken] * x(beyond);
        ++taken;
        farthest = beyond;
        beyond = walk.next(beyond);
      }
    }
    a = after;
  }
}

// body(begin, end, last, cut): each segment of a row and its last counting step; cut 0: the row ended, 1: truncated,
// 2: terminated. Segments without counting steps are left out.
template <class Body>
void for_segments(const NStepInput& in, int64_t begin, int64_t end, const Body& body) {
  Cuts cuts(in.terminated, in.truncated, in.mask, end);
  for (int64_t start = begin; start < end;) {
    const int64_t stop = cuts.from(start);
    if (stop == end) {
      const int64_t last = in.mask == nullptr ? end - 1 : find_last_set(in.mask, start, end);
      if (last >= start) body(start, end, last, 0);
      return;
    }
    body(start, stop + 1, stop, in.terminated != nullptr && in.terminated[stop] ? 2 : 1);
    start = stop + 1;
  }
}

template <class Body>
void for_rows_of(const NStepInput& in, const Body& body) {
  const Sequences& rows = in.sequences;
  parallel_for(rows.rows, rows.elements(), in.threads, [&](int64_t i) { body(i, rows.begin(i), rows.end(i)); });
}

template <class Real>
void clear_masked(const NStepInput& in, Real* out, int64_t begin, int64_t end) {
  for (int64_t t = begin; in.mask != nullptr && t < end; ++t) {
    if (!in.mask[t]) out[t] = 0;
  }
}

// Lanes whose byte is not 0 and that are inside; a missing array is all `missing`.
inline i32v flags_at(const uint8_t* flags, int64_t t, int64_t count, bool missing) {
  if (flags == nullptr) return i32v{} - static_cast<int32_t>(missing);
  if (count >= kLanes) return load_flags(flags + t);
  i32v out{};
  for (int64_t i = 0; i < count; ++i) out[i] = -static_cast<int32_t>(flags[t + i] != 0);
  return out;
}
// y_t = r_t + gamma V'_t, V' behind its step: nothing is carried, so vectors.
template <class T>
void one_step_row(const NStepArgs& args, const T* r, const T* v, float* out, int64_t begin, int64_t end) {
  const T* boot = static_cast<const T*>(args.bootstrap_values);
  const NStepInput& in = args.in;
  const f32v gamma = splat(static_cast<float>(in.gamma)), nothing{};
  for (int64_t t = begin; t < end; t += kLanes) {
    const int64_t count = end - t;
    f32v behind = load_some(v + t, count);
    if (boot != nullptr) behind = select(flags_at(in.truncated, t, count, false), load_some(boot + t, count), behind);
    behind = select(flags_at(in.terminated, t, count, false), nothing, behind);
    f32v found = mul_add(gamma, behind, load_some(r + t, count));
    found = select(flags_at(in.mask, t, count, true), found, nothing);
    store_some(out + t, count, found);
  }
}
inline void one_step_row(const NStepArgs&, const double*, const double*, double*, int64_t, int64_t) {}

template <class T, class Real>
void n_step_dtype(const NStepArgs& args) {
  const NStepInput& in = args.in;
  const T* r = static_cast<const T*>(args.rewards);
  const T* v = static_cast<const T*>(args.values);
  const T* last_values = static_cast<const T*>(args.last_values);
  const T* boot = static_cast<const T*>(args.bootstrap_values);
  Real* out = static_cast<Real*>(args.out);
  prefer_large_pages(out, static_cast<std::size_t>(in.sequences.elements()) * sizeof(Real));
  if (sizeof(Real) == sizeof(float) && in.n == 1 && in.behind && last_values == nullptr) {
    return for_rows_of(in, [&](int64_t, int64_t begin, int64_t end) { one_step_row(args, r, v, out, begin, end); });
  }
  const Buffer<double> powers(in.n + 1);
  fill_powers(powers.data, in.gamma, in.n);
  for_rows_of(in, [&](int64_t i, int64_t row_begin, int64_t row_end) {
    clear_masked(in, out, row_begin, row_end);
    [[maybe_unused]] Gaps<T> gaps;
    for_segments(in, row_begin, row_end, [&](int64_t begin, int64_t end, int64_t last, int cut) {
      double tail = in.behind && cut < 2 ? real(v[last]) : 0.0;
      if (cut == 1 && boot != nullptr) tail = real(boot[last]);
      if (cut == 0 && last_values != nullptr) tail = real(last_values[i]);
      const double bonus = cut == 2 ? 0.0 : in.gamma * tail;
      if constexpr (sizeof(Real) == sizeof(float)) {
        const int64_t first = in.mask == nullptr ? begin : find_set(in.mask, begin, end);
        if (in.n <= kShort && all_set(in.mask, first, last)) {
          return short_windows(r, v, out, first, last, in.n, in.gamma, bonus, in.behind);
        }
        if (in.n <= kShort) return gaps.run(r, v, in.mask, out, first, last, in.n, in.gamma, bonus, in.behind);
      }
      const auto x = [&](int64_t t) { return static_cast<double>(real(r[t])) + (t == last ? bonus : 0.0); };
      const Walk<1> walk{in.mask, begin, end};
      windows(walk, in.n, powers.data, out, x,
              [&](int64_t t, double sum, bool full, int64_t farthest, int64_t beyond) {
                if (full && farthest != last) sum += powers.data[in.n] * real(v[in.behind ? farthest : beyond]);
                out[t] = static_cast<Real>(sum);
              });
    });
  });
}

// The reward at s is in the windows of the n steps up to s: dL/dr_s is the sum of the same windows run backwards.
template <class Real>
void n_step_backward_dtype(const NStepBackwardArgs& args) {
  const NStepInput& in = args.in;
  const Real* g = static_cast<const Real*>(args.upstream);
  Real* d_rewards = static_cast<Real*>(args.d_rewards);
  Real* d_values = static_cast<Real*>(args.d_values);
  Real* d_last = static_cast<Real*>(args.d_last_values);
  Real* d_boot = static_cast<Real*>(args.d_bootstrap_values);
  const Buffer<double> powers(in.n + 1);
  fill_powers(powers.data, in.gamma, in.n);
  for_rows_of(in, [&](int64_t i, int64_t row_begin, int64_t row_end) {
    clear_masked(in, d_rewards, row_begin, row_end);
    for (int64_t t = row_begin; t < row_end; ++t) d_values[t] = 0;
    for (int64_t t = row_begin; d_boot != nullptr && t < row_end; ++t) d_boot[t] = 0;
    if (d_last != nullptr) d_last[i] = 0;
    for_segments(in, row_begin, row_end, [&](int64_t begin, int64_t end, int64_t last, int cut) {
      int64_t right = -1;
      const auto x = [&](int64_t t) { return static_cast<double>(g[t]); };
      const Walk<-1> walk{in.mask, begin, end};
      windows(walk, in.n, powers.data, d_rewards, x,
              [&](int64_t s, double sum, bool full, int64_t farthest, int64_t) {
                d_rewards[s] = static_cast<Real>(sum);
                if (s != last) {
                  const Real slope = full ? static_cast<Real>(powers.data[in.n] * g[farthest]) : Real(0);
                  d_values[in.behind ? s : right] = slope;
                } else if (cut < 2) {
                  const Real slope = static_cast<Real>(in.gamma * sum);
                  if (cut == 1 && args.has_bootstrap) {
                    d_boot[s] = slope;
                  } else if (cut == 0 && args.has_last) {
                    d_last[i] = slope;
                  } else if (in.behind) {
                    d_values[s] = slope;
                  }
                }
                right = s;
              });
    });
  });
}

}  // namespace
}  // namespace RF_ISA
}  // namespace rf
