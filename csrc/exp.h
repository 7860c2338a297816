// The exponential over the lanes of a vector. Included by sources that are compiled per instruction set.
#pragma once

#include "simd.h"

namespace rf {
namespace RF_ISA {

// exp(x), relative error below 1.3e-7 (one unit in the last place). x = n ln2 + r with |r| <= ln2 / 2 and
// exp(r) = 1 + r + r^2 p(r), p a degree-4 polynomial fitted to a relative error of 3e-9. Below -87.3 the
// result is 0, above 88.7 it is inf, NaN stays NaN.
inline f32v exp(f32v x) {
  const f32v low = splat(-87.33654f), high = splat(88.72283f);
  const f32v clamped = x < low ? low : (x > high ? high : x);
  const f32v shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  const f32v shifted = clamped * splat(1.44269504f) + shifter;
  const f32v n = shifted - shifter;
  const f32v r = (clamped - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
  f32v p = splat(0.00138146f);
  p = p * r + splat(0.00836872f);
  p = p * r + splat(0.04166839f);
  p = p * r + splat(0.16666521f);
  p = p * r + splat(0.49999993f);
  const f32v y = (p * (r * r) + r) + splat(1.0f);
  // Two factors, since 2^128 is no float.
  const i32v exponent = reinterpret_cast<i32v>(shifted) - 0x4b400000;
  const i32v half = exponent >> 1;
  const f32v scale = reinterpret_cast<f32v>((half + 127) << 23) * y;
  const f32v result = scale * reinterpret_cast<f32v>((exponent - half + 127) << 23);
  const f32v bounded = x > high ? splat(__builtin_inff()) : result;
  return x < low ? splat(0.0f) : bounded;
}

// exp(x) for x <= 0, the softmax case: as accurate, half the work. Below -87.3 the result is 0, NaN stays NaN.
inline f32v exp_nonpositive(f32v x) {
  const f32v low = splat(-87.33654f);
  const f32v clamped = max(low, x);
  const f32v shifter = splat(12582912.0f);
  const f32v shifted = clamped * splat(1.44269504f) + shifter;
  const f32v n = shifted - shifter;
  const f32v r = (clamped - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
  f32v p = splat(0.00138146f);
  p = p * r + splat(0.00836872f);
  p = p * r + splat(0.04166839f);
  p = p * r + splat(0.16666521f);
  p = p * r + splat(0.49999993f);
  const f32v y = (p * r + splat(1.0f)) * r + splat(1.0f);
#if defined(__AVX512F__)
  const f32v result =
      reinterpret_cast<f32v>(_mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(y), reinterpret_cast<__m512>(n)));
#else
  // n is in [-126, 0]; the shift drops all but the exponent's bits.
  const f32v result = reinterpret_cast<f32v>((reinterpret_cast<i32v>(shifted) + 127) << 23) * y;
#endif
  return x < low ? splat(0.0f) : result;
}

struct Exponential {
  f32v e, d;
};

#if defined(__FMA__) || defined(__aarch64__)
// d = gap * scale and e = exp(d) for gap <= 0, with scale log2(e) = high + low: as accurate, in two thirds of the
// operations. gap (high + low) = n + r with |r| <= 1/2, r exact but for one rounding since a fused multiply-add makes
// it, and 2^r = 1 + r (ln2 + r q(r)), q a degree-4 polynomial fitted to a relative error of 3e-9. Both are exactly 0
// for gap < lowest = -126 / (high + low), -inf among them; NaN stays NaN.
inline Exponential exp_scaled(f32v gap, f32v high, f32v low, f32v scale, f32v lowest) {
  const f32v shifter = splat(12582912.0f);
  const f32v shifted = gap * high + shifter;
  const f32v n = shifted - shifter;
  const f32v r = fused(gap, low, fused(gap, high, -n));
  f32v q = splat(1.53243149e-4f);
  q = q * r + splat(1.33909588e-3f);
  q = q * r + splat(9.61851794e-3f);
  q = q * r + splat(5.55035956e-2f);
  q = q * r + splat(2.40226477e-1f);
  q = q * r + splat(6.93147182e-1f);
  const f32v y = q * r + splat(1.0f);
#if defined(__AVX512F__)
  const __mmask16 kept =
      _mm512_cmp_ps_mask(reinterpret_cast<__m512>(gap), reinterpret_cast<__m512>(lowest), _CMP_NLT_UQ);
  return {reinterpret_cast<f32v>(
              _mm512_maskz_scalef_ps(kept, reinterpret_cast<__m512>(y), reinterpret_cast<__m512>(n))),
          reinterpret_cast<f32v>(
              _mm512_maskz_mul_ps(kept, reinterpret_cast<__m512>(gap), reinterpret_cast<__m512>(scale)))};
#else
  const f32v e = reinterpret_cast<f32v>((reinterpret_cast<i32v>(shifted) + 127) << 23) * y;
  const i32v gone = gap < lowest;
  return {gone ? splat(0.0f) : e, gone ? splat(0.0f) : gap * scale};
#endif
}
#define RF_EXP_SCALED 1
#else
#define RF_EXP_SCALED 0
#endif

}  // namespace RF_ISA
}  // namespace rf
