// Running moments by id: Welford's update, one score after the other. Built once, for every instruction set.
//
//   n += 1      d = x - mean      mean += d / n      M2 += d (x - mean)
//
// Roofline: 17 bytes read a score and 48 moved at its id, in no order, with a division between two scores of the
// same id: bound by latency, some nanoseconds a score, on one thread. A training step has thousands of scores.
#include "moments.h"

namespace rf {

int64_t accumulate_by_id(const MomentsByIdArgs& args) {
  const auto counts = [&](int64_t i) { return args.mask == nullptr || args.mask[i]; };
  for (int64_t i = 0; i < args.elements; ++i) {
    if (counts(i) && (args.ids[i] < 0 || args.ids[i] >= args.size)) return i;
  }
  for (int64_t i = 0; i < args.elements; ++i) {
    if (!counts(i)) continue;
    const int64_t id = args.ids[i];
    const double x = args.scores[i], d = x - args.mean[id];
    args.count[id] += 1;
    args.mean[id] += d / static_cast<double>(args.count[id]);
    args.m2[id] += d * (x - args.mean[id]);
  }
  return -1;
}

}  // namespace rf
