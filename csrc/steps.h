// Rows of counting steps from their ends, in blocks of kLanes wherever they stand: a block without a gap is read as
// vectors, one with a gap goes through the stack. What a block computes depends on its counting steps alone, so
// padding on either side, gaps and packing change no bit. Included by sources compiled per instruction set.
#pragma once

#include <cstring>

#include "scan.h"

namespace rf {
namespace RF_ISA {
namespace {

// kLanes counting steps, the last one in the last lane; lanes before `first` are no steps.
struct Lanes {
  f32v r, v, log_rho, aside;
  i32v ends, cut;  // cut: truncated and not terminated
  int first;
  bool stops;  // some lane ends or is cut
};

inline double real(double x) { return x; }
template <class T>
inline float real(T x) {
  return to_float(x);
}
template <class T>
inline T* from(T* pointer, int64_t offset) {
  return pointer == nullptr ? nullptr : pointer + offset;
}
template <class T>
inline const T* typed(const void* pointer, int64_t offset) {
  return from(static_cast<const T*>(pointer), offset);
}
template <class T>
inline T* typed(void* pointer, int64_t offset) {
  return from(static_cast<T*>(pointer), offset);
}

// The arrays of one sequence, each at its first step; null: absent, but for rewards and targets.
template <class T, class Real>
struct Steps {
  const T* rewards;
  const T* values;
  const T* log_rhos;
  const T* aside;
  const uint8_t* terminated;
  const uint8_t* truncated;
  const uint8_t* mask;
  Real* targets;
  Real* advantages;
  bool aside_at_cuts;  // `aside` is wanted where a step is cut, and nowhere else

  bool counts(int64_t t) const { return mask == nullptr || mask[t]; }
  bool ends(int64_t t) const { return terminated != nullptr && terminated[t]; }
  bool cut(int64_t t) const { return truncated != nullptr && truncated[t] && !ends(t); }

  void write(int64_t t, Real target, Real advantage) const {
    targets[t] = target;
    if (advantages != nullptr) advantages[t] = advantage;
  }

  Lanes load(int64_t t, int first) const {
    Lanes in{RF_ISA::load(rewards + t), f32v{}, f32v{}, f32v{}, i32v{}, i32v{}, first, false};
    if (values != nullptr) in.v = RF_ISA::load(values + t);
    if (log_rhos != nullptr) in.log_rho = RF_ISA::load(log_rhos + t);
    in.stops = (terminated != nullptr && !all<0>(terminated + t)) || (truncated != nullptr && !all<0>(truncated + t));
    if (aside != nullptr && (in.stops || !aside_at_cuts)) in.aside = RF_ISA::load(aside + t);
    if (in.stops) {
      if (terminated != nullptr) in.ends = load_flags(terminated + t);
      if (truncated != nullptr) in.cut = load_flags(truncated + t) & ~in.ends;
    }
    return in;
  }
};

// kLanes counting steps from anywhere, side by side, and their results.
template <class T>
struct Gathered {
  T reals[4][kLanes];
  uint8_t flags[2][kLanes];
  float results[2][kLanes];
  int64_t places[kLanes];
  Steps<T, float> steps;

  explicit Gathered(const Steps<T, float>& s) {
    const auto room = [&](const T* x, int i) { return x != nullptr ? reals[i] : nullptr; };
    const auto flag = [&](const uint8_t* x, int i) { return x != nullptr ? flags[i] : nullptr; };
    steps = {reals[0],   room(s.values, 1),      room(s.log_rhos, 2),    room(s.aside, 3),
             flag(s.terminated, 0), flag(s.truncated, 1), nullptr, results[0],
             s.advantages != nullptr ? results[1] : nullptr, s.aside_at_cuts};
  }

  // Steps back from `end` over up to kLanes counting steps, a run at a time; masked ones on the way are written.
  // Returns the first lane that is a step.
  int collect(const Steps<T, float>& s, int64_t& end) {
    std::memset(reals, 0, sizeof(reals));
    std::memset(flags, 0, sizeof(flags));
    int first = kLanes;
    while (end > 0 && first > 0) {
      int64_t begin = end;
      if (s.counts(end - 1)) {
        while (begin > 0 && end - begin < first && s.counts(begin - 1)) --begin;
        first -= static_cast<int>(end - begin);
        take(s, begin, end - begin, first);
      } else if (end >= kLanes && all<0>(s.mask + end - kLanes)) {
        begin -= kLanes;
        store(s.targets + begin, f32v{});
        if (s.advantages != nullptr) store(s.advantages + begin, f32v{});
      } else {
        s.write(--begin, 0, 0);
      }
      end = begin;
    }
    return first;
  }

  void take(const Steps<T, float>& s, int64_t t, int64_t n, int lane) {
    const T* sources[4] = {s.rewards, s.values, s.log_rhos, s.aside};
    for (int64_t i = 0; i < n; ++i) places[lane + i] = t + i;
    for (int k = 0; k < 4; ++k) {
      if (sources[k] != nullptr) std::memcpy(reals[k] + lane, sources[k] + t, static_cast<std::size_t>(n) * sizeof(T));
    }
    if (s.terminated != nullptr) std::memcpy(flags[0] + lane, s.terminated + t, static_cast<std::size_t>(n));
    if (s.truncated != nullptr) std::memcpy(flags[1] + lane, s.truncated + t, static_cast<std::size_t>(n));
  }

  void scatter(const Steps<T, float>& s, int first) const {
    for (int i = first; i < kLanes; ++i) s.write(places[i], results[0][i], results[1][i]);
  }
};

struct Found {
  f32v target, advantage;
};
struct FoundStep {
  double target, advantage;
};

// What becomes of the advantages beside being stored: nothing.
struct Unwatched {
  void operator()(f32v, int) {}
  void operator()(double) {}
};

// rule(Lanes) -> Found, from a row's end to its beginning; watch(advantages, first lane that is a step) sees them.
// A rule is inlined in two places and has to round alike in both: products are added by mul_add.
template <class T, class Rule, class Watch>
inline void for_block(const Steps<T, float>& s, int64_t t, int first, Rule& rule, Watch& watch) {
  const Found found = rule(s.load(t, first));
  watch(found.advantage, first);
  store(s.targets + t, found.target);
  if (s.advantages != nullptr) store(s.advantages + t, found.advantage);
}

template <class T, class Rule, class Watch>
inline void for_steps(const Steps<T, float> s, int64_t n, Rule& rule, Watch& watch) {
  for (int64_t end = n; end > 0;) {
    while (end >= kLanes && (s.mask == nullptr || all<1>(s.mask + end - kLanes))) {
      end -= kLanes;
      for_block(s, end, 0, rule, watch);
    }
    if (end == 0) return;
    Gathered<T> gathered(s);
    const int first = gathered.collect(s, end);
    if (first == kLanes) return;
    for_block(gathered.steps, 0, first, rule, watch);
    gathered.scatter(s, first);
  }
}

// rule(reward, value, log_rho, aside, ends, cut) -> FoundStep for float64.
template <class Rule, class Watch>
inline void for_steps(const Steps<double, double>& s, int64_t n, Rule& rule, Watch& watch) {
  const auto at = [](const double* x, int64_t t) { return x != nullptr ? x[t] : 0.0; };
  for (int64_t t = n; t-- > 0;) {
    if (!s.counts(t)) {
      s.write(t, 0, 0);
      continue;
    }
    const FoundStep found =
        rule(s.rewards[t], at(s.values, t), at(s.log_rhos, t), at(s.aside, t), s.ends(t), s.cut(t));
    watch(found.advantage);
    s.write(t, found.target, found.advantage);
  }
}

#define RF_BY_DTYPE(function, dtype)                                  \
  switch (dtype) {                                                    \
    case DType::float64: return function<double, double>(args);       \
    case DType::float16: return function<f16, float>(args);           \
    case DType::bfloat16: return function<bf16, float>(args);         \
    default: return function<float, float>(args);                     \
  }

}  // namespace
}  // namespace RF_ISA
}  // namespace rf
