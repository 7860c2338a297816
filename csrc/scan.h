// The reverse linear recurrence y_t = b_t + a_t y_{t+1} over the lanes of a vector, by doubling. Included by
// sources that are compiled per instruction set.
#pragma once

#include <cstring>
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

// Suffix compositions of y -> b + a y over the lanes; joined to the carry by one multiply-add.
inline f32v compose(f32v a, f32v b, f32v carry) {
  const f32v one = splat(1.0f), nothing = f32v{};
  b = a * shift<1>(b, nothing) + b, a = a * shift<1>(a, one);
  b = a * shift<2>(b, nothing) + b, a = a * shift<2>(a, one);
  if constexpr (kLanes > 4) b = a * shift<4>(b, nothing) + b, a = a * shift<4>(a, one);
  if constexpr (kLanes > 8) {
    constexpr int half = kLanes > 8 ? 8 : 0;
    b = a * shift<half>(b, nothing) + b, a = a * shift<half>(a, one);
  }
  return a * carry + b;
}

// kLanes bytes, all equal to `byte`.
inline bool all(const uint8_t* bytes, uint32_t byte) {
  uint32_t difference = 0;
  for (int i = 0; i < kLanes; i += 4) {
    uint32_t four;
    std::memcpy(&four, bytes + i, 4);
    difference |= four ^ (byte * 0x01010101u);
  }
  return difference == 0;
}

}  // namespace RF_ISA
}  // namespace rf
