// Sums of exponentials over one row's logits: blocks, chunks, and how they fold. Included by logprob.cpp and
// linear_logprob.cpp, once per instruction set.
#pragma once

#include "half_ends.h"
#include "logprob_lanes.h"
#include "powers.h"

namespace rf {
namespace RF_ISA {
namespace {

struct Top {
  float largest;
  bool any;  // whether a logit of the block is kept, NaN among them
};

template <bool floored, class T>
Top block_max(const T* x, int64_t n, f32v floor) {
  f32v m[4];
  for (f32v& lane : m) lane = splat(kForbidden);
  i32v below = i32v{} - 1;
  const auto take = [&](f32v v, f32v& running) __attribute__((always_inline)) {
    running = max(v, running);
    if (floored) below &= v < floor;
  };
  int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
    const Pair a = load_pair(x + j), b = load_pair(x + j + 2 * kLanes);
    take(a.first, m[0]), take(a.second, m[1]), take(b.first, m[2]), take(b.second, m[3]);
  }
  for (; j + kLanes <= n; j += kLanes) take(load(x + j), m[0]);
  if (j < n) take(load_tail(x + j, n - j, kForbidden), m[1]);
  bool any = !floored;
  for (int lane = 0; floored && lane < kLanes; ++lane) any = any || below[lane] == 0;
  return {max_lanes(max(max(m[0], m[1]), max(m[2], m[3]))), any};
}

template <class Half>
Top block_max_of_bits(const Half* x, int64_t n) {
  constexpr int64_t step = 2 * kLanes;
  Ends<Half> ends[2];
  int64_t j = 0;
  for (; j + 2 * step <= n; j += 2 * step) ends[0].take(x + j), ends[1].take(x + j + step);
  if (j + step <= n) {
    ends[0].take(x + j);
    j += step;
  }
  ends[0].join(ends[1]);
  float top = j > 0 ? ends[0].largest(infinity_of(Half())) : __builtin_nanf("");
  if (top != top) return block_max<false, Half>(x, n, f32v{});
  for (; j < n; ++j) {
    const float v = to_float(x[j]);
    top = v > top ? v : top;
  }
  return {top, true};
}

template <bool floored, class T>
Top top_of(const T* x, int64_t n, f32v floor) {
  return block_max<floored>(x, n, floor);
}
template <>
inline Top top_of<false>(const bf16* x, int64_t n, f32v) {
  return block_max_of_bits(x, n);
}
template <>
inline Top top_of<false>(const f16* x, int64_t n, f32v) {
  return block_max_of_bits(x, n);
}

// A block's sums of exp and of exp gap, gap = u - top, in units of 2^unit = 2^shift exp(top / T); where that is out of
// range, unit is NaN and shift 0.
struct Part {
  double top = kMinusInfinity, unit = 0, shift = 0, ties = 0, rest = 0, moment = 0;
};

// Sums of exp(u / T) in units of the largest logit's, which with `ties` counts apart.
template <bool entropy, bool ties>
struct Sums {
  f32v rest{}, moment{}, equal{};

  __attribute__((always_inline)) void add(f32v u, f32v largest, const Row& row) {
    const Exponential found = exponential(u, largest, row);
    f32v e = found.e;
    const f32v d = found.d;
    if (ties) {
      const i32v tie = u == largest;
      equal += tie ? splat(1.0f) : splat(0.0f);
      e = tie ? splat(0.0f) : e;
    }
    rest += e;
    if (entropy) moment = e * d + moment;
  }

#if RF_POWERS
  // In units of 2^whole, and with gaps for d. The same `rest` with and without the moment, bitwise.
  __attribute__((always_inline)) void add(f32v u, const Powers& by, const Row&) {
    const Factors found = factors<ties>(u, by, equal);
    rest = fused(found.y, found.s, rest);
    if (entropy) moment = fused(found.y, found.s * found.gap, moment);
  }
#endif
};

struct Nothing {
  void take(const void*) {}
};

// Sums over one block in float32; everything above is double. `ahead` looks at the same place of the next block, which
// spares a loop over it. A function of its own, so that its loop has the registers to itself, with all inside inlined
// by force: GCC 12 calls it otherwise, with the sums in memory.
template <bool entropy, bool capped, bool floored, bool ties, class T, class To, class Ahead = Nothing>
__attribute__((noinline)) Part block_sums(const T* x, int64_t n, const To& reference, const Row& row, f32v floor,
                                          Ahead* ahead = nullptr) {
  Ahead beside = ahead != nullptr ? *ahead : Ahead();
  Sums<entropy, ties> sums[2];
  const auto take = [&](f32v v, Sums<entropy, ties>& into) __attribute__((always_inline)) {
    into.add(logit<capped>(kept<floored>(v, floor), row), reference, row);
  };
  constexpr int64_t step = 2 * kLanes;
  int64_t j = 0;
  for (; j + step <= n; j += step) {
    prefetch_pair(x + j);
    beside.take(x + j + kBlock<T>);
    const Pair v = load_pair(x + j);
    take(v.first, sums[0]), take(v.second, sums[1]);
  }
  if (ahead != nullptr) *ahead = beside;
  if (j + kLanes <= n) {
    take(load(x + j), sums[0]);
    j += kLanes;
  }
  if (j < n) take(load_tail(x + j, n - j, kForbidden), sums[1]);
  Part part;
  part.ties = ties ? static_cast<double>(sum_lanes(sums[0].equal + sums[1].equal)) : 0.0;
  part.rest = static_cast<double>(sum_lanes(sums[0].rest + sums[1].rest));
  part.moment = entropy ? static_cast<double>(sum_lanes(sums[0].moment + sums[1].moment)) : 0.0;
  return part;
}

// The sums of a block whose largest logit is `top`. With `ties` those that are equal to it count apart.
template <bool entropy, bool capped, bool floored, bool ties, class T, class Ahead = Nothing>
Part sums_of(const T* x, int64_t n, double top, const Row& row, f32v floor, Ahead* ahead = nullptr) {
  Part part;
#if RF_POWERS
  if (Powers::hold(top, row)) {
    const Powers powers(top, row);
    part = block_sums<entropy, capped, floored, ties>(x, n, powers, row, floor, ahead);
    part.top = top, part.unit = powers.whole, part.shift = powers.whole - top * row.log2_t;
    return part;
  }
#endif
  // A block of forbidden tokens has no largest; any finite one gives exp(-inf) = 0, and NaN stays NaN.
  const f32v reference = splat(top == kMinusInfinity ? 0.0f : static_cast<float>(top));
  part = block_sums<entropy, capped, floored, ties>(x, n, reference, row, floor, ahead);
  part.top = top, part.unit = __builtin_nan("");
  part.moment /= row.inverse_t;
  return part;
}

// Blocks of a row; for double, chunks.
template <class T>
int64_t parts_in(int64_t vocab) {
  return vocab <= kBlock<T> ? 1 : (vocab + kBlock<T> - 1) / kBlock<T>;
}

template <class T>
int64_t size_of(int64_t part, int64_t vocab) {
  const int64_t left = vocab - part * kBlock<T>;
  return left < kBlock<T> ? left : kBlock<T>;
}

template <bool capped, bool floored, class T>
Top top_of_part(const T* x, int64_t n, const Row& row, f32v floor) {
  Top top = top_of<floored>(x, n, floor);
  top.largest = top.any ? logit<capped>(splat(top.largest), row)[0] : kForbidden;
  return top;
}

// Blocks [begin, end) of a row, each with its largest logit in its sums.
template <bool entropy, bool capped, bool floored, class T>
void sum_parts(const T* x, int64_t begin, int64_t end, int64_t vocab, Part* parts, const Row& row, double) {
  const f32v floor = splat(static_cast<float>(row.floor));
  for (int64_t b = begin; b < end; ++b) {
    const T* block = x + b * kBlock<T>;
    const int64_t n = size_of<T>(b, vocab);
    const Top top = top_of_part<capped, floored>(block, n, row, floor);
    parts[b] = Part();
    if (top.any) parts[b] = sums_of<entropy, capped, floored, false>(block, n, top.largest, row, floor);
  }
}

// The same for 16-bit floats, each block's largest logit found beside the sums of the one before.
template <bool entropy, bool capped, class Half>
void sum_half_parts(const Half* x, int64_t begin, int64_t end, int64_t vocab, Part* parts, const Row& row) {
  float top = __builtin_nanf("");
  for (int64_t b = begin; b < end; ++b) {
    const Half* block = x + b * kBlock<Half>;
    const int64_t n = size_of<Half>(b, vocab);
    if (top != top) top = block_max_of_bits(block, n).largest;
    const double largest = static_cast<double>(logit<capped>(splat(top), row)[0]);
    if (b + 1 < end && size_of<Half>(b + 1, vocab) == kBlock<Half>) {
      Ends<Half> ends;
      parts[b] = sums_of<entropy, capped, false, false>(block, n, largest, row, f32v{}, &ends);
      top = ends.largest(infinity_of(Half()));
    } else {
      parts[b] = sums_of<entropy, capped, false, false>(block, n, largest, row, f32v{});
      top = __builtin_nanf("");
    }
  }
}
template <bool entropy, bool capped, bool floored>
void sum_parts(const bf16* x, int64_t begin, int64_t end, int64_t vocab, Part* parts, const Row& row, double cap) {
  if (floored) return sum_parts<entropy, capped, floored, bf16>(x, begin, end, vocab, parts, row, cap);
  sum_half_parts<entropy, capped>(x, begin, end, vocab, parts, row);
}
template <bool entropy, bool capped, bool floored>
void sum_parts(const f16* x, int64_t begin, int64_t end, int64_t vocab, Part* parts, const Row& row, double cap) {
  if (floored) return sum_parts<entropy, capped, floored, f16>(x, begin, end, vocab, parts, row, cap);
  sum_half_parts<entropy, capped>(x, begin, end, vocab, parts, row);
}

// 2^d of a whole d <= 0, by its bits.
inline double two_to(double d) {
  if (d < -1022) return 0;
  const int64_t bits = (static_cast<int64_t>(d) + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof(power));
  return power;
}

// A row from its blocks. Those that hold its largest logit are summed anew, without it: what a block's sums are depends
// on the row alone, whoever added them up and when.
template <bool entropy, bool capped, bool floored, class T>
Fold fold_parts(const T* x, int64_t vocab, const Part* parts, const Row& row, double) {
  const int64_t blocks = parts_in<T>(vocab);
  const f32v floor = splat(static_cast<float>(row.floor));
  const Part* highest = parts;
  for (int64_t b = 1; b < blocks; ++b) {
    if (parts[b].top > highest->top) highest = parts + b;
  }
  Fold fold;
  fold.largest = highest->top;
  const double scale = std::exp2(highest->shift);
  for (int64_t b = 0; b < blocks; ++b) {
    Part part = parts[b];
    if (part.top == kMinusInfinity) {  // nothing allowed there: 0, or NaN for NaN logits
      fold.rest += part.rest;
      continue;
    }
    if (part.top == fold.largest && part.ties == 0) {
      const T* block = x + b * kBlock<T>;
      part = sums_of<entropy, capped, floored, true>(block, size_of<T>(b, vocab), part.top, row, floor);
    }
    const double apart = parts[b].unit - highest->unit;  // NaN where one of them is
    const double factor = apart == apart ? two_to(apart) * scale
                                         : std::exp2((part.top - fold.largest) * row.log2_t + part.shift);
    fold.ties += part.ties;
    fold.rest += factor * part.rest;
    fold.moment += factor * (part.moment + (part.top - fold.largest) * part.rest);
  }
  fold.moment *= row.inverse_t;
  return fold;
}

// A row that stays in L1 or L2: its largest logit first, so that no block is summed twice.
template <bool entropy, bool capped, bool floored, class T>
void sum_short_row(const T* x, int64_t vocab, Part* parts, const Row& row) {
  const f32v floor = splat(static_cast<float>(row.floor));
  const int64_t blocks = parts_in<T>(vocab);
  Top tops[kChunk / kBlock<T>];
  float largest = kForbidden;
  for (int64_t b = 0; b < blocks; ++b) {
    tops[b] = top_of_part<capped, floored>(x + b * kBlock<T>, size_of<T>(b, vocab), row, floor);
    if (tops[b].largest > largest) largest = tops[b].largest;
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const T* block = x + b * kBlock<T>;
    const int64_t n = size_of<T>(b, vocab);
    const double top = static_cast<double>(tops[b].largest);
    parts[b] = Part();
    if (!tops[b].any) continue;
    parts[b] = tops[b].largest == largest ? sums_of<entropy, capped, floored, true>(block, n, top, row, floor)
                                          : sums_of<entropy, capped, floored, false>(block, n, top, row, floor);
  }
}

template <bool entropy, bool capped, bool floored, class T>
Fold fold_row(const T* x, int64_t vocab, Part* parts, const Row& row, double softcap) {
  if (vocab <= kChunk) {
    sum_short_row<entropy, capped, floored>(x, vocab, parts, row);
  } else {
    sum_parts<entropy, capped, floored>(x, 0, parts_in<T>(vocab), vocab, parts, row, softcap);
  }
  return fold_parts<entropy, capped, floored>(x, vocab, parts, row, softcap);
}

// One block of a row that is folded as it comes.
template <bool entropy, class T>
Fold fold_block(const T* x, int64_t n, const Row& row) {
  const double top = static_cast<double>(block_max<false>(x, n, f32v{}).largest);
  const Part part = sums_of<entropy, false, false, true>(x, n, top, row, f32v{});
  const double scale = std::exp2(part.shift);
  return {top, part.ties, part.rest * scale, part.moment * scale * row.inverse_t};
}

// Element by element; a part is a block as it is, its sums in units of its largest logit's.
template <bool entropy, bool capped, bool floored>
Fold fold_block(const double* x, int64_t n, const Row& row, double softcap) {
  Fold fold;
  const auto u = [&](int64_t j) {
    return floored && x[j] < row.floor ? kMinusInfinity : capped_logit<capped>(x[j], softcap);
  };
  for (int64_t j = 0; j < n; ++j) {
    const double v = u(j);
    if (v > fold.largest) fold.largest = v;
  }
  for (int64_t j = 0; j < n; ++j) {
    const double v = u(j);
    if (v == kMinusInfinity) continue;
    if (v == fold.largest) {
      fold.ties += 1;
      continue;
    }
    const double d = (v - fold.largest) * row.inverse_t, e = std::exp(d);
    fold.rest += e;
    if (entropy && e != 0) fold.moment += e * d;
  }
  return fold;
}

template <bool entropy, bool capped, bool floored>
void sum_parts(const double* x, int64_t begin, int64_t end, int64_t vocab, Part* parts, const Row& row, double cap) {
  for (int64_t b = begin; b < end; ++b) {
    const double* block = x + b * kBlock<double>;
    const Fold fold = fold_block<entropy, capped, floored>(block, size_of<double>(b, vocab), row, cap);
    parts[b] = {fold.largest, 0, 0, fold.ties, fold.rest, fold.moment};
  }
}

template <bool, bool, bool>
Fold fold_parts(const double*, int64_t vocab, const Part* parts, const Row& row, double) {
  Fold fold;
  for (int64_t b = 0; b < parts_in<double>(vocab); ++b) {
    merge(fold, {parts[b].top, parts[b].ties, parts[b].rest, parts[b].moment}, row.inverse_t);
  }
  return fold;
}

template <bool entropy, bool capped, bool floored>
Fold fold_row(const double* x, int64_t vocab, Part* parts, const Row& row, double softcap) {
  sum_parts<entropy, capped, floored>(x, 0, parts_in<double>(vocab), vocab, parts, row, softcap);
  return fold_parts<entropy, capped, floored>(x, vocab, parts, row, softcap);
}

}  // namespace
}  // namespace RF_ISA
}  // namespace rf
