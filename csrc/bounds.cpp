// Bounds of packed sequences and segments: whether they divide what is packed.
#include "bounds.h"

namespace rf {

bool bounds_rise(const int64_t* bounds, int64_t count, int64_t total) {
  int falling = 0;  // no early exit, so that the loop becomes vectors
  for (int64_t i = 1; i < count; ++i) falling |= bounds[i] < bounds[i - 1];
  return !falling && bounds[0] == 0 && bounds[count - 1] == total;
}

}  // namespace rf
