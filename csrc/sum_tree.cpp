#include "sum_tree.h"

#include <algorithm>
#include <limits>

namespace rf {

namespace {

constexpr int64_t fanout = 8;  // a cache line of doubles
constexpr int max_depth = 22;  // 8^21 = 2^63 leaves
constexpr double none = std::numeric_limits<double>::infinity();

int64_t padded(int64_t count) { return (count + fanout - 1) / fanout * fanout; }

// The leaves have no `least`: theirs are the priorities themselves.
struct Level {
  double* sums;
  double* least;
  int64_t count;
};

struct Levels {
  Level at[max_depth + 1];
  int depth = 0;  // of the root
  int64_t size = 0;

  explicit Levels(const SumTree& tree) {
    at[0] = {tree.nodes, nullptr, tree.capacity};
    size = padded(tree.capacity);
    while (at[depth].count > 1 || depth == 0) {
      const int64_t count = padded(at[depth].count) / fanout;
      double* sums = tree.nodes + size;
      at[++depth] = {sums, sums + padded(count), count};
      size += 2 * padded(count);
    }
  }
};

double sum(const double* c) { return ((c[0] + c[1]) + (c[2] + c[3])) + ((c[4] + c[5]) + (c[6] + c[7])); }

double least_positive(const double* c) {
  double found = none;
  for (int64_t j = 0; j < fanout; ++j) found = std::min(found, c[j] > 0 ? c[j] : none);
  return found;
}

void refresh(const Levels& levels, int depth, int64_t node) {
  const Level &above = levels.at[depth], &below = levels.at[depth - 1];
  above.sums[node] = sum(below.sums + node * fanout);
  above.least[node] = least_positive((below.least ? below.least : below.sums) + node * fanout);
}

void refresh_all(const Levels& levels, int depth) {
  for (int64_t node = 0; node < levels.at[depth].count; ++node) refresh(levels, depth, node);
}

void prefetch(const double* node) {
#if defined(__GNUC__)
  __builtin_prefetch(node);
#else
  (void)node;
#endif
}

// The last child with a priority: where rounding left a mass behind the sum of all.
int64_t last_positive(const double* c) {
  int64_t j = fanout - 1;
  while (j > 0 && !(c[j] > 0)) --j;
  return j;
}

// Prefix sums in the order of `sum`, which the last of them is: they rise where a child is positive and nowhere else,
// so that no child of 0 is chosen. No branch hangs on the mass, which is random.
int64_t descend(const double* c, double& mass) {
  const double left = c[0] + c[1], right = c[4] + c[5], half = left + (c[2] + c[3]);
  const double prefix[] = {0,           c[0],         left,                left + c[2],
                           half,        half + c[4],  half + right,        half + (right + c[6]),
                           half + (right + (c[6] + c[7]))};
  int64_t passed = 0;
  for (int64_t j = 1; j <= fanout; ++j) passed += prefix[j] <= mass;
  if (passed == fanout) return last_positive(c);
  mass -= prefix[passed];
  return passed;
}

}  // namespace

int64_t sum_tree_size(int64_t capacity) { return Levels({nullptr, capacity}).size; }

void sum_tree_build(const SumTree& tree) {
  const Levels levels(tree);
  for (int depth = 1; depth <= levels.depth; ++depth) {
    const Level& level = levels.at[depth];
    std::fill(level.sums + level.count, level.sums + padded(level.count), 0.0);
    std::fill(level.least + level.count, level.least + padded(level.count), none);
    refresh_all(levels, depth);
  }
}

SumTreeSummary sum_tree_summary(const SumTree& tree) {
  const Levels levels(tree);
  return {levels.at[levels.depth].sums[0], levels.at[levels.depth].least[0]};
}

SumTreeCheck sum_tree_update(const SumTree& tree, const int64_t* indices, const double* priorities, int64_t count) {
  const double most = std::numeric_limits<double>::max() / static_cast<double>(padded(tree.capacity));
  for (int64_t i = 0; i < count; ++i) {
    if (indices[i] < 0 || indices[i] >= tree.capacity) return {SumTreeFault::index, i};
    if (!(priorities[i] >= 0 && priorities[i] <= most)) return {SumTreeFault::priority, i};
  }
  if (count == 0) return {SumTreeFault::none, 0};
  const Levels levels(tree);
  for (int64_t i = 0; i < count; ++i) tree.nodes[indices[i]] = priorities[i];
  for (int depth = 1; depth <= levels.depth; ++depth) {
    if (levels.at[depth].count <= count) {
      refresh_all(levels, depth);
    } else {
      for (int64_t i = 0; i < count; ++i) refresh(levels, depth, indices[i] >> (3 * depth));
    }
  }
  return {SumTreeFault::none, 0};
}

SumTreeCheck sum_tree_sample(const SumTree& tree, const double* uniforms, int64_t count, int64_t* indices,
                             double* priorities) {
  for (int64_t k = 0; k < count; ++k) {
    if (!(uniforms[k] >= 0 && uniforms[k] < 1)) return {SumTreeFault::uniform, k};
  }
  const Levels levels(tree);
  const double total = levels.at[levels.depth].sums[0], share = total / static_cast<double>(count);
  if (!(total > 0)) return {SumTreeFault::empty, 0};
  double* masses = priorities;  // until the leaves are known
  for (int64_t k = 0; k < count; ++k) {
    indices[k] = 0;
    masses[k] = (static_cast<double>(k) + uniforms[k]) * share;
  }
  for (int depth = levels.depth - 1; depth >= 0; --depth) {
    const double* sums = levels.at[depth].sums;
    const double* below = levels.at[depth > 0 ? depth - 1 : 0].sums;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t first = indices[k] * fanout;
      indices[k] = first + descend(sums + first, masses[k]);
      if (depth > 0) prefetch(below + indices[k] * fanout);
    }
  }
  for (int64_t k = 0; k < count; ++k) priorities[k] = tree.nodes[indices[k]];
  return {SumTreeFault::none, 0};
}

}  // namespace rf
