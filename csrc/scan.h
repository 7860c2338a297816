// The reverse linear recurrence y_t = b_t + a_t y_{t+1} over the lanes of a vector, by doubling. Included by
// sources that are compiled per instruction set.
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "simd.h"

namespace rf {
namespace RF_ISA {

// Lane i of the result is lane i + n of x followed by fill.
template <int n, int... i>
inline f32v shift(f32v x, f32v fill, std::integer_sequence<int, i...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, fill, (i + n)...);
#else
  return __builtin_shuffle(x, fill, i32v{(i + n)...});
#endif
}
template <int n>
inline f32v shift(f32v x, f32v fill) {
  return shift<n>(x, fill, std::make_integer_sequence<int, kLanes>{});
}

// Lane 0 in every lane.
inline f32v first_lane(f32v x) {
#if defined(__clang__)
  return splat(x[0]);
#else
  return __builtin_shuffle(x, i32v{});
#endif
}

// x from lane `first` on, `before` in the lanes before it.
inline f32v from_lane(int first, f32v x, f32v before) {
  i32v lanes{};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return select(lanes >= first, x, before);
}

// a b + c of one step, rounded as over lanes.
inline float mul_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// Suffix compositions of y -> b + a y over the lanes; joined to the carry by one multiply-add.
inline f32v compose(f32v a, f32v b, f32v carry) {
  const f32v one = splat(1.0f), nothing = f32v{};
  b = mul_add(a, shift<1>(b, nothing), b), a = a * shift<1>(a, one);
  b = mul_add(a, shift<2>(b, nothing), b), a = a * shift<2>(a, one);
  if constexpr (kLanes > 4) b = mul_add(a, shift<4>(b, nothing), b), a = a * shift<4>(a, one);
  if constexpr (kLanes > 8) {
    constexpr int half = kLanes > 8 ? 8 : 0;
    b = mul_add(a, shift<half>(b, nothing), b), a = a * shift<half>(a, one);
  }
  return mul_add(a, carry, b);
}

// What `compose` makes of one a in all lanes on its way, bit for bit, and so the same result in half the work.
struct Powers {
  f32v steps[5];

  explicit Powers(float a) {
    const f32v one = splat(1.0f);
    steps[0] = splat(a);
    steps[1] = steps[0] * shift<1>(steps[0], one);
    steps[2] = steps[1] * shift<2>(steps[1], one);
    steps[3] = kLanes > 4 ? steps[2] * shift<(kLanes > 4 ? 4 : 0)>(steps[2], one) : steps[2];
    steps[4] = kLanes > 8 ? steps[3] * shift<(kLanes > 8 ? 8 : 0)>(steps[3], one) : steps[3];
  }
};

inline f32v compose(const Powers& a, f32v b, f32v carry) {
  const f32v nothing = f32v{};
  b = mul_add(a.steps[0], shift<1>(b, nothing), b);
  b = mul_add(a.steps[1], shift<2>(b, nothing), b);
  if constexpr (kLanes > 4) b = mul_add(a.steps[2], shift<4>(b, nothing), b);
  if constexpr (kLanes > 8) b = mul_add(a.steps[3], shift<(kLanes > 8 ? 8 : 0)>(b, nothing), b);
  return mul_add(a.steps[4], carry, b);
}

// kLanes bytes, all equal to `byte`.
template <uint8_t byte>
inline bool all(const uint8_t* bytes) {
  using Word = std::conditional_t<(kLanes > 4), uint64_t, uint32_t>;
  constexpr Word wanted = static_cast<Word>(0x0101010101010101u * byte);
  Word difference = 0;
  for (int i = 0; i < kLanes; i += static_cast<int>(sizeof(Word))) {
    Word word;
    std::memcpy(&word, bytes + i, sizeof(word));
    difference |= word ^ wanted;
  }
  return difference == 0;
}

}  // namespace RF_ISA
}  // namespace rf
