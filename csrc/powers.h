// Exponentials of a row's logits as multiples of one power of two, which stands in for the largest logit's: no
// logit is subtracted from another, so that nothing but the last factors rounds, however far apart they are.
//
//   u log2(e) / T = n + r, n the nearest multiple of 1 / kLanes      exp(u / T) = 2^n 2^r = s y 2^whole
//
// s is a table of 2^(k / kLanes) in one register with the whole part of n added to its exponent, y = 2^r a short
// polynomial. Eleven vector operations for a term of a sum, half of what exp alone takes without the table.
// Included by sources that are compiled per instruction set.
#pragma once

#include <cmath>

#include "logprob_lanes.h"

namespace rf {
namespace RF_ISA {
namespace {

#if defined(__AVX2__) && defined(__FMA__)
#define RF_POWERS 1

// The bits of 2^(k / kLanes), less k where n kLanes, moved up, will add it.
#if defined(__AVX512F__)
constexpr int kExponent = 19;  // moves the whole part of n, in n kLanes, to a float's exponent
constexpr uint32_t kRoots[kLanes] = {
    0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
    0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
#else
constexpr int kExponent = 20;
constexpr uint32_t kRoots[kLanes] = {
    0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
#endif
static_assert(kLanes << kExponent == 1 << 23, "a root in every lane");

struct Powers {
  f32v high, low;        // log2(e) / T
  f32v largest, lowest;  // below the lowest exp counts as 0
  u32v roots;
  double whole;

  // Whether n fits beside its fraction, with room for what is far below the largest and dropped.
  static bool hold(double largest, const Row& row) { return std::fabs(largest * row.log2_t) < 131072.0; }

  Powers(double largest, const Row& row)
      : high(row.log2_high),
        low(row.log2_low),
        largest(splat(static_cast<float>(largest))),
        whole(std::nearbyint(largest * row.log2_t)) {
    lowest = splat(static_cast<float>((whole - 125.0) * row.t_log2));
    std::memcpy(&roots, kRoots, sizeof(roots));
    roots -= static_cast<uint32_t>(static_cast<int32_t>(whole)) << 23;
  }
};

// exp(u / T) = y s 2^whole. Where dropped, far below the largest logit or, with `ties`, equal to it, s y is 0 and gap
// finite. NaN stays NaN.
struct Factors {
  f32v y, s, gap;  // gap = u - largest
};

inline f32v polynomial(f32v r) {
#if defined(__AVX512F__)
  f32v p = splat(0.0555021353f);  // |r| <= 1/32, relative error 1.6e-9
  p = fused(p, r, splat(0.240234286f));
#else
  f32v p = splat(0.00961765368f);  // |r| <= 1/16, relative error 6e-10
  p = fused(p, r, splat(0.0555105954f));
  p = fused(p, r, splat(0.240226507f));
#endif
  return fused(p, r, splat(0.693147182f));
}

#if defined(__AVX512F__)
template <bool ties>
__attribute__((always_inline)) inline Factors factors(f32v u, const Powers& by, f32v& equal) {
  const __m512 x = reinterpret_cast<__m512>(u);
  __mmask16 kept = _mm512_cmp_ps_mask(x, reinterpret_cast<__m512>(by.lowest), _CMP_NLT_UQ);
  if (ties) {
    const __m512 top = reinterpret_cast<__m512>(by.largest), one = reinterpret_cast<__m512>(splat(1.0f));
    const __m512 count = reinterpret_cast<__m512>(equal);
    equal = reinterpret_cast<f32v>(_mm512_mask_add_ps(count, _mm512_cmp_ps_mask(x, top, _CMP_EQ_OQ), count, one));
    kept = _mm512_mask_cmp_ps_mask(kept, x, top, _CMP_NEQ_UQ);
  }
  const f32v shifter = splat(1.5f * static_cast<float>(1 << kExponent));
  const f32v t = fused(u, by.high, shifter), n = t - shifter;
  const f32v r = fused(u, by.low, fused(u, by.high, -n));
  const __m512i index = reinterpret_cast<__m512i>(t);
  const __m512i root = _mm512_maskz_permutexvar_epi32(0xffff, index, reinterpret_cast<__m512i>(by.roots));
  const __m512i whole = _mm512_maskz_slli_epi32(0xffff, index, kExponent);
  return {reinterpret_cast<f32v>(_mm512_maskz_fmadd_ps(kept, reinterpret_cast<__m512>(polynomial(r)),
                                                       reinterpret_cast<__m512>(r),
                                                       reinterpret_cast<__m512>(splat(1.0f)))),
          reinterpret_cast<f32v>(_mm512_maskz_add_epi32(kept, root, whole)),
          reinterpret_cast<f32v>(_mm512_maskz_sub_ps(kept, x, reinterpret_cast<__m512>(by.largest)))};
}
#else
template <bool ties>
__attribute__((always_inline)) inline Factors factors(f32v u, const Powers& by, f32v& equal) {
  const f32v x = max(by.lowest, u);  // the second, u, where it is NaN
  i32v gone = u < by.lowest;
  if (ties) {
    const i32v tie = u == by.largest;
    equal += reinterpret_cast<f32v>(tie & reinterpret_cast<i32v>(splat(1.0f)));
    gone |= tie;
  }
  const f32v shifter = splat(1.5f * static_cast<float>(1 << kExponent));
  const f32v t = fused(x, by.high, shifter), n = t - shifter;
  const f32v r = fused(x, by.low, fused(x, by.high, -n));
  const __m256i index = reinterpret_cast<__m256i>(t);
  const i32v root = reinterpret_cast<i32v>(
      _mm256_permutevar8x32_epi32(reinterpret_cast<__m256i>(by.roots), index));
  const i32v s = (root + (reinterpret_cast<i32v>(t) << kExponent)) & ~gone;
  return {fused(polynomial(r), r, splat(1.0f)), reinterpret_cast<f32v>(s), x - by.largest};
}
#endif
#else
#define RF_POWERS 0
#endif

}  // namespace
}  // namespace RF_ISA
}  // namespace rf
