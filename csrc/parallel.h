// Rows over threads. The unit of work is fixed by the caller and never by the number of threads, so results
// are bitwise the same for every thread count. Included by sources that are compiled per instruction set.
#pragma once

#include <cstdint>

namespace rf {
namespace RF_ISA {

// An OpenMP barrier was seen to cost 8 ms on a loaded machine, so small work stays on the calling thread.
constexpr int64_t kSerialElements = 65536;

// Calls body(i) for i in [0, count). `elements` is the total number of elements behind those calls.
template <class Body>
inline void parallel_for(int64_t count, int64_t elements, int threads, const Body& body) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads <= 1 || elements < kSerialElements) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(threads)
#endif
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace RF_ISA
}  // namespace rf
