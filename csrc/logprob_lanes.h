// Sums of exponentials over one row's logits: element vectors, blocks, chunks, and how they fold. Included by
// logprob.cpp, once per instruction set.
#pragma once

#include <cmath>

#include "logprob.h"
#include "simd.h"

namespace rf {
namespace RF_ISA {
namespace {

// 8 KiB of float32: a block and the block being prefetched fit in any L1 with room to spare.
constexpr int64_t kBlock = 2048;
// The unit of parallel work; a 128k vocabulary has 8. Smaller rows share a unit.
constexpr int64_t kChunk = 8 * kBlock;
constexpr double kMinusInfinity = -__builtin_inf();

// ---- one element vector: cap, scale, difference to the largest -------------------------------------------

// What a row needs to turn logits into exponents. 1 / T is held in two floats: one alone would be off by up to
// 6e-8, the same for every logit, and so would not average out.
struct Row {
  double inverse_t;
  f32v inverse_high, inverse_low, softcap;
  f32v log2_high, log2_low, lowest;  // log2(e) / T likewise, and the gap below which exp is 0

  Row(double temperature, double softcap)
      : inverse_t(1.0 / temperature), softcap(splat(static_cast<float>(softcap))) {
    split(inverse_t, inverse_high, inverse_low);
    const double log2_t = 1.4426950408889634 * inverse_t;
    split(log2_t, log2_high, log2_low);
    lowest = splat(static_cast<float>(-126.0 / log2_t));
  }

  static void split(double x, f32v& high, f32v& low) {
    const float top = static_cast<float>(x);
    high = splat(top);
    low = splat(static_cast<float>(x - static_cast<double>(top)));
  }
};

inline Row row_of(const LogprobInput& in, int64_t i) {
  return Row(in.temperatures != nullptr ? in.temperatures[i] : in.temperature, in.softcap);
}

// tanh(a): an odd polynomial (relative error 3e-9) where 1 - e would cancel, (1 - e) / (1 + e) with
// e = exp(-2 |a|) elsewhere. A logit of -inf, a forbidden token, stays one.
inline f32v cap(f32v x, const Row& row) {
  const f32v a = x / row.softcap, size = abs(a), z = a * a;
  f32v p = splat(-0.00589515765f);
  p = p * z + splat(0.0207959713f);
  p = p * z + splat(-0.0537838302f);
  p = p * z + splat(0.133319241f);
  p = p * z + splat(-0.33333298f);
  const f32v near_zero = a * z * p + a;
  const f32v e = exp_nonpositive(splat(-2.0f) * size);
  const f32v far = (splat(1.0f) - e) / (splat(1.0f) + e);
  const f32v tanh = size < splat(0.6f) ? near_zero : (a < splat(0.0f) ? -far : far);
  return x == splat(-__builtin_inff()) ? x : row.softcap * tanh;
}

// d cap / d x = 1 - tanh^2 = 4 e / (1 + e)^2, without cancellation.
inline f32v cap_slope(f32v x, const Row& row) {
  const f32v e = exp_nonpositive(splat(-2.0f) * abs(x / row.softcap));
  return splat(4.0f) * e / ((splat(1.0f) + e) * (splat(1.0f) + e));
}

template <bool capped>
inline f32v logit(f32v x, const Row& row) {
  return capped ? cap(x, row) : x;
}

// (u - largest) / T, at least -200: there exp is 0, and 0 * d is 0 for a forbidden token too. The low part of
// 1 / T joins behind the bound, since it may be 0 and a forbidden token's gap is infinite.
inline f32v difference(f32v u, f32v largest, const Row& row) {
  const f32v gap = u - largest, d = gap * row.inverse_high;
  return d < splat(-200.0f) ? splat(-200.0f) : d + gap * row.inverse_low;
}

template <bool capped, class T>
double capped_logit(T x, const Row& row) {
  return static_cast<double>(logit<capped>(splat(to_float(x)), row)[0]);
}
template <bool capped>
double capped_logit(double x, double softcap) {
  return capped && x != kMinusInfinity ? softcap * std::tanh(x / softcap) : x;
}

// ---- folding ---------------------------------------------------------------------------------------------

// sum_j exp(d_j) = ties + rest, where the ties are the logits equal to the largest: apart from them nothing is
// added to 1, so a confident row keeps log(1 + rest) to full relative accuracy. moment = sum_j exp(d_j) d_j.
struct Fold {
  double largest = kMinusInfinity, ties = 0, rest = 0, moment = 0;
};

inline void merge(Fold& into, const Fold& part, double inverse_t) {
  const bool above = part.largest > into.largest;
  const Fold top = above ? part : into, low = above ? into : part;
  into = top;
  if (low.largest == top.largest) {
    into.ties += low.ties;
    into.rest += low.rest;
    into.moment += low.moment;
    return;
  }
  if (low.largest == kMinusInfinity) {  // nothing allowed there: 0, or NaN for NaN logits
    into.rest += low.rest;
    return;
  }
  const double gap = (low.largest - top.largest) * inverse_t;
  const double delta = gap < -800.0 ? -800.0 : gap, factor = std::exp(delta);
  into.rest += factor * (low.ties + low.rest);
  into.moment += factor * (low.moment + delta * (low.ties + low.rest));
}

template <class T>
float block_max(const T* x, int64_t n) {
  f32v m[4];
  for (f32v& lane : m) lane = splat(-__builtin_inff());
  int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
    for (int u = 0; u < 4; ++u) m[u] = max(load(x + j + u * kLanes), m[u]);
  }
  for (; j + kLanes <= n; j += kLanes) m[0] = max(load(x + j), m[0]);
  if (j < n) m[1] = max(load_tail(x + j, n - j, -__builtin_inff()), m[1]);
  return max_lanes(max(max(m[0], m[1]), max(m[2], m[3])));
}

// d = (u - largest) / T and exp(d); d is some finite number where exp(d) is 0.
inline Exponential exponential(f32v u, f32v largest, const Row& row) {
#if RF_EXP_SCALED
  return exp_scaled(u - largest, row.log2_high, row.log2_low, row.inverse_high, row.lowest);
#else
  const f32v d = difference(u, largest, row);
  return {exp_nonpositive(d), d};
#endif
}

template <bool entropy, bool ties>
struct Sums {
  f32v rest{}, moment{}, equal{};

  inline void add(f32v u, f32v largest, const Row& row) {
    const Exponential found = exponential(u, largest, row);
    f32v e = found.e;
    const f32v d = found.d;
    if (ties) {
      const i32v tie = u == largest;
      equal += tie ? splat(1.0f) : splat(0.0f);
      e = tie ? splat(0.0f) : e;
    }
    rest += e;
    if (entropy) moment = e * d + moment;
  }
};

// Sums over one block, prefetching the next but one into L2: measured best, a tenth faster than the next into L1. Per-block sums are float32, everything above is double.
template <bool entropy, bool capped, bool ties, class T>
Fold block_sums(const T* x, int64_t n, double largest, const Row& row) {
  // A block of forbidden tokens has no largest; any finite one gives exp(-inf) = 0, and NaN stays NaN.
  const f32v reference = splat(largest == kMinusInfinity ? 0.0f : static_cast<float>(largest));
  Sums<entropy, ties> sums[2];
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
    for (int u = 0; u < 2; ++u) {
      __builtin_prefetch(x + j + u * kLanes + 2 * kBlock, 0, 2);
      sums[u].add(logit<capped>(load(x + j + u * kLanes), row), reference, row);
    }
  }
  if (j + kLanes <= n) {
    sums[0].add(logit<capped>(load(x + j), row), reference, row);
    j += kLanes;
  }
  if (j < n) sums[1].add(logit<capped>(load_tail(x + j, n - j, -__builtin_inff()), row), reference, row);
  Fold fold;
  fold.largest = largest;
  fold.ties = ties ? static_cast<double>(sum_lanes(sums[0].equal + sums[1].equal)) : 0.0;
  fold.rest = static_cast<double>(sum_lanes(sums[0].rest + sums[1].rest));
  fold.moment = entropy ? static_cast<double>(sum_lanes(sums[0].moment + sums[1].moment)) : 0.0;
  return fold;
}

template <bool entropy, bool capped, class T>
Fold fold_chunk(const T* x, int64_t n, const Row& row, double) {
  Fold fold;
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t size = n - j < kBlock ? n - j : kBlock;
    const double top = static_cast<double>(logit<capped>(splat(block_max(x + j, size)), row)[0]);
    // Most blocks hold no new largest logit, and those need not look for ties.
    if (top < fold.largest) {
      merge(fold, block_sums<entropy, capped, false>(x + j, size, fold.largest, row), row.inverse_t);
    } else {
      merge(fold, block_sums<entropy, capped, true>(x + j, size, top, row), row.inverse_t);
    }
  }
  return fold;
}

template <bool entropy, bool capped>
Fold fold_chunk(const double* x, int64_t n, const Row& row, double softcap) {
  Fold fold;
  for (int64_t j = 0; j < n; ++j) {
    const double u = capped_logit<capped>(x[j], softcap);
    if (u > fold.largest) fold.largest = u;
  }
  for (int64_t j = 0; j < n; ++j) {
    const double u = capped_logit<capped>(x[j], softcap);
    if (u == kMinusInfinity) continue;
    if (u == fold.largest) {
      fold.ties += 1;
      continue;
    }
    const double d = (u - fold.largest) * row.inverse_t, e = std::exp(d);
    fold.rest += e;
    if (entropy && e != 0) fold.moment += e * d;
  }
  return fold;
}

}  // namespace
}  // namespace RF_ISA
}  // namespace rf
