// Attribution: row-wise products of a gradient and an activation, and sums over segments of scores.
//
//   p_d = grad_d * activation_d;   dot: sum_d p_d    abs: sum_d |p_d|    l2: sqrt(sum_d p_d^2)
//
// Roofline: 2 D e bytes read and 4 written a row (e = element size) for 2 D to 3 D flops: bandwidth-bound at
// every D. Each input is read once and nothing of size [rows, D] is written. Segments: e bytes read a score, 8 and
// 4 a segment, one conversion and one addition in double a score: bandwidth-bound from memory on.
#include "attribution.h"

#include <cmath>

#include "parallel.h"
#include "simd.h"

namespace rf {
namespace RF_ISA {
namespace {

// Four independent sums hide the latency of the fused multiply-add.
constexpr int kUnroll = 4;
// Rows a thread takes at a time: enough that the loop's bookkeeping vanishes, few enough to balance.
constexpr int64_t kRowBlock = 16;

template <Reduction kind>
inline f32v accumulate(f32v sum, f32v g, f32v a) {
  if (kind == Reduction::dot) return g * a + sum;
  const f32v p = g * a;
  return kind == Reduction::abs ? sum + abs(p) : p * p + sum;
}

template <Reduction kind, class T>
float row_score(const T* grad, const T* activation, int64_t dim) {
  f32v sums[kUnroll] = {};
  int64_t d = 0;
  for (; d + kUnroll * kLanes <= dim; d += kUnroll * kLanes) {
    for (int u = 0; u < kUnroll; ++u) {
      sums[u] = accumulate<kind>(sums[u], load(grad + d + u * kLanes), load(activation + d + u * kLanes));
    }
  }
  for (; d + kLanes <= dim; d += kLanes) sums[0] = accumulate<kind>(sums[0], load(grad + d), load(activation + d));
  if (d < dim) {
    sums[1] = accumulate<kind>(sums[1], load_tail(grad + d, dim - d, 0.0f), load_tail(activation + d, dim - d, 0.0f));
  }
  const float total = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  return kind == Reduction::l2 ? std::sqrt(total) : total;
}

template <Reduction kind>
double row_score(const double* grad, const double* activation, int64_t dim) {
  double sums[8] = {};
  for (int64_t d = 0; d < dim; ++d) {
    const double p = grad[d] * activation[d];
    sums[d % 8] += kind == Reduction::dot ? p : (kind == Reduction::abs ? std::fabs(p) : p * p);
  }
  const double total = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  return kind == Reduction::l2 ? std::sqrt(total) : total;
}

template <Reduction kind, class T, class Out>
void scores_of(const ScoresArgs& args) {
  const T* grad = static_cast<const T*>(args.grad);
  const T* activation = static_cast<const T*>(args.activation);
  Out* out = static_cast<Out*>(args.out);
  const int64_t blocks = (args.rows + kRowBlock - 1) / kRowBlock;
  parallel_for(blocks, args.rows * args.dim, args.threads, [&](int64_t block) {
    const int64_t end = (block + 1) * kRowBlock < args.rows ? (block + 1) * kRowBlock : args.rows;
    for (int64_t i = block * kRowBlock; i < end; ++i) {
      out[i] = row_score<kind>(grad + i * args.grad_stride, activation + i * args.activation_stride, args.dim);
    }
  });
}

template <class T, class Out>
void scores_dtype(const ScoresArgs& args) {
  switch (args.reduction) {
    case Reduction::dot: return scores_of<Reduction::dot, T, Out>(args);
    case Reduction::abs: return scores_of<Reduction::abs, T, Out>(args);
    case Reduction::l2: return scores_of<Reduction::l2, T, Out>(args);
  }
}

void scores(const ScoresArgs& args) {
  switch (args.dtype) {
    case DType::float32: return scores_dtype<float, float>(args);
    case DType::float64: return scores_dtype<double, double>(args);
    case DType::float16: return scores_dtype<f16, float>(args);
    case DType::bfloat16: return scores_dtype<bf16, float>(args);
    default: return;
  }
}

// d score / d p_d, times the upstream gradient: 1, sign(p), p / score (0 where the score is 0).
template <class Real>
Real slope(Reduction kind, Real p, Real upstream, Real inverse_score) {
  if (kind == Reduction::dot) return upstream;
  if (kind == Reduction::abs) return p > 0 ? upstream : (p < 0 ? -upstream : p * 0);
  return upstream * p * inverse_score;
}

inline double to_real(double x) { return x; }
template <class T>
float to_real(T x) {
  return to_float(x);
}
inline void from_real(double x, double& out) { out = x; }
template <class T>
void from_real(float x, T& out) {
  from_float(x, out);
}

template <class T, class Real>
void scores_backward_of(const ScoresBackwardArgs& args) {
  const T* grad = static_cast<const T*>(args.grad);
  const T* activation = static_cast<const T*>(args.activation);
  const Real* upstream = static_cast<const Real*>(args.upstream);
  const Real* scores = static_cast<const Real*>(args.scores);
  T* d_grad = static_cast<T*>(args.d_grad);
  T* d_activation = static_cast<T*>(args.d_activation);
  parallel_for(args.rows, args.rows * args.dim, args.threads, [&](int64_t i) {
    const T* g = grad + i * args.grad_stride;
    const T* a = activation + i * args.activation_stride;
    const Real inverse = args.reduction == Reduction::l2 && scores[i] > 0 ? Real(1) / scores[i] : Real(0);
    for (int64_t d = 0; d < args.dim; ++d) {
      const Real gd = to_real(g[d]), ad = to_real(a[d]);
      const Real u = slope(args.reduction, gd * ad, upstream[i], inverse);
      if (d_grad != nullptr) from_real(u * ad, d_grad[i * args.dim + d]);
      if (d_activation != nullptr) from_real(u * gd, d_activation[i * args.dim + d]);
    }
  });
}

void scores_backward(const ScoresBackwardArgs& args) {
  switch (args.dtype) {
    case DType::float32: return scores_backward_of<float, float>(args);
    case DType::float64: return scores_backward_of<double, double>(args);
    case DType::float16: return scores_backward_of<f16, float>(args);
    case DType::bfloat16: return scores_backward_of<bf16, float>(args);
    default: return;
  }
}

// ---- segments -----------------------------------------------------------------------------------------------

// Segments a thread takes at a time: spans of words and turns are short.
constexpr int64_t kSegmentBlock = 64;

// Calls body(segment, begin, end) for every segment.
template <class Body>
void for_segments(const SegmentArgs& args, const Body& body) {
  const int64_t blocks = (args.segments + kSegmentBlock - 1) / kSegmentBlock;
  parallel_for(blocks, args.elements, args.threads, [&](int64_t block) {
    const int64_t end = (block + 1) * kSegmentBlock < args.segments ? (block + 1) * kSegmentBlock : args.segments;
    for (int64_t s = block * kSegmentBlock; s < end; ++s) body(s, args.offsets[s], args.offsets[s + 1]);
  });
}

template <class T, class Real>
void segment_sum_of(const SegmentArgs& args) {
  const T* scores = static_cast<const T*>(args.in);
  Real* out = static_cast<Real*>(args.out);
  for_segments(args, [&](int64_t segment, int64_t begin, int64_t end) {
    double sums[8] = {};  // independent, so that a vector register holds them
    int64_t i = begin;
    for (; i + 8 <= end; i += 8) {
      for (int u = 0; u < 8; ++u) sums[u] += static_cast<double>(to_real(scores[i + u]));
    }
    for (int u = 0; i < end; ++i, ++u) sums[u] += static_cast<double>(to_real(scores[i]));
    out[segment] = static_cast<Real>(((sums[0] + sums[1]) + (sums[2] + sums[3])) +
                                     ((sums[4] + sums[5]) + (sums[6] + sums[7])));
  });
}

void segment_sum(const SegmentArgs& args) {
  switch (args.dtype) {
    case DType::float32: return segment_sum_of<float, float>(args);
    case DType::float64: return segment_sum_of<double, double>(args);
    case DType::float16: return segment_sum_of<f16, float>(args);
    case DType::bfloat16: return segment_sum_of<bf16, float>(args);
    default: return;
  }
}

template <class Real>
void segment_spread_of(const SegmentArgs& args) {
  const Real* in = static_cast<const Real*>(args.in);
  Real* out = static_cast<Real*>(args.out);
  for_segments(args, [&](int64_t segment, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = in[segment];
  });
}

void segment_spread(const SegmentArgs& args) {
  if (args.dtype == DType::float64) return segment_spread_of<double>(args);
  segment_spread_of<float>(args);
}

}  // namespace

extern const Attribution attribution_table;
const Attribution attribution_table = {&scores, &scores_backward, &segment_sum, &segment_spread};

}  // namespace RF_ISA
}  // namespace rf
