// Log-probability of one token a row, and the entropy of the row.
//
//   u = softcap * tanh(x / softcap), or x     z = u / T     logp = z_y - log sum_j exp(z_j)
//   H = -sum_j p_j log p_j                    p_j = exp(z_j) / sum
//
// Roofline: V e bytes read a row forward; V e read and V e written backward (e = element size). About 20 vector
// operations an element vector each way, which hides behind DRAM on every machine with two vector units.
//
// A row is cut into fixed chunks and a chunk into blocks that stay in L1: a block is read once from memory for
// its maximum and once from L1 for its sums. Chunks are folded in order, whoever computed them.
#include "logprob.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "logprob_lanes.h"
#include "parallel.h"

namespace rf {
namespace RF_ISA {
namespace {

// ---- forward ---------------------------------------------------------------------------------------------

int64_t id_of(const LogprobInput& in, int64_t i) {
  return in.id_dtype == DType::int64 ? static_cast<const int64_t*>(in.ids)[i]
                                     : static_cast<const int32_t*>(in.ids)[i];
}

template <class T>
const T* row_at(const LogprobInput& in, int64_t i) {
  return static_cast<const T*>(in.logits) + (i / in.inner) * in.outer_stride + (i % in.inner) * in.stride;
}

bool counts(const LogprobInput& in, int64_t i) { return in.mask == nullptr || in.mask[i]; }

template <bool capped, class T>
double chosen(const T* x, const Row& row, double) {
  return capped_logit<capped>(*x, row);
}
template <bool capped>
double chosen(const double* x, const Row&, double softcap) {
  return capped_logit<capped>(*x, softcap);
}

template <bool capped, class T, class Real>
void finish(const LogprobArgs& args, int64_t i, const Fold& fold, const Row& row) {
  const LogprobInput& in = args.in;
  const int64_t y = id_of(in, i);
  const double nan = __builtin_nan("");
  double log_sum = std::log1p((fold.ties - 1.0) + fold.rest), logp = nan, entropy = log_sum;
  if (fold.largest == __builtin_inf()) log_sum = entropy = nan;
  const bool empty = fold.largest == kMinusInfinity && fold.rest == 0;
  if (empty) {
    log_sum = kMinusInfinity;
    entropy = 0;
  } else {
    entropy -= fold.moment / (fold.ties + fold.rest);
  }
  if (y >= 0 && y < in.vocab) {
    const double u = chosen<capped>(row_at<T>(in, i) + y, row, in.softcap);
    logp = empty ? (u != u ? u : kMinusInfinity) : (u - fold.largest) * row.inverse_t - log_sum;
    logp = logp > 0 ? 0 : logp;
  }
  static_cast<Real*>(args.logp)[i] = static_cast<Real>(logp);
  if (args.entropy != nullptr) static_cast<Real*>(args.entropy)[i] = static_cast<Real>(entropy);
  static_cast<Real*>(args.stats)[i] = static_cast<Real>(fold.largest);
  static_cast<Real*>(args.stats)[in.rows + i] = static_cast<Real>(log_sum);
}

template <class Real>
void masked(const LogprobArgs& args, int64_t i) {
  static_cast<Real*>(args.logp)[i] = 0;
  if (args.entropy != nullptr) static_cast<Real*>(args.entropy)[i] = 0;
  static_cast<Real*>(args.stats)[i] = static_cast<Real*>(args.stats)[args.in.rows + i] = 0;
}

int64_t chunks_of(int64_t vocab) { return vocab <= kChunk ? 1 : (vocab + kChunk - 1) / kChunk; }

template <bool entropy, bool capped, class T, class Real>
void forward_of(const LogprobArgs& args) {
  const LogprobInput& in = args.in;
  const int64_t chunks = chunks_of(in.vocab), elements = in.rows * in.vocab;
  const auto chunk_fold = [&](int64_t i, int64_t c, const Row& row) {
    const int64_t size = c + 1 < chunks ? kChunk : in.vocab - c * kChunk;
    return fold_chunk<entropy, capped>(row_at<T>(in, i) + c * kChunk, size, row, in.softcap);
  };
  if (chunks > 1 && in.rows < 2 * static_cast<int64_t>(in.threads) && elements >= kSerialElements) {
    std::vector<Fold> folds(static_cast<size_t>(in.rows * chunks));
    parallel_for(in.rows * chunks, elements, in.threads, [&](int64_t unit) {
      const int64_t i = unit / chunks;
      if (counts(in, i)) folds[static_cast<size_t>(unit)] = chunk_fold(i, unit % chunks, row_of(in, i));
    });
    for (int64_t i = 0; i < in.rows; ++i) {
      if (!counts(in, i)) {
        masked<Real>(args, i);
        continue;
      }
      const Row row = row_of(in, i);
      Fold fold = folds[static_cast<size_t>(i * chunks)];
      for (int64_t c = 1; c < chunks; ++c) merge(fold, folds[static_cast<size_t>(i * chunks + c)], row.inverse_t);
      finish<capped, T, Real>(args, i, fold, row);
    }
    return;
  }
  const int64_t rows = in.vocab >= kChunk ? 1 : kChunk / (in.vocab + 1) + 1;  // a unit's
  parallel_for((in.rows + rows - 1) / rows, elements, in.threads, [&](int64_t unit) {
    const int64_t end = (unit + 1) * rows < in.rows ? (unit + 1) * rows : in.rows;
    for (int64_t i = unit * rows; i < end; ++i) {
      if (!counts(in, i)) {
        masked<Real>(args, i);
        continue;
      }
      const Row row = row_of(in, i);
      Fold fold = chunk_fold(i, 0, row);
      for (int64_t c = 1; c < chunks; ++c) merge(fold, chunk_fold(i, c, row), row.inverse_t);
      finish<capped, T, Real>(args, i, fold, row);
    }
  });
}

template <class T, class Real>
void forward_dtype(const LogprobArgs& args) {
  const bool capped = args.in.softcap > 0;
  if (args.entropy != nullptr) return capped ? forward_of<true, true, T, Real>(args) : forward_of<true, false, T, Real>(args);
  return capped ? forward_of<false, true, T, Real>(args) : forward_of<false, false, T, Real>(args);
}

void forward(const LogprobArgs& args) {
  switch (args.in.dtype) {
    case DType::float32: return forward_dtype<float, float>(args);
    case DType::float64: return forward_dtype<double, double>(args);
    case DType::float16: return forward_dtype<f16, float>(args);
    case DType::bfloat16: return forward_dtype<bf16, float>(args);
    default: return;
  }
}

LogprobCheck check(const LogprobInput& in, double low, double high) {
  for (int64_t i = 0; i < in.rows; ++i) {
    if (!counts(in, i)) continue;
    const int64_t y = id_of(in, i);
    if (y < 0 || y >= in.vocab) return {LogprobFault::token_ids, i};
    if (in.temperatures != nullptr && !(in.temperatures[i] >= low && in.temperatures[i] <= high)) {
      return {LogprobFault::temperature, i};
    }
  }
  return {LogprobFault::none, 0};
}

// ---- backward --------------------------------------------------------------------------------------------
//
//   d logp / d z_j = [j = y] - p_j      d H / d z_j = -p_j (log p_j + H)      d z / d x = slope / T
//
// so, with upstream g and h, d x_j = exp(d_j) (a + b d_j) slope_j, plus g slope_y / T for the chosen token.

struct Slope {
  double a, b;         // of exp(d) (a + b d)
  double g, h, largest, log_sum, entropy;
  int64_t y;
  bool zero;  // the whole row is exactly 0
};

template <class Real>
Slope slope_of(const LogprobBackwardArgs& args, int64_t i, double inverse_t) {
  const Real* stats = static_cast<const Real*>(args.stats);
  Slope s{};
  s.g = args.d_logp != nullptr ? static_cast<double>(static_cast<const Real*>(args.d_logp)[i]) : 0.0;
  s.h = args.d_entropy != nullptr ? static_cast<double>(static_cast<const Real*>(args.d_entropy)[i]) : 0.0;
  s.entropy = args.d_entropy != nullptr ? static_cast<double>(static_cast<const Real*>(args.entropy)[i]) : 0.0;
  s.largest = static_cast<double>(stats[i]);
  s.log_sum = static_cast<double>(stats[args.in.rows + i]);
  s.y = id_of(args.in, i);
  // A row without an allowed token has log_sum -inf; one without upstream gradient need not be read.
  s.zero = !counts(args.in, i) || (s.g == 0 && s.h == 0) || s.log_sum == kMinusInfinity;
  const double scale = std::exp(-s.log_sum) * inverse_t;
  s.a = (s.h * (s.log_sum - s.entropy) - s.g) * scale;
  s.b = -s.h * scale;
  if (s.largest == kMinusInfinity) s.largest = 0;  // NaN among forbidden tokens
  return s;
}

template <bool capped, class T>
void backward_chunk(const T* x, int64_t n, T* out, const Slope& s, const Row& row, double) {
  const f32v a = splat(static_cast<float>(s.a)), b = splat(static_cast<float>(s.b));
  const f32v largest = splat(static_cast<float>(s.largest));
  const auto slope = [&](f32v logits) {
    const Exponential found = exponential(logit<capped>(logits, row), largest, row);
    const f32v value = found.e * (b * found.d + a);
    return capped ? value * cap_slope(logits, row) : value;
  };
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(out + j, slope(load(x + j)));
  if (j < n) store_tail(out + j, n - j, slope(load_tail(x + j, n - j, -__builtin_inff())));
}

template <bool capped>
void backward_chunk(const double* x, int64_t n, double* out, const Slope& s, const Row& row, double softcap) {
  for (int64_t j = 0; j < n; ++j) {
    const double d = (capped_logit<capped>(x[j], softcap) - s.largest) * row.inverse_t, e = std::exp(d);
    const double tail = capped ? std::exp(-2 * std::fabs(x[j] / softcap)) : 1.0;
    out[j] = e == 0 ? 0 : e * (s.a + s.b * d) * (4 * tail / ((1 + tail) * (1 + tail)));
  }
}

inline double to_real(double x) { return x; }
template <class T>
double to_real(T x) {
  return static_cast<double>(to_float(x));
}
inline void from_real(double x, double& out) { out = x; }
template <class T>
void from_real(double x, T& out) {
  from_float(static_cast<float>(x), out);
}

// The chosen token apart, since 1 - p cancels when it is likely: g (1 - p) = -g expm1(logp).
template <bool capped, class T>
void backward_chosen(const T* x, T* out, const Slope& s, const Row& row, double softcap) {
  const double u = chosen<capped>(x, row, softcap);
  if (u == kMinusInfinity) return;
  const double gap = (u - s.largest) * row.inverse_t - s.log_sum, logp = gap > 0 ? 0 : gap;
  const double tail = capped ? std::exp(-2 * std::fabs(to_real(*x) / softcap)) : 1.0;
  const double slope = 4 * tail / ((1 + tail) * (1 + tail)) * row.inverse_t;
  from_real((-s.g * std::expm1(logp) - s.h * std::exp(logp) * (logp + s.entropy)) * slope, *out);
}

template <bool capped, class T, class Real>
void backward_of(const LogprobBackwardArgs& args) {
  const LogprobInput& in = args.in;
  T* d_logits = static_cast<T*>(args.d_logits);
  const int64_t chunks = chunks_of(in.vocab);
  const int64_t rows = in.vocab >= kChunk ? 1 : kChunk / (in.vocab + 1) + 1;
  parallel_for((in.rows + rows - 1) / rows * chunks, in.rows * in.vocab, in.threads, [&](int64_t unit) {
    const int64_t begin = unit / chunks * rows, end = begin + rows < in.rows ? begin + rows : in.rows;
    const int64_t first = unit % chunks * kChunk, n = in.vocab - first < kChunk ? in.vocab - first : kChunk;
    for (int64_t i = begin; i < end; ++i) {
      T* out = d_logits + i * in.vocab + first;
      const Row row = row_of(in, i);
      const Slope s = slope_of<Real>(args, i, row.inverse_t);
      if (s.zero) {
        std::memset(static_cast<void*>(out), 0, static_cast<size_t>(n) * sizeof(T));
        continue;
      }
      const T* x = row_at<T>(in, i) + first;
      backward_chunk<capped>(x, n, out, s, row, in.softcap);
      const int64_t y = s.y - first;
      if (y >= 0 && y < n) backward_chosen<capped>(x + y, out + y, s, row, in.softcap);
    }
  });
}

template <class T, class Real>
void backward_dtype(const LogprobBackwardArgs& args) {
  return args.in.softcap > 0 ? backward_of<true, T, Real>(args) : backward_of<false, T, Real>(args);
}

void backward(const LogprobBackwardArgs& args) {
  switch (args.in.dtype) {
    case DType::float32: return backward_dtype<float, float>(args);
    case DType::float64: return backward_dtype<double, double>(args);
    case DType::float16: return backward_dtype<f16, float>(args);
    case DType::bfloat16: return backward_dtype<bf16, float>(args);
    default: return;
  }
}

}  // namespace

extern const Logprob logprob_table;
const Logprob logprob_table = {&check, &forward, &backward};

}  // namespace RF_ISA
}  // namespace rf
