#pragma once

#include <cstdint>

#include "dtype.h"

namespace rf {

struct PolicyLoss {};

}  // namespace rf
