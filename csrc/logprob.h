#pragma once

#include <cstdint>

#include "dtype.h"

namespace rf {

struct Logprob {};

}  // namespace rf
