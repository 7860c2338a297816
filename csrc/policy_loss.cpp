#include "policy_loss.h"

#include "parallel.h"
#include "simd.h"

namespace rf {
namespace RF_ISA {

extern const PolicyLoss policy_loss_table;
const PolicyLoss policy_loss_table = {};

}  // namespace RF_ISA
}  // namespace rf
