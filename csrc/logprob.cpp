#include "logprob.h"

#include "parallel.h"
#include "simd.h"

namespace rf {
namespace RF_ISA {

extern const Logprob logprob_table;
const Logprob logprob_table = {};

}  // namespace RF_ISA
}  // namespace rf
