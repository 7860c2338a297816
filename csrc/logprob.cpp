// Log-probabilities of the chosen tokens of every row, and the entropy of the row.
//
//   u = softcap * tanh(x / softcap), or x     z = u / T     logp_k = z_y(k) - log sum_j exp(z_j)
//   H = -sum_j p_j log p_j                    p_j = exp(z_j) / sum
//
// j runs over the kept tokens: those with x_j not below the row's floor, and the chosen ones.
//
// Roofline: V e bytes read a row forward; V e read and V e written backward (e = element size), in place or to memory
// that is there; fresh memory is filled with zeros by the system first. Forward 14 vector operations a vector of
// logits, 3 more with the entropy: float32 hides them behind DRAM, 16-bit logits keep the arithmetic units as busy.
//
// A row is cut into blocks that stay in L1: a block is read once from memory for its largest logit and once from L1
// for its sums. Blocks are added up in order, whoever summed them.
#include "logprob.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "logprob_chosen.h"
#include "logprob_fold.h"
#include "memory.h"
#include "parallel.h"

namespace rf {
namespace RF_ISA {
namespace {

// ---- forward ---------------------------------------------------------------------------------------------

// Token k of row i.
int64_t id_of(const LogprobInput& in, int64_t i, int64_t k) {
  const int64_t element = i * in.tokens + k;
  return in.id_dtype == DType::int64 ? static_cast<const int64_t*>(in.ids)[element]
                                     : static_cast<const int32_t*>(in.ids)[element];
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

// Chosen tokens below the floor join the kept set, each once.
template <bool capped, class T>
void keep_chosen(Fold& fold, const LogprobInput& in, int64_t i, const T* x, const Row& row) {
  std::vector<Chosen> below;
  for (int64_t k = 0; k < in.tokens; ++k) {
    const int64_t y = id_of(in, i, k);
    if (y >= 0 && y < in.vocab && to_real(x[y]) < row.floor) below.push_back({y, 0.0, 0.0});
  }
  const int64_t n = unite(below.data(), static_cast<int64_t>(below.size()));
  for (int64_t k = 0; k < n; ++k) {
    Fold one;
    one.largest = chosen<capped>(x + below[static_cast<size_t>(k)].id, row, in.softcap);
    one.ties = 1;
    if (one.largest != kMinusInfinity) merge(fold, one, row.inverse_t);
  }
}

template <bool capped, class T, class Real>
void finish(const LogprobArgs& args, int64_t i, Fold fold, const Row& row) {
  const LogprobInput& in = args.in;
  const T* x = row_at<T>(in, i);
  if (in.floors != nullptr) keep_chosen<capped>(fold, in, i, x, row);
  const double nan = __builtin_nan("");
  double log_sum = std::log1p((fold.ties - 1.0) + fold.rest), entropy = log_sum;
  if (fold.largest == __builtin_inf()) log_sum = entropy = nan;
  const bool empty = fold.largest == kMinusInfinity && fold.rest == 0;
  if (empty) {
    log_sum = kMinusInfinity;
    entropy = 0;
  } else {
    entropy -= fold.moment / (fold.ties + fold.rest);
  }
  for (int64_t k = 0; k < in.tokens; ++k) {
    const int64_t y = id_of(in, i, k);
    double logp = nan;
    if (y >= 0 && y < in.vocab) {
      const double u = chosen<capped>(x + y, row, in.softcap);
      logp = empty ? (u != u ? u : kMinusInfinity) : (u - fold.largest) * row.inverse_t - log_sum;
      logp = logp > 0 ? 0 : logp;
    }
    static_cast<Real*>(args.logp)[i * in.tokens + k] = static_cast<Real>(logp);
  }
  if (args.entropy != nullptr) static_cast<Real*>(args.entropy)[i] = static_cast<Real>(entropy);
  static_cast<Real*>(args.stats)[i] = static_cast<Real>(fold.largest);
  static_cast<Real*>(args.stats)[in.rows + i] = static_cast<Real>(log_sum);
}

template <class Real>
void masked(const LogprobArgs& args, int64_t i) {
  const int64_t tokens = args.in.tokens;
  for (int64_t k = 0; k < tokens; ++k) static_cast<Real*>(args.logp)[i * tokens + k] = 0;
  if (args.entropy != nullptr) static_cast<Real*>(args.entropy)[i] = 0;
  static_cast<Real*>(args.stats)[i] = static_cast<Real*>(args.stats)[args.in.rows + i] = 0;
}

int64_t chunks_of(int64_t vocab) { return vocab <= kChunk ? 1 : (vocab + kChunk - 1) / kChunk; }

template <bool entropy, bool capped, bool floored, class T, class Real>
void forward_of(const LogprobArgs& args) {
  const LogprobInput& in = args.in;
  const int64_t parts = parts_in<T>(in.vocab), elements = in.rows * in.vocab;
  const bool few = in.vocab > kChunk && in.rows < 2 * static_cast<int64_t>(in.threads) && elements >= kSerialElements;
  std::vector<Part> shared(static_cast<size_t>(few ? in.rows * parts : 0));
  if (few) {
    const int64_t chunks = chunks_of(in.vocab), run = kChunk / kBlock<T>;
    parallel_for(in.rows * chunks, elements, in.threads, [&](int64_t unit) {
      const int64_t i = unit / chunks, begin = unit % chunks * run, end = begin + run < parts ? begin + run : parts;
      if (!counts(in, i)) return;
      sum_parts<entropy, capped, floored>(row_at<T>(in, i), begin, end, in.vocab, shared.data() + i * parts,
                                          row_of(in, i), in.softcap);
    });
  }
  const int64_t rows = in.vocab >= kChunk ? 1 : kChunk / (in.vocab + 1) + 1;  // a unit's
  parallel_for((in.rows + rows - 1) / rows, few ? 0 : elements, in.threads, [&](int64_t unit) {
    std::vector<Part> own(static_cast<size_t>(few ? 0 : parts));
    const int64_t end = (unit + 1) * rows < in.rows ? (unit + 1) * rows : in.rows;
    for (int64_t i = unit * rows; i < end; ++i) {
      if (!counts(in, i)) {
        masked<Real>(args, i);
        continue;
      }
      const Row row = row_of(in, i);
      const T* x = row_at<T>(in, i);
      const Fold fold =
          few ? fold_parts<entropy, capped, floored>(x, in.vocab, shared.data() + i * parts, row, in.softcap)
              : fold_row<entropy, capped, floored>(x, in.vocab, own.data(), row, in.softcap);
      finish<capped, T, Real>(args, i, fold, row);
    }
  });
}

template <bool entropy, bool capped, class T, class Real>
void forward_floor(const LogprobArgs& args) {
  return args.in.floors != nullptr ? forward_of<entropy, capped, true, T, Real>(args)
                                   : forward_of<entropy, capped, false, T, Real>(args);
}

template <class T, class Real>
void forward_dtype(const LogprobArgs& args) {
  const bool capped = args.in.softcap > 0;
  if (args.entropy != nullptr) {
    return capped ? forward_floor<true, true, T, Real>(args) : forward_floor<true, false, T, Real>(args);
  }
  return capped ? forward_floor<false, true, T, Real>(args) : forward_floor<false, false, T, Real>(args);
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
    for (int64_t k = 0; k < in.tokens; ++k) {
      const int64_t y = id_of(in, i, k);
      if (y < 0 || y >= in.vocab) return {LogprobFault::token_ids, i * in.tokens + k};
    }
    if (in.temperatures != nullptr && !(in.temperatures[i] >= low && in.temperatures[i] <= high)) {
      return {LogprobFault::temperature, i};
    }
    if (in.floors != nullptr && in.floors[i] != in.floors[i]) return {LogprobFault::logit_floor, i};
  }
  return {LogprobFault::none, 0};
}

// ---- backward --------------------------------------------------------------------------------------------
//
//   d logp_k / d z_j = [j = y(k)] - p_j      d H / d z_j = -p_j (log p_j + H)      d z / d x = slope / T
//
// so, with upstream g_k, their sum g, and h, d x_j = exp(d_j) (a + b d_j) slope_j, plus g_k slope / T for token k.

struct Slope {
  double a, b;         // of exp(d) (a + b d)
  double g, h, largest, log_sum, entropy;
  bool zero;  // the whole row is exactly 0
};

template <class Real>
double upstream_of(const LogprobBackwardArgs& args, int64_t i, int64_t k) {
  return args.d_logp != nullptr ? static_cast<double>(static_cast<const Real*>(args.d_logp)[i * args.in.tokens + k])
                                : 0.0;
}

template <class Real>
Slope slope_of(const LogprobBackwardArgs& args, int64_t i, double inverse_t) {
  const Real* stats = static_cast<const Real*>(args.stats);
  Slope s{};
  bool none = true;
  for (int64_t k = 0; k < args.in.tokens; ++k) {
    const double g = upstream_of<Real>(args, i, k);
    none = none && g == 0;
    s.g += g;
  }
  s.h = args.d_entropy != nullptr ? static_cast<double>(static_cast<const Real*>(args.d_entropy)[i]) : 0.0;
  s.entropy = args.d_entropy != nullptr ? static_cast<double>(static_cast<const Real*>(args.entropy)[i]) : 0.0;
  s.largest = static_cast<double>(stats[i]);
  s.log_sum = static_cast<double>(stats[args.in.rows + i]);
  // A row without an allowed token has log_sum -inf; one without upstream gradient need not be read.
  s.zero = !counts(args.in, i) || (none && s.h == 0) || s.log_sum == kMinusInfinity;
  const double scale = std::exp(-s.log_sum) * inverse_t;
  s.a = (s.h * (s.log_sum - s.entropy) - s.g) * scale;
  s.b = -s.h * scale;
  if (s.largest == kMinusInfinity) s.largest = 0;  // NaN among forbidden tokens
  return s;
}

// out[j] = slope(x[j]).
template <class T, class Function>
__attribute__((always_inline)) inline void each(const T* x, int64_t n, T* out, const Function& slope) {
  constexpr int64_t step = 2 * kLanes;
  int64_t j = 0;
  for (; j + step <= n; j += step) {
    prefetch_pair(x + j);
    const Pair v = load_pair(x + j);
    store_pair(out + j, {slope(v.first), slope(v.second)});
  }
  for (; j + kLanes <= n; j += kLanes) store(out + j, slope(load(x + j)));
  if (j < n) store_tail(out + j, n - j, slope(load_tail(x + j, n - j, kForbidden)));
}

template <bool entropy, bool capped, bool floored, class T>
void backward_chunk(const T* x, int64_t n, T* out, const Slope& s, const Row& row, double) {
  const f32v floor = splat(static_cast<float>(row.floor));
#if RF_POWERS
  // Not where b / T, which a float has to hold, is beyond any use.
  if (Powers::hold(s.largest, row) && std::fabs(s.b * row.inverse_t) < 1e30) {
    const Powers powers(s.largest, row);
    const double scale = std::exp2(powers.whole - s.largest * row.log2_t);
    const f32v a = splat(static_cast<float>(s.a * scale)), b = splat(static_cast<float>(s.b * row.inverse_t * scale));
    return each(x, n, out, [&](f32v given) __attribute__((always_inline)) {
      const f32v logits = kept<floored>(given, floor);
      f32v none{};
      const Factors found = factors<false>(logit<capped>(logits, row), powers, none);
      const f32v value = found.y * found.s * (entropy ? fused(b, found.gap, a) : a);
      return capped ? value * cap_slope(logits, row) : value;
    });
  }
#endif
  const f32v a = splat(static_cast<float>(s.a)), b = splat(static_cast<float>(s.b));
  const f32v largest = splat(static_cast<float>(s.largest));
  each(x, n, out, [&](f32v given) __attribute__((always_inline)) {
    const f32v logits = kept<floored>(given, floor);
    const Exponential found = exponential(logit<capped>(logits, row), largest, row);
    const f32v value = found.e * (entropy ? b * found.d + a : a);
    return capped ? value * cap_slope(logits, row) : value;
  });
}

template <bool, bool capped, bool floored>
void backward_chunk(const double* x, int64_t n, double* out, const Slope& s, const Row& row, double softcap) {
  for (int64_t j = 0; j < n; ++j) {
    const double given = floored && x[j] < row.floor ? kMinusInfinity : x[j];
    const double d = (capped_logit<capped>(given, softcap) - s.largest) * row.inverse_t, e = std::exp(d);
    const double tail = capped ? std::exp(-2 * std::fabs(given / softcap)) : 1.0;
    out[j] = e == 0 ? 0 : e * (s.a + s.b * d) * (4 * tail / ((1 + tail) * (1 + tail)));
  }
}

// A chosen token apart, since 1 - p cancels when it is likely: with its own g and the others' g', its gradient is
// g (1 - p) - g' p = -g expm1(logp) - g' p.
template <bool capped, class T>
double chosen_gradient(const T* x, double g, const Slope& s, const Row& row, double softcap) {
  const double u = chosen<capped>(x, row, softcap);
  if (u == kMinusInfinity) return 0;
  const double gap = (u - s.largest) * row.inverse_t - s.log_sum, logp = gap > 0 ? 0 : gap, p = std::exp(logp);
  const double tail = capped ? std::exp(-2 * std::fabs(to_real(*x) / softcap)) : 1.0;
  const double slope = 4 * tail / ((1 + tail) * (1 + tail)) * row.inverse_t;
  return (-g * std::expm1(logp) - (s.g - g) * p - s.h * p * (logp + s.entropy)) * slope;
}

// The chosen tokens among logits [first, first + n) of row i, and their gradients; returns how many.
template <bool capped, class T, class Real>
int64_t chosen_in(const LogprobBackwardArgs& args, int64_t i, int64_t first, int64_t n, const Slope& s,
                  const Row& row, Chosen* found) {
  const LogprobInput& in = args.in;
  int64_t count = 0;
  for (int64_t k = 0; k < in.tokens; ++k) {
    const int64_t y = id_of(in, i, k);
    if (y >= first && y < first + n) found[count++] = {y, upstream_of<Real>(args, i, k), 0.0};
  }
  count = unite(found, count);
  const T* x = row_at<T>(in, i);
  for (int64_t k = 0; k < count; ++k) {
    found[k].gradient = chosen_gradient<capped>(x + found[k].id, found[k].g, s, row, in.softcap);
  }
  return count;
}

template <bool entropy, bool capped, bool floored, class T, class Real>
void backward_of(const LogprobBackwardArgs& args) {
  const LogprobInput& in = args.in;
  const bool in_place = args.d_logits == in.logits;
  T* d_logits = static_cast<T*>(args.d_logits);
  if (!in_place) prefer_large_pages(d_logits, static_cast<size_t>(in.rows * in.vocab) * sizeof(T));
  const int64_t chunks = chunks_of(in.vocab);
  const int64_t rows = in.vocab >= kChunk ? 1 : kChunk / (in.vocab + 1) + 1;
  parallel_for((in.rows + rows - 1) / rows * chunks, in.rows * in.vocab, in.threads, [&](int64_t unit) {
    const int64_t begin = unit / chunks * rows, end = begin + rows < in.rows ? begin + rows : in.rows;
    const int64_t first = unit % chunks * kChunk, n = in.vocab - first < kChunk ? in.vocab - first : kChunk;
    std::vector<Chosen> found(static_cast<size_t>(in.tokens));
    for (int64_t i = begin; i < end; ++i) {
      const T* x = row_at<T>(in, i);
      T* out = d_logits + (in_place ? x - static_cast<const T*>(in.logits) : i * in.vocab);
      const Row row = row_of(in, i);
      const Slope s = slope_of<Real>(args, i, row.inverse_t);
      if (s.zero) {
        std::memset(static_cast<void*>(out + first), 0, static_cast<size_t>(n) * sizeof(T));
        continue;
      }
      // Before the chunk is written, which may be where it is read.
      const int64_t count = chosen_in<capped, T, Real>(args, i, first, n, s, row, found.data());
      backward_chunk<entropy, capped, floored>(x + first, n, out + first, s, row, in.softcap);
      for (int64_t k = 0; k < count; ++k) {
        const Chosen& token = found[static_cast<size_t>(k)];
        from_real(token.gradient, out[token.id]);
      }
    }
  });
}

template <bool entropy, bool capped, class T, class Real>
void backward_floor(const LogprobBackwardArgs& args) {
  return args.in.floors != nullptr ? backward_of<entropy, capped, true, T, Real>(args)
                                   : backward_of<entropy, capped, false, T, Real>(args);
}

template <class T, class Real>
void backward_dtype(const LogprobBackwardArgs& args) {
  const bool capped = args.in.softcap > 0;
  if (args.d_entropy != nullptr) {
    return capped ? backward_floor<true, true, T, Real>(args) : backward_floor<true, false, T, Real>(args);
  }
  return capped ? backward_floor<false, true, T, Real>(args) : backward_floor<false, false, T, Real>(args);
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
