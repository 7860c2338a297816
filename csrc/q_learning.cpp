// Values over a vocabulary: the best token of a row, the expectation under a policy, the gradient of the soft
// maximum, logits guided by Q. n-step returns are in n_step.h.
//
// Roofline, a row of V elements of e bytes: best reads V e and compares each once; expected reads 2 V e for one
// exponential an element; the soft gradient reads and writes V e with one exponential; guided logits read 2 V e and
// write 4 V. All are bandwidth-bound from memory, the exponentials come close to arithmetic in cache.
#include "q_learning.h"

#include <cmath>

#include "n_step.h"
#include "parallel.h"
#include "exp.h"

namespace rf {
namespace RF_ISA {
namespace {

constexpr float kNone = -__builtin_inff();
// Vectors of a piece of a row: 256 floats with AVX-512, looked at a second time while they are in the L1 cache.
constexpr int kVectors = 16;
constexpr int64_t kPiece = kVectors * kLanes;

template <class T>
const T* row_of(const VocabRows& rows, int64_t row) {
  return rows.data == nullptr ? nullptr : static_cast<const T*>(rows.data) + rows.start(row);
}

template <class Body>
void for_counting(const VocabShape& shape, const Body& body) {
  parallel_for(shape.rows, shape.rows * shape.vocab, shape.threads, [&](int64_t row) {
    body(row, shape.mask == nullptr || shape.mask[row] != 0);
  });
}

// ---- the best token of a row -------------------------------------------------------------------------------

struct Best {
  double value;
  int64_t id;
};

// The largest of a piece, NaN if there is one: maxima first, and only a piece that beats all before it is searched.
template <class T>
f32v lower(const T* q, const T* other, int64_t j, int64_t count, i32v& unordered) {
  const f32v x = load_some(q + j, count, kNone);
  unordered |= x != x;
  if (other == nullptr) return x;
  const f32v y = load_some(other + j, count, kNone);
  unordered |= y != y;
  return x < y ? x : y;
}

inline bool any(i32v flags) {
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= flags[i];
  return found != 0;
}

template <class T>
double lower_at(const T* q, const T* other, int64_t j) {
  const double x = real(q[j]);
  if (other == nullptr) return x;
  const double y = real(other[j]);
  return x < y ? x : y;
}

template <class T>
Best best_of(const T* q, const T* other, int64_t vocab) {
  Best best{-HUGE_VAL, -1};
  i32v unordered{};
  for (int64_t begin = 0; begin < vocab; begin += kPiece) {
    const int64_t end = begin + kPiece < vocab ? begin + kPiece : vocab;
    f32v top[4] = {splat(kNone), splat(kNone), splat(kNone), splat(kNone)};
    int64_t j = begin;
    for (; j + 4 * kLanes <= end; j += 4 * kLanes) {
      for (int u = 0; u < 4; ++u) top[u] = max(lower(q, other, j + u * kLanes, kLanes, unordered), top[u]);
    }
    for (; j < end; j += kLanes) top[0] = max(lower(q, other, j, end - j, unordered), top[0]);
    const double found = max_lanes(max(max(top[0], top[1]), max(top[2], top[3])));
    if (!(found > best.value)) continue;
    j = begin;
    while (j < end - 1 && lower_at(q, other, j) != found) ++j;
    best = {found, j};
  }
  return any(unordered) ? Best{std::nan(""), -1} : best;
}

Best best_of(const double* q, const double* other, int64_t vocab) {
  Best best{-HUGE_VAL, -1};
  bool unordered = false;
  for (int64_t j = 0; j < vocab; ++j) {
    const double x = lower_at(q, other, j);
    unordered |= q[j] != q[j] || x != x;
    if (x > best.value) best = {x, j};
  }
  return unordered ? Best{std::nan(""), -1} : best;
}

template <class T, class Real>
void best_dtype(const BestArgs& args) {
  for_counting(args.shape, [&](int64_t row, bool counts) {
    Best best{0.0, -1};
    if (counts) best = best_of(row_of<T>(args.q, row), row_of<T>(args.other, row), args.shape.vocab);
    static_cast<Real*>(args.values)[row] = static_cast<Real>(best.value);
    args.ids[row] = best.id;
  });
}

// ---- the expectation under a policy ------------------------------------------------------------------------

// Sums relative to `largest`, moved along when a piece has a larger logit.
struct Softmax {
  double largest = -HUGE_VAL, sum = 0, moment = 0;

  void rise(double top, double inverse) {
    if (!(top > largest)) return;
    const double factor = largest == -HUGE_VAL ? 0.0 : std::exp((largest - top) * inverse);
    sum *= factor;
    moment = factor == 0 ? 0 : moment * factor;  // inf of tokens whose probability is 0 after all
    largest = top;
  }
};

template <class T>
double expected_of(const T* logits, const T* q, int64_t vocab, double inverse) {
  Softmax found;
  i32v unordered{};
  const f32v scale = splat(static_cast<float>(inverse));
  for (int64_t begin = 0; begin < vocab; begin += kPiece) {
    const int64_t end = begin + kPiece < vocab ? begin + kPiece : vocab;
    f32v top = splat(kNone);
    for (int64_t j = begin; j < end; j += kLanes) top = max(lower<T>(logits, nullptr, j, end - j, unordered), top);
    found.rise(max_lanes(top), inverse);
    if (found.largest == -HUGE_VAL) continue;
    const f32v reference = splat(static_cast<float>(found.largest));
    f32v sum{}, moment{};
    for (int64_t j = begin; j < end; j += kLanes) {
      const f32v x = load_some(logits + j, end - j, kNone), value = load_some(q + j, end - j);
      const f32v e = exp_nonpositive((x - reference) * scale);
      sum += e;
      moment += select(e == f32v{}, f32v{}, e * value);
    }
    found.sum += static_cast<double>(sum_lanes(sum));
    found.moment += static_cast<double>(sum_lanes(moment));
  }
  if (any(unordered)) return std::nan("");
  return found.largest == -HUGE_VAL ? -HUGE_VAL : found.moment / found.sum;
}

double expected_of(const double* logits, const double* q, int64_t vocab, double inverse) {
  Softmax found;
  for (int64_t j = 0; j < vocab; ++j) {
    if (logits[j] == -HUGE_VAL) continue;
    if (logits[j] != logits[j]) return logits[j];
    found.rise(logits[j], inverse);
    const double e = std::exp((logits[j] - found.largest) * inverse);
    found.sum += e;
    if (e != 0) found.moment += e * q[j];
  }
  return found.largest == -HUGE_VAL ? -HUGE_VAL : found.moment / found.sum;
}

template <class T, class Real>
void expected_dtype(const ExpectedArgs& args) {
  const double inverse = 1.0 / args.temperature;
  for_counting(args.shape, [&](int64_t row, bool counts) {
    double found = 0;
    if (counts) found = expected_of(row_of<T>(args.logits, row), row_of<T>(args.q, row), args.shape.vocab, inverse);
    static_cast<Real*>(args.out)[row] = static_cast<Real>(found);
  });
}

// ---- the gradient of the soft maximum ----------------------------------------------------------------------

template <class T>
void soft_row(const T* q, float largest, float log_sum, float g, double alpha, int64_t vocab, T* d_q) {
  const f32v reference = splat(largest), shift = splat(log_sum), scale = splat(static_cast<float>(1.0 / alpha));
  const f32v slope = splat(g), nothing{};
  for (int64_t j = 0; j < vocab; j += kLanes) {
    const f32v d = (load_some(q + j, vocab - j, kNone) - reference) * scale - shift;
    const f32v found = slope * exp_nonpositive(d > nothing ? nothing : d);
    store_some(d_q + j, vocab - j, found);
  }
}
void soft_row(const double* q, double largest, double log_sum, double g, double alpha, int64_t vocab, double* d_q) {
  for (int64_t j = 0; j < vocab; ++j) d_q[j] = g * std::exp((q[j] - largest) / alpha - log_sum);
}

template <class T, class Real>
void soft_backward_dtype(const SoftBackwardArgs& args) {
  const Real* largest = static_cast<const Real*>(args.stats);
  const Real* log_sum = largest + args.shape.rows;
  const Real* upstream = static_cast<const Real*>(args.upstream);
  const int64_t vocab = args.shape.vocab;
  if (vocab == 0) return;
  for_counting(args.shape, [&](int64_t row, bool counts) {
    T* d_q = static_cast<T*>(args.d_q) + row * vocab;
    if (!counts || largest[row] == static_cast<Real>(-HUGE_VAL)) {
      std::memset(d_q, 0, static_cast<size_t>(vocab) * sizeof(T));
    } else {
      soft_row(row_of<T>(args.q, row), largest[row], log_sum[row], upstream[row], args.alpha, vocab, d_q);
    }
  });
}

// ---- guided logits -----------------------------------------------------------------------------------------

template <class T>
void guide_row(const T* logits, const T* q, const T* other, float value, double beta, int64_t vocab, float* out) {
  const f32v weight = splat(static_cast<float>(beta)), baseline = splat(value), none = splat(kNone);
  for (int64_t j = 0; j < vocab; j += kLanes) {
    const f32v x = load_some(logits + j, vocab - j);
    f32v advantage = load_some(q + j, vocab - j);
    if (other != nullptr) {
      const f32v y = load_some(other + j, vocab - j);
      advantage = (advantage < y) | (advantage != advantage) ? advantage : y;
    }
    const f32v found = select((x == none) | (advantage == none), none, x + weight * (advantage - baseline));
    store_some(out + j, vocab - j, found);
  }
}
void guide_row(const double* logits, const double* q, const double* other, double value, double beta, int64_t vocab,
               double* out) {
  for (int64_t j = 0; j < vocab; ++j) {
    const double lowest = other == nullptr || q[j] != q[j] || q[j] < other[j] ? q[j] : other[j];
    out[j] = logits[j] == -HUGE_VAL || lowest == -HUGE_VAL ? -HUGE_VAL : logits[j] + beta * (lowest - value);
  }
}

template <class T, class Real>
void guide_dtype(const GuideArgs& args) {
  const Real* values = static_cast<const Real*>(args.values);
  const int64_t vocab = args.shape.vocab;
  for_counting(args.shape, [&](int64_t row, bool) {
    guide_row(row_of<T>(args.logits, row), row_of<T>(args.q, row), row_of<T>(args.other, row),
              values != nullptr ? values[row] : Real(0), args.beta, vocab, static_cast<Real*>(args.out) + row * vocab);
  });
}

void best(const BestArgs& args) { RF_BY_DTYPE(best_dtype, args.shape.dtype) }
void expected(const ExpectedArgs& args) { RF_BY_DTYPE(expected_dtype, args.shape.dtype) }
void soft_backward(const SoftBackwardArgs& args) { RF_BY_DTYPE(soft_backward_dtype, args.shape.dtype) }
void guide(const GuideArgs& args) { RF_BY_DTYPE(guide_dtype, args.shape.dtype) }
void n_step(const NStepArgs& args) { RF_BY_DTYPE(n_step_dtype, args.in.dtype) }
// Gradients are Real whatever the input was.
void n_step_backward(const NStepBackwardArgs& args) {
  if (args.in.dtype == DType::float64) return n_step_backward_dtype<double>(args);
  return n_step_backward_dtype<float>(args);
}

}  // namespace

extern const QLearning q_learning_table;
const QLearning q_learning_table = {&best, &expected, &soft_backward, &guide, &n_step, &n_step_backward};

}  // namespace RF_ISA
}  // namespace rf
