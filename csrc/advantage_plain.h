#pragma once

#include "advantage.h"

namespace rf {

// Contiguous arrays without gaps; null: absent. "Real" is float32, float64 for float64 input.
struct PlainGaeArgs {
  const void* rewards;         // dtype, as the next three
  const void* values;
  const void* next_values;     // ahead: the value behind every step
  const void* last_values;     // by_time: [rows], the value behind the last step; null: 0
  const uint8_t* terminated;   // no value behind the step; null: none
  const uint8_t* done;         // ahead: the recursion is cut; by_time has one flag for both
  int64_t rows, length;
  DType dtype;
  double gamma, decay;  // decay = gamma lam
  void* advantages;     // Real, as the next
  void* returns;
  int threads;
};

struct PlainAdvantage {
  void (*by_time)(const PlainGaeArgs&);  // arrays are [length, rows]
  void (*ahead)(const PlainGaeArgs&);    // arrays are [rows, length], float32
};

}  // namespace rf
