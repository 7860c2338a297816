#include "advantage.h"

#include "parallel.h"
#include "simd.h"

namespace rf {
namespace RF_ISA {

extern const Advantage advantage_table;
const Advantage advantage_table = {};

}  // namespace RF_ISA
}  // namespace rf
