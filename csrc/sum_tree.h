// Prioritised sampling (Schaul et al. 2016, arXiv:1511.05952): leaves of priorities p_i, and above every eight of
// them a node with their sum and their least positive one.
//
//   find(u):   the first i with p_0 + ... + p_i > u, for u in [0, total)
//
// A node is computed from its children, never by differences, so that it is exact after any number of updates.
//
// Roofline: a cache line of eight doubles for each of log8(n) levels; 7 levels for 1e6 leaves, of which all but the
// leaves (8 MB) fit into a second-level cache. A batch goes through one level after the other, so that the misses of
// its elements overlap. Built once, for every instruction set.
#pragma once

#include <cstdint>

namespace rf {

enum class SumTreeFault { none, index, priority, uniform, empty };

struct SumTreeCheck {
  SumTreeFault fault;
  int64_t element;
};

struct SumTreeSummary {
  double total, least;  // least: of the positive priorities; infinity where there are none
};

struct SumTree {
  double* nodes;  // [sum_tree_size(capacity)]
  int64_t capacity;
};

int64_t sum_tree_size(int64_t capacity);

// Every node from the leaves, nodes[0] to nodes[capacity - 1]; the leaves behind them must be 0.
void sum_tree_build(const SumTree& tree);

SumTreeSummary sum_tree_summary(const SumTree& tree);

// Of one index twice the last priority counts. Nothing changes unless all indices and priorities are right.
SumTreeCheck sum_tree_update(const SumTree& tree, const int64_t* indices, const double* priorities, int64_t count);

// indices[k] = find((k + uniforms[k]) total / count): one leaf from each of `count` strata of equal mass.
SumTreeCheck sum_tree_sample(const SumTree& tree, const double* uniforms, int64_t count, int64_t* indices,
                             double* priorities);

}  // namespace rf
