#pragma once

#include <cstdint>

namespace rf {

// Whether the bounds [count], count >= 1, rise from 0 to total.
bool bounds_rise(const int64_t* bounds, int64_t count, int64_t total);

}  // namespace rf
