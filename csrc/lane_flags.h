// Comparisons of float lanes and of float64 scalars, one source for both. Included by policy_loss_lanes.h, once per
// instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace rf {
namespace RF_ISA {
namespace {

// Which lanes: a mask register where there are any, since GCC 12 turns the comparisons of the vector extension into
// whole vectors and back (three times the time of the pass); else a vector of all or no bits.
#if defined(__AVX512F__)
struct LaneFlags {
  __mmask16 bits;
};
inline LaneFlags operator&(LaneFlags a, LaneFlags b) { return {_kand_mask16(a.bits, b.bits)}; }
inline LaneFlags operator|(LaneFlags a, LaneFlags b) { return {_kor_mask16(a.bits, b.bits)}; }
inline LaneFlags operator!(LaneFlags a) { return {_knot_mask16(a.bits)}; }
template <int Predicate>
inline LaneFlags compare(f32v a, f32v b) {
  return {_mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), Predicate)};
}
inline LaneFlags lt(f32v a, f32v b) { return compare<_CMP_LT_OQ>(a, b); }
inline LaneFlags le(f32v a, f32v b) { return compare<_CMP_LE_OQ>(a, b); }
inline LaneFlags eq(f32v a, f32v b) { return compare<_CMP_EQ_OQ>(a, b); }
inline LaneFlags ne(f32v a, f32v b) { return compare<_CMP_NEQ_UQ>(a, b); }
inline f32v select(LaneFlags condition, f32v yes, f32v no) {
  return reinterpret_cast<f32v>(
      _mm512_mask_blend_ps(condition.bits, reinterpret_cast<__m512>(no), reinterpret_cast<__m512>(yes)));
}
inline LaneFlags lane_flags(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm_test_epi8_mask(bytes, bytes)};
}
#else
using LaneFlags = i32v;
inline i32v lt(f32v a, f32v b) { return a < b; }
inline i32v le(f32v a, f32v b) { return a <= b; }
inline i32v eq(f32v a, f32v b) { return a == b; }
inline i32v ne(f32v a, f32v b) { return a != b; }
inline i32v lane_flags(const uint8_t* p) { return load_flags(p); }
#endif
inline bool lt(double a, double b) { return a < b; }
inline bool le(double a, double b) { return a <= b; }
inline bool eq(double a, double b) { return a == b; }
inline bool ne(double a, double b) { return a != b; }
template <class V>
inline auto gt(V a, V b) {
  return lt(b, a);
}
template <class V>
inline auto ge(V a, V b) {
  return le(b, a);
}
template <class V>
using Flag = decltype(lt(V{}, V{}));

inline bool every(bool flag) { return flag; }
inline bool every(LaneFlags flags) {
#if defined(__AVX512F__)
  return flags.bits == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(flags)) == 0xff;
#else
  int64_t halves[2];
  std::memcpy(halves, &flags, sizeof(halves));
  return (halves[0] & halves[1]) == -1;
#endif
}

}  // namespace
}  // namespace RF_ISA
}  // namespace rf
