// The largest of many 16-bit floats by their bits. Included by sources that are compiled per instruction set.
#pragma once

#include "simd.h"

namespace rf {
namespace RF_ISA {

typedef int16_t i16v __attribute__((vector_size(RF_VECTOR_BYTES)));  // 2 kLanes of them

// By intrinsic where GCC 12 makes a compare and a blend of the plain expression, as for `max` in simd.h.
#if defined(__AVX512F__)
inline i16v max(i16v x, i16v y) {
  return reinterpret_cast<i16v>(
      _mm512_maskz_max_epi16(~__mmask32{0}, reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(y)));
}
inline i16v min(i16v x, i16v y) {
  return reinterpret_cast<i16v>(
      _mm512_maskz_min_epi16(~__mmask32{0}, reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(y)));
}
#else
inline i16v max(i16v x, i16v y) { return x > y ? x : y; }
inline i16v min(i16v x, i16v y) { return x < y ? x : y; }
#endif

#if defined(__AVX2__)
// Upper halves into lower ones, and the instruction that finds the smallest of eight unsigned ones, whose order that of
// the signed ones becomes when `flip` turns some of their bits.
template <bool largest>
inline int16_t end_of_lanes(i16v x, int flip) {
  const auto fold = [](auto a, auto b) { return largest ? (a > b ? a : b) : (a < b ? a : b); };
  typedef int16_t i16x16 __attribute__((vector_size(32)));
  typedef int16_t i16x8 __attribute__((vector_size(16)));
#if defined(__AVX512F__)
  const __m512i wide = reinterpret_cast<__m512i>(x);
  const i16x16 half = fold(reinterpret_cast<i16x16>(_mm512_maskz_extracti64x4_epi64(0xf, wide, 1)),
                           reinterpret_cast<i16x16>(_mm512_maskz_extracti64x4_epi64(0xf, wide, 0)));
#else
  const i16x16 half = x;
#endif
  const __m256i both = reinterpret_cast<__m256i>(half);
  const i16x8 eight = fold(reinterpret_cast<i16x8>(_mm256_extracti128_si256(both, 1)),
                           reinterpret_cast<i16x8>(_mm256_castsi256_si128(both)));
  const __m128i turned = _mm_xor_si128(reinterpret_cast<__m128i>(eight), _mm_set1_epi16(static_cast<int16_t>(flip)));
  return static_cast<int16_t>(_mm_extract_epi16(_mm_minpos_epu16(turned), 0) ^ flip);
}
inline int16_t max_lanes(i16v x) { return end_of_lanes<true>(x, 0x7fff); }
inline int16_t min_lanes(i16v x) { return end_of_lanes<false>(x, 0x8000); }
#else
inline int16_t max_lanes(i16v x) {
  int16_t found = x[0];
  for (int i = 1; i < 2 * kLanes; ++i) found = x[i] > found ? x[i] : found;
  return found;
}
inline int16_t min_lanes(i16v x) {
  int16_t found = x[0];
  for (int i = 1; i < 2 * kLanes; ++i) found = x[i] < found ? x[i] : found;
  return found;
}
#endif

// The largest of 16-bit floats by their bits, two comparisons of integers for 2 kLanes of them: the numbers from 0 up
// are in order and those below in reverse, so it is the largest integer, or the smallest where all are negative.
template <class Half>
struct Ends {
  i16v most = i16v{} - 32767 - 1, least = i16v{} + 32767;

  __attribute__((always_inline)) void take(const Half* x) {
    i16v bits;
    std::memcpy(&bits, x, sizeof(bits));
    most = max(bits, most), least = min(bits, least);
  }
  void join(const Ends& other) { most = max(most, other.most), least = min(least, other.least); }

  // NaN where one may be among them, which a comparison of floats would pass over.
  float largest(uint16_t infinity) const {
    Half found{static_cast<uint16_t>(max_lanes(most))};
    if (found.bits >= 0x8000u) found.bits = static_cast<uint16_t>(min_lanes(least));
    return (found.bits & 0x7fffu) > infinity ? __builtin_nanf("") : to_float(found);
  }
};

constexpr uint16_t infinity_of(bf16) { return 0x7f80; }
constexpr uint16_t infinity_of(f16) { return 0x7c00; }

}  // namespace RF_ISA
}  // namespace rf
