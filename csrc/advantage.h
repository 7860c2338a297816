#pragma once

#include <cstdint>

#include "dtype.h"

namespace rf {

struct Advantage {};

}  // namespace rf
