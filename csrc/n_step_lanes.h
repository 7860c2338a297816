// Windows of few steps that stand side by side, a vector of steps at a time by Horner's rule:
//
//     y_t = r_t + gamma (r_{t+1} + gamma (... + gamma (r_{t+n-1} + gamma V_{t+n})))
//
// and where the next cut of a row is. The last n steps of a segment have no full window: y_t = r_t + gamma y_{t+1}.
//
// Roofline: r, V read and y written, 12 bytes a step in float32, for 2 n flops a step in vectors: bandwidth-bound from
// memory up to n of about 30 with AVX-512. Included by n_step.h alone, once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "simd.h"
#include "steps.h"

namespace rf {
namespace RF_ISA {
namespace {

// Longer windows cost less by the sums of n_step.h.
constexpr int64_t kShort = 64;

template <class T>
f32v load_some(const T* p, int64_t count, float fill = 0.0f) {
  return count >= kLanes ? load(p) : load_tail(p, count, fill);
}
template <class T>
void store_some(T* p, int64_t count, f32v x) {
  count >= kLanes ? store(p, x) : store_tail(p, count, x);
}

inline uint64_t word_at(const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, sizeof(word));
  return word;
}

// The first byte in [t, end) that is not 0, or end; and the last one, or begin - 1.
inline int64_t find_set(const uint8_t* flags, int64_t t, int64_t end) {
  while (t + 8 <= end && word_at(flags + t) == 0) t += 8;
  while (t < end && flags[t] == 0) ++t;
  return t;
}
inline int64_t find_last_set(const uint8_t* flags, int64_t begin, int64_t end) {
  while (end - 8 >= begin && word_at(flags + end - 8) == 0) end -= 8;
  while (end > begin && flags[end - 1] == 0) --end;
  return end - 1;
}
inline bool all_set(const uint8_t* flags, int64_t begin, int64_t end) {
  return flags == nullptr || begin >= end || std::memchr(flags + begin, 0, static_cast<size_t>(end - begin)) == nullptr;
}

// The counting steps of a row at which it ends or is cut, left to right.
class Cuts {
 public:
  Cuts(const uint8_t* terminated, const uint8_t* truncated, const uint8_t* mask, int64_t end)
      : arrays_{terminated, truncated}, mask_(mask), end_(end) {}

  // The first one from t on, or the row's end.
  int64_t from(int64_t t) {
    for (;; ++t) {
      for (int i = 0; i < 2; ++i) {
        if (next_[i] < t) next_[i] = arrays_[i] == nullptr ? end_ : find_set(arrays_[i], t, end_);
      }
      t = next_[0] < next_[1] ? next_[0] : next_[1];
      if (t == end_ || mask_ == nullptr || mask_[t]) return t;
    }
  }

 private:
  const uint8_t* arrays_[2];
  const uint8_t* mask_;
  const int64_t end_;
  int64_t next_[2] = {-1, -1};
};

// Full windows of the steps [t, end); `ahead` is where V stands for the first of them.
template <class T>
void full_windows(const T* r, const T* ahead, float* out, int64_t steps, int64_t n, f32v gamma) {
  constexpr int kUnroll = 4;
  int64_t t = 0;
  for (; t + kUnroll * kLanes <= steps; t += kUnroll * kLanes) {
    f32v y[kUnroll];
    for (int u = 0; u < kUnroll; ++u) y[u] = load(ahead + t + u * kLanes);
    for (int64_t k = n - 1; k >= 0; --k) {
      for (int u = 0; u < kUnroll; ++u) y[u] = mul_add(gamma, y[u], load(r + t + u * kLanes + k));
    }
    for (int u = 0; u < kUnroll; ++u) store(out + t + u * kLanes, y[u]);
  }
  for (; t < steps; t += kLanes) {
    f32v y = load_some(ahead + t, steps - t);
    for (int64_t k = n - 1; k >= 0; --k) y = mul_add(gamma, y, load_some(r + t + k, steps - t));
    store_some(out + t, steps - t, y);
  }
}

// The steps [first, last] without a gap, whose end is worth `bonus` = gamma V beyond its last reward; V of the state
// behind step t stands at v[t] (`behind`) or v[t + 1].
template <class T>
void short_windows(
    const T* r, const T* v, float* out, int64_t first, int64_t last, int64_t n, double gamma, double bonus, bool behind) {
  const int64_t tail = last + 1 - n > first ? last + 1 - n : first;  // the first without a full window behind it
  full_windows(r + first, v + first + n - behind, out + first, tail - first, n, splat(static_cast<float>(gamma)));
  double y = bonus;
  for (int64_t t = last; t >= tail; --t) {
    y = static_cast<double>(real(r[t])) + (t == last ? y : gamma * y);
    out[t] = static_cast<float>(y);
  }
}

// The same of a segment with gaps: its counting steps side by side, and their results back in their places.
template <class T>
class Gaps {
 public:
  void run(const T* r, const T* v, const uint8_t* mask, float* out, int64_t first, int64_t last, int64_t n, double gamma,
           double bonus, bool behind) {
    rewards_.clear();
    values_.clear();
    places_.clear();
    for (int64_t t = first; t <= last; ++t) {
      if (!mask[t]) continue;
      places_.push_back(t);
      rewards_.push_back(r[t]);
      values_.push_back(v[t]);
    }
    found_.resize(places_.size());
    const int64_t steps = static_cast<int64_t>(places_.size());
    short_windows(rewards_.data(), values_.data(), found_.data(), 0, steps - 1, n, gamma, bonus, behind);
    for (size_t i = 0; i < places_.size(); ++i) out[places_[i]] = found_[i];
  }

 private:
  std::vector<T> rewards_, values_;
  std::vector<int64_t> places_;
  std::vector<float> found_;
};

}  // namespace
}  // namespace RF_ISA
}  // namespace rf
