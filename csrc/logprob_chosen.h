// The chosen tokens of a row, each id once. Included by logprob.cpp, once per instruction set.
#pragma once

#include <cstdint>

namespace rf {
namespace RF_ISA {
namespace {

// A chosen token; in the backward the upstream gradient of its logp, and the gradient of its logit.
struct Chosen {
  int64_t id;
  double g, gradient;
};

// By id. Shell's sort, since std::sort would leave helpers behind that the instruction sets share (isa.h).
void sort(Chosen* chosen, int64_t n) {
  for (int64_t gap = n / 2; gap > 0; gap /= 2) {
    for (int64_t i = gap; i < n; ++i) {
      const Chosen moving = chosen[i];
      int64_t j = i;
      for (; j >= gap && chosen[j - gap].id > moving.id; j -= gap) chosen[j] = chosen[j - gap];
      chosen[j] = moving;
    }
  }
}

// Tokens with equal ids become one, whose upstream gradient is their sum; returns how many are left.
int64_t unite(Chosen* chosen, int64_t n) {
  if (n < 2) return n;
  sort(chosen, n);
  int64_t kept = 1;
  for (int64_t k = 1; k < n; ++k) {
    if (chosen[k].id == chosen[kept - 1].id) {
      chosen[kept - 1].g += chosen[k].g;
    } else {
      chosen[kept++] = chosen[k];
    }
  }
  return kept;
}

}  // namespace
}  // namespace RF_ISA
}  // namespace rf
