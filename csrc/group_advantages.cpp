// Rewards relative to their group, in any order: few numbers, so in double and on one thread. Built once, for every
// instruction set.
//
//   c_i = r_i - b_i      A_i = c_i / (max(std, min_std) + eps), or c_i
//
// Roofline: 16 bytes read and 8 written a reward; the members of a group are brought together by a hash of its id and a
// counting sort, three random accesses a reward, which are the cost.
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

// Centred two-pass statistics; rewards that are all equal have no spread at all.
struct Spread {
  double count = 0, mean = 0, std = 0;
  bool flat = false;
};

Spread describe(const GroupArgs& args, const int64_t* first, const int64_t* last) {
  Spread found;
  if (first == last) return found;
  found.count = static_cast<double>(last - first);
  double low = args.rewards[*first], high = low, sum = 0, m2 = 0;
  for (const int64_t* i = first; i != last; ++i) {
    low = std::min(low, args.rewards[*i]);
    high = std::max(high, args.rewards[*i]);
    sum += args.rewards[*i];
  }
  found.flat = low == high;
  found.mean = sum / found.count;
  for (const int64_t* i = first; i != last; ++i) {
    const double d = args.rewards[*i] - found.mean;
    m2 += d * d;
  }
  found.std = found.count > args.ddof && !found.flat ? std::sqrt(m2 / (found.count - args.ddof)) : 0.0;
  return found;
}

// A baseline from the group's own rewards: equal rewards then mean nothing.
bool relative(const GroupArgs& args) { return args.baseline != 2 && args.baseline != 4; }

// dstd/dr_i = slope (r_i - mean) / d; 0 where the floor or the convention decides.
double slope(const GroupArgs& args, const Spread& spread, double d) {
  const bool through = spread.std > args.min_std && spread.std > 0;
  return through ? d / ((spread.count - args.ddof) * spread.std) : 0.0;
}

// One group: A_i = others (r_i - centre_i) / divisor.
struct Group {
  const GroupArgs& args;
  const int64_t *first, *last;
  Spread spread;
  double divisor = 1, others = 1, centre = 0, weight = 0;

  Group(const GroupArgs& args, const int64_t* first, const int64_t* last, const Spread& batch)
      : args(args), first(first), last(last), spread(describe(args, first, last)) {
    if (args.scale != 0) divisor = std::max((args.scale == 1 ? spread : batch).std, args.min_std) + args.eps;
    if (relative(args)) centre = spread.mean;
    if (args.baseline == 1) others = spread.count / (spread.count - 1);
    if (args.baseline != 3) return;
    double sum = 0;
    for (const int64_t* i = first; i != last; ++i) weight += args.aside[*i], sum += args.aside[*i] * args.rewards[*i];
    if (weight > 0) centre = sum / weight;
  }

  double centred(int64_t i) const {
    return others * (args.rewards[i] - (args.baseline == 4 ? args.aside[i] : centre));
  }
  // dcentre/dr_i
  double share(int64_t i) const {
    if (!relative(args)) return 0.0;
    return weight > 0 ? args.aside[i] / weight : 1 / spread.count;
  }

  void write() const {
    for (const int64_t* i = first; i != last; ++i) args.out[*i] = centred(*i) / divisor;
  }

  // Writes the gradient but for the batch's std, and returns -dL/ddivisor.
  double write_gradient() const {
    double sum = 0, along = 0;
    for (const int64_t* i = first; i != last; ++i) {
      sum += args.upstream[*i];
      along += args.upstream[*i] * centred(*i) / (divisor * divisor);
    }
    const double own = args.scale == 1 ? slope(args, spread, along) : 0.0;
    for (const int64_t* i = first; i != last; ++i) {
      args.out[*i] = others * (args.upstream[*i] - sum * share(*i)) / divisor -
                     own * (args.rewards[*i] - spread.mean);
    }
    return along;
  }
};

// The number of every distinct id, in the order of their first appearance: a hash table, at most half full, that grows
// with the ids and so stays in cache.
class Numbering {
 public:
  int64_t operator()(int64_t id) {
    size_t slot = home(id);
    for (; table_[slot] >= 0; slot = (slot + 1) & (table_.size() - 1)) {
      if (ids_[static_cast<size_t>(table_[slot])] == id) return table_[slot];
    }
    ids_.push_back(id);
    const int64_t number = table_[slot] = size() - 1;
    if (2 * ids_.size() > table_.size()) grow();
    return number;
  }
  int64_t size() const { return static_cast<int64_t>(ids_.size()); }

 private:
  size_t home(int64_t id) const {
    return static_cast<size_t>((static_cast<uint64_t>(id) * 0x9e3779b97f4a7c15u) >> (64 - bits_));
  }
  void grow() {
    table_.assign(size_t{1} << ++bits_, -1);
    for (size_t i = 0; i < ids_.size(); ++i) {
      size_t slot = home(ids_[i]);
      while (table_[slot] >= 0) slot = (slot + 1) & (table_.size() - 1);
      table_[slot] = static_cast<int64_t>(i);
    }
  }

  int bits_ = 8;
  std::vector<int64_t> table_ = std::vector<int64_t>(256, -1), ids_;
};

// Members of every group side by side, in the order of the batch: group g has [begins[g], begins[g + 1]).
struct Grouped {
  std::vector<int64_t> members, begins;

  Grouped(const std::vector<int64_t>& kept, const int64_t* ids) : members(kept.size()) {
    std::vector<int64_t> group(kept.size());
    Numbering number;
    for (size_t i = 0; i < kept.size(); ++i) {
      const bool same = i > 0 && ids[kept[i]] == ids[kept[i - 1]];
      group[i] = same ? group[i - 1] : number(ids[kept[i]]);
    }
    begins.assign(static_cast<size_t>(number.size()) + 1, 0);
    for (const int64_t g : group) ++begins[static_cast<size_t>(g) + 1];
    std::partial_sum(begins.begin(), begins.end(), begins.begin());
    std::vector<int64_t> next(begins.begin(), begins.end() - 1);
    for (size_t i = 0; i < kept.size(); ++i) members[static_cast<size_t>(next[static_cast<size_t>(group[i])]++)] = kept[i];
  }
};

}  // namespace

void group_advantages(const GroupArgs& args) {
  std::vector<int64_t> order;
  order.reserve(static_cast<size_t>(args.count));
  for (int64_t i = 0; i < args.count; ++i) {
    args.out[i] = 0;
    if ((args.valid == nullptr || args.valid[i]) && !std::isnan(args.rewards[i])) order.push_back(i);
  }
  const Spread batch = args.scale == 2 ? describe(args, order.data(), order.data() + order.size()) : Spread{};
  const Grouped grouped(order, args.groups);
  double along = 0;
  for (size_t g = 0; g + 1 < grouped.begins.size(); ++g) {
    const int64_t* const first = grouped.members.data() + grouped.begins[g];
    const int64_t* const last = grouped.members.data() + grouped.begins[g + 1];
    const Group group(args, first, last, batch);
    if (last - first == 1 && args.raw_singleton) {
      args.out[*first] = args.upstream != nullptr ? args.upstream[*first] : args.rewards[*first];
    } else if (!relative(args) || !group.spread.flat) {
      if (args.upstream == nullptr) {
        group.write();
      } else {
        along += group.write_gradient();
      }
    }
  }
  if (args.upstream == nullptr || args.scale != 2) return;
  const double shared = slope(args, batch, along);
  for (const int64_t i : order) args.out[i] -= shared * (args.rewards[i] - batch.mean);
}

}  // namespace rf
