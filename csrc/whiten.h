#pragma once

#include "advantage.h"

namespace rf {

struct WhitenArgs {
  const void* x;
  const uint8_t* mask;
  DType dtype;
  int64_t count;
  double shift, scale;  // y = (x - shift) * scale + offset
  double offset;
  void* out;  // Real
  int threads;
};

struct WhitenBackwardArgs {
  const void* x;
  const uint8_t* mask;
  const void* upstream;  // Real
  DType dtype;
  int64_t count;
  double mean;
  double slope, constant, linear;  // dx = slope g + constant + linear (x - mean)
  void* d_x;                       // Real
  int threads;
};

struct MomentsArgs {
  const void* x;
  const uint8_t* mask;
  DType dtype;
  int64_t count;
  int threads;
};

struct Whiten {
  Moments (*moments)(const MomentsArgs&);
  void (*whiten)(const WhitenArgs&);  // out may be x
  // sum g and sum g (x - mean) over counting elements.
  void (*whiten_sums)(const WhitenBackwardArgs&, double out[2]);
  void (*whiten_backward)(const WhitenBackwardArgs&);
};

}  // namespace rf
