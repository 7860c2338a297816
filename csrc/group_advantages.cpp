// Rewards relative to their group: a few thousand numbers in any order, so in double and on one thread. Built
// once, for every instruction set.
//
//   c_i = r_i - mean | r_i - mean of the others | r_i      A_i = c_i / (max(std, min_std) + eps), or c_i
#include "advantage.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace rf {

Moments merge(const Moments& a, const Moments& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const double count = a.count + b.count, gap = b.mean - a.mean;
  return {count, a.mean + gap * (b.count / count), a.m2 + b.m2 + gap * gap * (a.count * (b.count / count))};
}

namespace {

struct Group {
  double count = 0, mean = 0, std = 0;
  bool flat = false, floored = false;
};

// Centred two-pass statistics of the members [first, last) of `order`.
Group describe(const GroupArgs& args, const int64_t* first, const int64_t* last) {
  Group group;
  group.count = static_cast<double>(last - first);
  double low = args.rewards[*first], high = low, sum = 0, m2 = 0;
  for (const int64_t* i = first; i != last; ++i) {
    low = std::min(low, args.rewards[*i]);
    high = std::max(high, args.rewards[*i]);
    sum += args.rewards[*i];
  }
  group.flat = low == high;
  group.mean = sum / group.count;
  for (const int64_t* i = first; i != last; ++i) {
    const double d = args.rewards[*i] - group.mean;
    m2 += d * d;
  }
  group.std = group.count > args.ddof && !group.flat ? std::sqrt(m2 / (group.count - args.ddof)) : 0.0;
  group.floored = group.std <= args.min_std;
  return group;
}

void write(const GroupArgs& args, const int64_t* first, const int64_t* last, const Group& group) {
  const double spread = std::max(group.std, args.min_std) + args.eps;
  const double divisor = args.scale ? spread : 1.0;
  const double others = args.baseline == 1 ? group.count / (group.count - 1) : 1.0;
  const double centre = args.baseline == 2 ? 0.0 : group.mean;
  if (args.upstream == nullptr) {
    for (const int64_t* i = first; i != last; ++i) args.out[*i] = others * (args.rewards[*i] - centre) / divisor;
    return;
  }
  double sum = 0, along = 0;  // of the upstream; along = -dL/dstd
  for (const int64_t* i = first; i != last; ++i) {
    sum += args.upstream[*i];
    along += args.upstream[*i] * others * (args.rewards[*i] - centre) / (divisor * divisor);
  }
  const double mean = args.baseline == 2 ? 0.0 : sum / group.count;
  const bool through_std = args.scale && !group.floored && group.std > 0;
  const double slope = through_std ? along / ((group.count - args.ddof) * group.std) : 0.0;
  for (const int64_t* i = first; i != last; ++i) {
    args.out[*i] = others * (args.upstream[*i] - mean) / divisor - slope * (args.rewards[*i] - group.mean);
  }
}

}  // namespace

void group_advantages(const GroupArgs& args) {
  std::vector<int64_t> order;
  for (int64_t i = 0; i < args.count; ++i) {
    args.out[i] = 0;
    if ((args.valid == nullptr || args.valid[i]) && !std::isnan(args.rewards[i])) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return args.groups[a] < args.groups[b]; });
  const int64_t* const end = order.data() + order.size();
  for (const int64_t* first = order.data(); first != end;) {
    const int64_t* last = first;
    while (last != end && args.groups[*last] == args.groups[*first]) ++last;
    const Group group = describe(args, first, last);
    const bool raw = last - first == 1 && args.raw_singleton;
    if (raw) {
      args.out[*first] = args.upstream != nullptr ? args.upstream[*first] : args.rewards[*first];
    } else if (args.baseline == 2 || !group.flat) {
      write(args, first, last, group);
    }
    first = last;
  }
}

}  // namespace rf
