// What the passes of policy_loss.cpp and q_loss.cpp share: one source for float lanes and for float64 scalars, the
// walk over blocks and rows, and the weight of a token. Included by sources that are compiled per instruction set.
#pragma once

#include <cmath>
#include <type_traits>

#include "buffer.h"
#include "lane_flags.h"
#include "parallel.h"
#include "policy_loss.h"
#include "exp.h"

// The compiler finds the functions of a long loop too large to inline; each call would spill the running sums.
#define RF_INLINE __attribute__((always_inline)) inline

namespace rf {
namespace RF_ISA {
namespace {

// Tokens of one work unit. Sums of blocks are merged in order, so the threads do not matter.
constexpr int64_t kBlock = 8192;
// Float sums turn into float64 after this many tokens: at most 1024 / lanes additions stay in float32.
constexpr int64_t kChunk = 1024;

// ---- lanes: f32v for float32, float16 and bfloat16; double for float64 -------------------------------------

template <class T>
struct LaneOf {
  using type = f32v;
  using scalar = float;
};
template <>
struct LaneOf<double> {
  using type = double;
  using scalar = double;
};
template <class V>
struct LaneScalar {
  using type = float;
};
template <>
struct LaneScalar<double> {
  using type = double;
};
template <class V>
constexpr int64_t kWidth = sizeof(V) == sizeof(double) ? 1 : kLanes;

template <class V>
inline V all(double x) {
  return V{} + static_cast<typename std::conditional<sizeof(V) == sizeof(double), double, float>::type>(x);
}

// The float forms of simd.h beside the double ones below.
using rf::RF_ISA::abs;
using rf::RF_ISA::max_lanes;
using rf::RF_ISA::select;
using rf::RF_ISA::sum_lanes;
inline double select(bool condition, double yes, double no) { return condition ? yes : no; }
inline double abs(double x) { return x < 0 ? -x : x; }
inline double sum_lanes(double x) { return x; }
inline double max_lanes(double x) { return x; }

// One minimum or maximum instruction each (see simd.h). NaN in x stays.
inline double at_least(double x, double low) { return low > x ? low : x; }
inline double at_most(double x, double high) { return high < x ? high : x; }
inline double larger(double x, double running) { return x > running ? x : running; }  // NaN in x is ignored
inline f32v at_least(f32v x, f32v low) { return rf::RF_ISA::max(low, x); }
inline f32v at_most(f32v x, f32v high) { return rf::RF_ISA::min(high, x); }
inline f32v larger(f32v x, f32v running) { return rf::RF_ISA::max(x, running); }
template <class V>
inline V bounded(V x, V low, V high) {
  return at_most(at_least(x, low), high);
}

// exp(x) and exp(x) - 1 for |x| <= 20 or NaN: simd.h's polynomial without its guards. exp(x) = (1 + q) 2^n; 2^n - 1 is
// exact or as good as, so nothing cancels.
template <class V>
struct Exp {
  V value, minus_one;
};
inline Exp<double> exp20(double x) { return {std::exp(x), std::expm1(x)}; }
RF_INLINE Exp<f32v> exp20(f32v x) {
  // 1.5 * 2^23 + 127: adding it leaves the rounded integer, biased like an exponent, in the low bits.
  const f32v shifter = splat(12583039.0f);
  const f32v shifted = x * splat(1.44269504f) + shifter;
  const f32v n = shifted - shifter;
#if defined(__FMA__) || defined(__aarch64__)
  const f32v r = fused(n, splat(-0.693147182f), x);  // |n| < 30, so ln2's rounding is below half an eps
#else
  const f32v r = (x - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
#endif
  f32v p = splat(0.00138146f);
  p = p * r + splat(0.00836872f);
  p = p * r + splat(0.04166839f);
  p = p * r + splat(0.16666521f);
  p = p * r + splat(0.49999993f);
  const f32v q = p * (r * r) + r;
  const f32v scale = reinterpret_cast<f32v>(reinterpret_cast<i32v>(shifted) << 23);
  return {q * scale + scale, q * scale + (scale - 1.0f)};
}

inline double load_some(const double* p, int64_t) { return *p; }
template <class T>
inline f32v load_some(const T* p, int64_t count) {
  return count >= kLanes ? load(p) : load_tail(p, count, 0.0f);
}
template <class V>
inline Flag<V> flags_some(const uint8_t* p, int64_t count) {
  if constexpr (sizeof(V) == sizeof(double)) {
    return *p != 0;
  } else {
    if (count >= kLanes) return lane_flags(p);
    uint8_t padded[kLanes] = {};
    std::memcpy(padded, p, static_cast<size_t>(count));
    return lane_flags(padded);
  }
}
// float16 outside of the loops that inline everything else: without F16C it is a long function.
#if defined(__F16C__)
inline f32v load_half(const f16* p) { return load(p); }
#else
__attribute__((noinline)) f32v load_half(const f16* p) { return load(p); }
#endif

// kWidth<V> tokens of an input. float lanes look at its dtype for every vector: a branch that never changes costs less
// than a copy of every loop for every dtype.
template <class V>
struct Input {
  const void* data;  // null: absent
  DType dtype;

  explicit operator bool() const { return data != nullptr; }
  Input from(int64_t i) const {
    return data == nullptr ? *this : Input{static_cast<const char*>(data) + i * element_size(dtype), dtype};
  }
  RF_INLINE V operator()(int64_t i) const {
    if constexpr (sizeof(V) == sizeof(double)) {
      return static_cast<const double*>(data)[i];
    } else {
      if (dtype == DType::float32) return load(static_cast<const float*>(data) + i);
      if (dtype == DType::bfloat16) return load(static_cast<const bf16*>(data) + i);
      return load_half(static_cast<const f16*>(data) + i);
    }
  }
  // 0 where the flag is not set.
  RF_INLINE V operator()(int64_t i, Flag<V> counts) const {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) != sizeof(double)) {
      if (dtype == DType::float32) {
        return reinterpret_cast<f32v>(_mm512_maskz_loadu_ps(counts.bits, static_cast<const float*>(data) + i));
      }
    }
#endif
    return select(counts, (*this)(i), V{});
  }
  double scalar(int64_t i) const {
    if constexpr (sizeof(V) == sizeof(double)) {
      return static_cast<const double*>(data)[i];
    } else {
      if (dtype == DType::float32) return static_cast<const float*>(data)[i];
      if (dtype == DType::bfloat16) return to_float(static_cast<const bf16*>(data)[i]);
      return to_float(static_cast<const f16*>(data)[i]);
    }
  }
};
template <class V>
inline Flag<V> flags(const uint8_t* p) {
  if constexpr (sizeof(V) == sizeof(double)) {
    return *p != 0;
  } else {
    return lane_flags(p);
  }
}

inline double load_whole(const double* p) { return *p; }
inline f32v load_whole(const float* p) { return load(p); }
inline void store_whole(double* p, double x) { *p = x; }
inline void store_whole(float* p, f32v x) { store(p, x); }
inline void store_some(double* p, int64_t, double x) { *p = x; }
inline void store_some(float* p, int64_t count, f32v x) {
  if (count >= kLanes) {
    store(p, x);
  } else {
    store_tail(p, count, x);
  }
}

// exp(-|x|): full range, unlike exp20.
inline double exp_minus_abs(double x) { return std::exp(-abs(x)); }
inline f32v exp_minus_abs(f32v x) { return exp_nonpositive(-abs(x)); }

// log(x) of a normal x > 0, relative error below 3e-7 near 1 too; NaN elsewhere. x = 2^e m with m in [1/sqrt 2, sqrt 2),
// s = (m - 1) / (m + 1), log m = 2 s (1 + s^2 / 3 + ...), whose first term left out is below 2e-9 of it.
inline double log_positive(double x) { return x > 0 ? std::log(x) : std::nan(""); }
inline f32v log_positive(f32v x) {
  const u32v bits = reinterpret_cast<u32v>(x);  // unsigned: a negative x may wrap around
  const i32v exponent = reinterpret_cast<i32v>(bits - 0x3f3504f3u) >> 23;
  const f32v m = reinterpret_cast<f32v>(bits - (reinterpret_cast<u32v>(exponent) << 23));
  const f32v s = (m - 1.0f) / (m + 1.0f), z = s * s;
  f32v p = splat(1.0f / 9);
  p = p * z + splat(1.0f / 7);
  p = p * z + splat(1.0f / 5);
  p = p * z + splat(1.0f / 3);
  const f32v log_m = s * z * p + s;
  const f32v e = __builtin_convertvector(exponent, f32v);
  const f32v result = e * splat(0.693359375f) + (e * splat(-2.12194440e-4f) + (log_m + log_m));
  return select(gt(x, f32v{}), result, splat(__builtin_nanf("")));
}

// log p - log q clamped to +-20, and where it was clamped. A token the policy forbids (log p = -inf) counts as
// clamped whatever q is.
template <class V>
struct LogRatio {
  V value;
  Flag<V> clamped;
};
template <class V>
inline LogRatio<V> log_ratio(V logprob, V other) {
  const V low = all<V>(-20.0), high = all<V>(20.0), minus_inf = all<V>(-HUGE_VAL);
  const V raw = select(eq(logprob, minus_inf), minus_inf, logprob - other);
  const Flag<V> clamped = gt(abs(raw), high);
  return {bounded(raw, low, high), clamped};
}

// ---- blocks and rows ---------------------------------------------------------------------------------------

inline int64_t block_count(int64_t tokens) { return (tokens + kBlock - 1) / kBlock; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t row_begin(const Layout& layout, int64_t row) {
  return layout.cu_seqlens != nullptr ? layout.cu_seqlens[row] : row * layout.row_length;
}

inline int64_t row_of(const Layout& layout, int64_t token) {
  if (layout.cu_seqlens == nullptr) return token / layout.row_length;
  int64_t low = 0, high = layout.rows;  // cu_seqlens[low] <= token < cu_seqlens[high]
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (layout.cu_seqlens[middle] <= token ? low : high) = middle;
  }
  return low;
}

// body(row, begin, end) for the part of every row that lies in the block; by_row false: once, for the block.
template <class Body>
inline void for_each_piece(const Layout& layout, bool by_row, int64_t block, const Body& body) {
  const int64_t begin = block * kBlock, end = smaller(begin + kBlock, layout.tokens);
  if (!by_row) return body(int64_t{0}, begin, end);
  int64_t row = row_of(layout, begin);
  for (int64_t i = begin; i < end; ++row) {
    const int64_t stop = smaller(row_begin(layout, row + 1), end);
    if (stop > i) body(row, i, stop);
    i = stop;
  }
}

// ---- the weight of a token ---------------------------------------------------------------------------------

// Bytes that are 0 or 1, a vector at a time; 255 additions cannot overflow a byte.
inline int64_t count_set(const uint8_t* p, int64_t count) {
  typedef uint8_t u8v __attribute__((vector_size(RF_VECTOR_BYTES)));
  constexpr int64_t width = RF_VECTOR_BYTES;
  int64_t total = 0, i = 0;
  while (i + width <= count) {
    const int64_t stop = smaller(count, i + 255 * width);
    u8v bytes{};
    for (; i + width <= stop; i += width) {
      u8v some;
      std::memcpy(&some, p + i, sizeof(some));
      bytes += some;
    }
    for (int lane = 0; lane < width; ++lane) total += bytes[lane];
  }
  for (; i < count; ++i) total += p[i];
  return total;
}

inline int64_t count_tokens(const Layout& layout, int threads) {
  const int64_t blocks = block_count(layout.tokens);
  Buffer<int64_t> counts(blocks);
  parallel_for(blocks, layout.tokens, threads, [&](int64_t block) {
    const int64_t begin = block * kBlock;
    counts[block] = count_set(layout.mask + begin, smaller(kBlock, layout.tokens - begin));
  });
  int64_t total = 0;
  for (int64_t block = 0; block < blocks; ++block) total += counts[block];
  return total;
}

inline void count_rows(const Layout& layout, int64_t* counts, int threads) {
  parallel_for(layout.rows, layout.tokens, threads, [&](int64_t row) {
    const int64_t begin = row_begin(layout, row);
    counts[row] = count_set(layout.mask + begin, row_begin(layout, row + 1) - begin);
  });
}

inline double inverse(double x) { return x > 0 ? 1.0 / x : 0.0; }

// Weight of every counting token, the same for all of a row: flat, or one a row for the seq_mean_* kinds. Rows
// without counting tokens are no sequences.
class Weights {
 public:
  Weights(const Layout& layout, Aggregation aggregation, double denominator, int threads)
      : by_row(aggregation == Aggregation::seq_mean_token_mean),
        flat_(0.0),
        rows_(by_row ? layout.rows : 0) {
    const bool sequences = by_row || aggregation == Aggregation::seq_mean_token_sum;
    if (!sequences) {
      flat_ = inverse(denominator > 0 ? denominator : static_cast<double>(count_tokens(layout, threads)));
      return;
    }
    Buffer<int64_t> counts(layout.rows);
    if (by_row || !(denominator > 0)) count_rows(layout, counts.data, threads);
    if (!(denominator > 0)) {
      denominator = 0;
      for (int64_t row = 0; row < layout.rows; ++row) denominator += counts[row] > 0;
    }
    flat_ = inverse(denominator);
    for (int64_t row = 0; by_row && row < layout.rows; ++row) {
      rows_[row] = flat_ * inverse(static_cast<double>(counts[row]));
    }
  }
  double operator[](int64_t row) { return by_row ? rows_[row] : flat_; }

  const bool by_row;

 private:
  double flat_;
  Buffer<double> rows_;
};

}  // namespace
}  // namespace RF_ISA
}  // namespace rf
