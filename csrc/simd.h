// Vectors of the instruction set this file is compiled for, on the compiler's vector extension: one source
// serves SSE2, AVX2, AVX-512 and NEON. Reductions run in a fixed order. Included by sources that are compiled
// per instruction set, so everything lives in that namespace.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "dtype.h"

namespace rf {
namespace RF_ISA {

#if defined(__AVX512F__)
#define RF_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define RF_VECTOR_BYTES 32
#else
#define RF_VECTOR_BYTES 16
#endif

constexpr int kLanes = RF_VECTOR_BYTES / 4;  // float lanes in a vector

typedef float f32v __attribute__((vector_size(RF_VECTOR_BYTES)));
typedef int32_t i32v __attribute__((vector_size(RF_VECTOR_BYTES)));
typedef uint32_t u32v __attribute__((vector_size(RF_VECTOR_BYTES)));
typedef uint16_t u16v __attribute__((vector_size(RF_VECTOR_BYTES / 2)));  // kLanes half-width integers

inline f32v splat(float x) { return f32v{} + x; }
inline f32v select(i32v condition, f32v yes, f32v no) { return condition ? yes : no; }
// The first operand when either is NaN, as the x86 instruction does it: keep the running value second.
// By intrinsic: GCC 12 makes a compare and a blend of the plain expression in 64-byte vectors, three times the latency.
#if defined(__AVX512F__)
inline f32v max(f32v x, f32v running) {
  return reinterpret_cast<f32v>(
      _mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(running)));
}
inline f32v min(f32v x, f32v running) {
  return reinterpret_cast<f32v>(
      _mm512_maskz_min_ps(0xffff, reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(running)));
}
#else
inline f32v max(f32v x, f32v running) { return x > running ? x : running; }
inline f32v min(f32v x, f32v running) { return x < running ? x : running; }
#endif
inline f32v abs(f32v x) { return reinterpret_cast<f32v>(reinterpret_cast<u32v>(x) & 0x7fffffffu); }

// ---- loads and stores: memory type to float lanes and back -------------------------------------------------

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 31u, fraction = x.bits & 0x3ffu;
  float magnitude;
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24
    magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    uint32_t bits;
    std::memcpy(&bits, &magnitude, 4);
    bits |= sign;
    std::memcpy(&magnitude, &bits, 4);
    return magnitude;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | (fraction << 13);
  std::memcpy(&magnitude, &bits, 4);
  return magnitude;
}

// Round to nearest, ties to even; NaN stays NaN.
inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, bf16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}
inline void from_float(float x, f16& out) {
#if defined(__F16C__)
  out.bits = static_cast<uint16_t>(_cvtss_sh(x, 0));
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: one addition of 0.5 rounds to a multiple of 2^-24
    float value;
    std::memcpy(&value, &magnitude, 4);
    value += 0.5f;
    uint32_t shifted;
    std::memcpy(&shifted, &value, 4);
    half = shifted - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
#endif
}

inline f32v load(const float* p) {
  f32v out;
  std::memcpy(&out, p, sizeof(out));
  return out;
}
// Widening and narrowing by intrinsics where there are any: GCC 12 splits __builtin_convertvector into halves
// (a third of the speed). The masked forms, since the plain ones warn about an uninitialised register (GCC PR
// 105593).
inline u32v widen(const uint16_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<u32v>(
      _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<u32v>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  u16v half;
  std::memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, u32v);
#endif
}
inline void narrow(uint16_t* p, u32v x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(x)));
#else
  const u16v half = __builtin_convertvector(x, u16v);
  std::memcpy(p, &half, sizeof(half));
#endif
}

inline f32v load(const bf16* p) { return reinterpret_cast<f32v>(widen(&p->bits) << 16); }
inline f32v load(const f16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<f32v>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return reinterpret_cast<f32v>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  f32v out{};
  for (int i = 0; i < kLanes; ++i) out[i] = to_float(p[i]);
  return out;
#endif
}

// All bits set in the lanes whose byte is not 0.
inline i32v load_flags(const uint8_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<i32v>(_mm512_maskz_cvtepu8_epi32(
             0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))) != 0;
#elif defined(__AVX2__)
  return reinterpret_cast<i32v>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))) != 0;
#else
  i32v out{};
  for (int i = 0; i < kLanes; ++i) out[i] = p[i];
  return out != 0;
#endif
}

inline void store(float* p, f32v x) { std::memcpy(p, &x, sizeof(x)); }
inline void store(bf16* p, f32v x) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x));
  std::memcpy(p, &half, sizeof(half));
#else
  const u32v bits = reinterpret_cast<u32v>(x);
  const u32v rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const u32v kept = reinterpret_cast<u32v>(x != x) ? (u32v{} + 0x7fc0u) : rounded;
  narrow(&p->bits, kept);
#endif
}
inline void store(f16* p, f32v x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(x), 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(x), 0));
#else
  for (int i = 0; i < kLanes; ++i) from_float(x[i], p[i]);
#endif
}

// The last `count` < kLanes elements of a row; missing lanes read as `fill`.
template <class T>
inline f32v load_tail(const T* p, int64_t count, float fill) {
  f32v out = splat(fill);
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(p[i]);
  return out;
}
template <class T>
inline void store_tail(T* p, int64_t count, f32v x) {
  for (int64_t i = 0; i < count; ++i) from_float(x[i], p[i]);
}

// ---- reductions over the lanes, by halves: the order depends on the vector width alone ---------------------

#if defined(__AVX2__)
// By shuffles: the loop goes through memory, where each half waits for the stores of the one before.
struct Add {
  static __m128 of(__m128 x, __m128 y) { return _mm_add_ps(x, y); }
  static __m256 of(__m256 x, __m256 y) { return _mm256_add_ps(x, y); }
};
struct Max {  // y where either is NaN
  static __m128 of(__m128 x, __m128 y) { return _mm_max_ps(x, y); }
  static __m256 of(__m256 x, __m256 y) { return _mm256_max_ps(x, y); }
};

// Upper halves into lower ones until one lane is left: Op(upper, lower).
template <class Op>
inline float fold_lanes(f32v x) {
#if defined(__AVX512F__)
  const __m512d wide = reinterpret_cast<__m512d>(x);  // masked, for the warning that `widen` speaks of
  const __m256 eight = Op::of(_mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xf, wide, 1)),
                              _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xf, wide, 0)));
#else
  const __m256 eight = reinterpret_cast<__m256>(x);
#endif
  const __m128 four = Op::of(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  const __m128 two = Op::of(_mm_movehl_ps(four, four), four);
  return _mm_cvtss_f32(Op::of(_mm_shuffle_ps(two, two, 1), two));
}

inline float sum_lanes(f32v x) { return fold_lanes<Add>(x); }
inline float max_lanes(f32v x) { return fold_lanes<Max>(x); }
#else
inline float sum_lanes(f32v x) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  }
  return x[0];
}
inline float max_lanes(f32v x) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] = x[i + width] > x[i] ? x[i + width] : x[i];
  }
  return x[0];
}
#endif

// ---- lanes in double, for sums that must not round ------------------------------------------------------------

typedef double f64v __attribute__((vector_size(RF_VECTOR_BYTES)));
struct Doubles {
  f64v low, high;
};

inline Doubles widen(f32v x) {
#if defined(__AVX512F__)
  const __m512d wide = reinterpret_cast<__m512d>(x);
  const auto half = [&](__m256d lanes) {
    return reinterpret_cast<f64v>(_mm512_maskz_cvtps_pd(0xff, _mm256_castpd_ps(lanes)));
  };
  return {half(_mm512_maskz_extractf64x4_pd(0xf, wide, 0)), half(_mm512_maskz_extractf64x4_pd(0xf, wide, 1))};
#elif defined(__AVX2__)
  const __m256 lanes = reinterpret_cast<__m256>(x);
  return {reinterpret_cast<f64v>(_mm256_cvtps_pd(_mm256_castps256_ps128(lanes))),
          reinterpret_cast<f64v>(_mm256_cvtps_pd(_mm256_extractf128_ps(lanes, 1)))};
#else
  Doubles out{};
  for (int i = 0; i < kLanes / 2; ++i) out.low[i] = x[i], out.high[i] = x[i + kLanes / 2];
  return out;
#endif
}
inline f32v narrow(const Doubles& x) {
#if defined(__AVX512F__)
  const auto half = [](f64v lanes) {
    return _mm256_castps_pd(_mm512_maskz_cvtpd_ps(0xff, reinterpret_cast<__m512d>(lanes)));
  };
  const __m512d low = _mm512_maskz_broadcast_f64x4(0xff, half(x.low));
  return reinterpret_cast<f32v>(_mm512_maskz_insertf64x4(0xff, low, half(x.high), 1));
#elif defined(__AVX2__)
  return reinterpret_cast<f32v>(_mm256_set_m128(_mm256_cvtpd_ps(reinterpret_cast<__m256d>(x.high)),
                                                _mm256_cvtpd_ps(reinterpret_cast<__m256d>(x.low))));
#else
  f32v out{};
  for (int i = 0; i < kLanes / 2; ++i) {
    out[i] = static_cast<float>(x.low[i]), out[i + kLanes / 2] = static_cast<float>(x.high[i]);
  }
  return out;
#endif
}
inline double sum_lanes(const Doubles& x) {
  f64v both = x.low + x.high;
  for (int width = kLanes / 4; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) both[i] += both[i + width];
  }
  return both[0];
}

#if defined(__FMA__) || defined(__aarch64__)
// a b + c with one rounding, whatever the compiler makes of the plain expression.
inline f32v fused(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
  return reinterpret_cast<f32v>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b),
                                                reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<f32v>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b),
                                                reinterpret_cast<__m256>(c)));
#else
  return reinterpret_cast<f32v>(vfmaq_f32(reinterpret_cast<float32x4_t>(c), reinterpret_cast<float32x4_t>(a),
                                          reinterpret_cast<float32x4_t>(b)));
#endif
}
#endif

// a b + c, rounded once where there is such an instruction: the same bits wherever it is inlined.
inline f32v mul_add(f32v a, f32v b, f32v c) {
#if defined(__FMA__) || defined(__aarch64__)
  return fused(a, b, c);
#else
  return a * b + c;
#endif
}

}  // namespace RF_ISA
}  // namespace rf
