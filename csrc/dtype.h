// The element types the core reads. The tags are part of the Python side (react_fast/ops/backend.py).
#pragma once

#include <cstdint>

namespace rf {

enum class DType : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3, int32 = 4, int64 = 5 };

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

constexpr int64_t element_size(DType dtype) {
  return dtype == DType::float64 || dtype == DType::int64 ? 8 : dtype == DType::float32 || dtype == DType::int32 ? 4 : 2;
}

}  // namespace rf
