// One vector of a row's logits: cap, scale, exponential; and how parts of a row fold. Included by logprob_fold.h,
// once per instruction set.
#pragma once

#include <cmath>

#include "logprob.h"
#include "exp.h"

namespace rf {
namespace RF_ISA {
namespace {

// The logits of a block: 8 KiB of them with the widest vectors. It stays in any L1, with what is prefetched behind it;
// a lane of a sum adds up at most 128 terms.
template <class T>
constexpr int64_t kBlock = 128 * RF_VECTOR_BYTES / static_cast<int64_t>(sizeof(T));
// How far ahead of what it adds up a loop prefetches, in bytes, into L1: two blocks. Measured best of half to eight.
constexpr int64_t kAhead = 16384;
// The unit of parallel work; a 128k vocabulary has 8. Smaller rows share a unit.
constexpr int64_t kChunk = 16384;
constexpr double kMinusInfinity = -__builtin_inf();
constexpr float kForbidden = -__builtin_inff();

// ---- one element vector: cap, scale, difference to the largest -------------------------------------------

// What a row needs to turn logits into exponents. 1 / T is held in two floats: one alone would be off by up to
// 6e-8, the same for every logit, and so would not average out.
struct Row {
  double inverse_t, log2_t, t_log2;              // 1 / T, log2(e) / T and its inverse
  f32v inverse_high, inverse_low, softcap;
  f32v log2_high, log2_low, lowest;  // log2(e) / T likewise, and the gap below which exp is 0
  double floor;                      // logits below it are dropped where `floored`

  Row(double temperature, double softcap, double floor = kMinusInfinity)
      : inverse_t(1.0 / temperature), softcap(splat(static_cast<float>(softcap))), floor(floor) {
    log2_t = 1.4426950408889634 * inverse_t;
    t_log2 = 0.6931471805599453 * temperature;
    split(inverse_t, inverse_high, inverse_low);
    split(log2_t, log2_high, log2_low);
    lowest = splat(static_cast<float>(-126.0 * t_log2));
  }

  static void split(double x, f32v& high, f32v& low) {
    const float top = static_cast<float>(x);
    high = splat(top);
    low = splat(static_cast<float>(x - static_cast<double>(top)));
  }
};

inline Row row_of(const LogprobInput& in, int64_t i) {
  return Row(in.temperatures != nullptr ? in.temperatures[i] : in.temperature, in.softcap,
             in.floors != nullptr ? in.floors[i] : kMinusInfinity);
}

// A dropped logit is a forbidden one. NaN is below nothing, so it stays and shows.
template <bool floored>
inline f32v kept(f32v x, f32v floor) {
  return floored ? select(x < floor, splat(kForbidden), x) : x;
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
  return x == splat(kForbidden) ? x : row.softcap * tanh;
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

// Two vectors of x[0 .. 2 kLanes), in the order that costs least: sums and maxima have none to keep, as long as it
// is the same on every run. Of bfloat16 one load gives the elements with even index and those with odd index, whose
// bits stand where float32 has them; widening would take a shuffle for every vector.
struct Pair {
  f32v first, second;
};

template <class T>
inline Pair load_pair(const T* x) {
  return {load(x), load(x + kLanes)};
}
inline Pair load_pair(const bf16* x) {
  u32v bits;
  std::memcpy(&bits, x, sizeof(bits));
  return {reinterpret_cast<f32v>(bits << 16), reinterpret_cast<f32v>(bits & 0xffff0000u)};
}

// The cache lines that are kAhead behind these 2 kLanes elements.
template <class T>
inline void prefetch_pair(const T* x) {
  for (int64_t ahead = 0; ahead < 2 * kLanes * static_cast<int64_t>(sizeof(T)); ahead += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(x) + kAhead + ahead, 0, 3);
  }
}

// Back to where load_pair took them from.
template <class T>
inline void store_pair(T* x, Pair v) {
  store(x, v.first);
  store(x + kLanes, v.second);
}
inline void store_pair(bf16* x, Pair v) {
#if defined(__AVX512BF16__)
  static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i by_half, turns;
  const __m512bh rounded = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(v.second), reinterpret_cast<__m512>(v.first));
  std::memcpy(&by_half, &rounded, sizeof(by_half));
  std::memcpy(&turns, order, sizeof(turns));
  const __m512i bits = _mm512_maskz_permutexvar_epi16(0xffffffffu, turns, by_half);
#else
  const auto round = [](f32v y) {
    const u32v raw = reinterpret_cast<u32v>(y);
    const u32v up = raw + 0x7fffu + ((raw >> 16) & 1u);
    return reinterpret_cast<u32v>(y != y) ? (u32v{} + 0x7fc00000u) : up;
  };
  const u32v bits = (round(v.first) >> 16) | (round(v.second) & 0xffff0000u);
#endif
  std::memcpy(x, &bits, sizeof(bits));
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

}  // namespace
}  // namespace RF_ISA
}  // namespace rf
