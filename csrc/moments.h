#pragma once

#include <cstdint>

namespace rf {

// Count, mean and M2 of a stream, for every id; updated in place.
struct MomentsByIdArgs {
  const double* scores;  // [elements]
  const int64_t* ids;    // [elements]
  const uint8_t* mask;   // [elements]; null: all count
  int64_t elements, size;
  int64_t* count;  // [size]
  double* mean;    // [size]
  double* m2;      // [size]
};

// The first counting element whose id is outside [0, size), and then nothing has changed; -1: all were added.
int64_t accumulate_by_id(const MomentsByIdArgs& args);

}  // namespace rf
