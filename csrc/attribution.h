#pragma once

#include <cstdint>

#include "dtype.h"

namespace rf {

enum class Reduction : int { dot = 0, abs = 1, l2 = 2 };

// rows x dim, unit stride inside a row; strides count elements.
struct ScoresArgs {
  const void* grad;
  const void* activation;
  DType dtype;
  Reduction reduction;
  int64_t rows, dim, grad_stride, activation_stride;
  void* out;  // [rows] float32, float64 for float64
  int threads;
};

struct ScoresBackwardArgs {
  const void* grad;
  const void* activation;
  const void* upstream;  // [rows], dtype of `out`
  const void* scores;    // [rows], dtype of `out`; read by l2 only
  DType dtype;
  Reduction reduction;
  int64_t rows, dim, grad_stride, activation_stride;
  void* d_grad;        // [rows, dim] contiguous, dtype of the inputs; null when not wanted
  void* d_activation;  // likewise
  int threads;
};

// Segment s holds the scores [offsets[s], offsets[s + 1]).
struct SegmentArgs {
  const void* in;  // sum: scores of `dtype`; spread: [segments], dtype of the result
  const int64_t* offsets;
  DType dtype;
  int64_t segments, elements;
  void* out;  // sum: [segments] float32, float64 for float64; spread: [elements] likewise
  int threads;
};

struct Attribution {
  void (*scores)(const ScoresArgs&);
  void (*scores_backward)(const ScoresBackwardArgs&);
  void (*segment_sum)(const SegmentArgs&);
  void (*segment_spread)(const SegmentArgs&);  // every element gets its segment's number
};

}  // namespace rf
