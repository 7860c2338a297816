// Log-probabilities from tiles of logits that never exist as a whole: between two GEMMs a tile is folded into a
// few numbers a row, and turned into what the next GEMM multiplies.
//
//   forward    (largest, sum, moment, chosen) <- tile;   tile <- exp(d) du/dx, so that tile @ W sums p_j W_j
//   backward   tile <- d loss / d logit, so that tile^T @ hidden is the tile's part of dW
//
// Roofline, per logit of e bytes: e read and e written where the GEMM has just left it, in cache, for about 30
// vector operations a vector; the GEMM beside it takes 2 D flops a logit, some hundred times as much.
#include "linear_logprob.h"

#include "logprob_fold.h"
#include "parallel.h"

namespace rf {
namespace RF_ISA {
namespace {

// Columns that are folded as one, 8 KiB of float32; tiles are whole numbers of them (UNIT of react_fast/ops/_tiles.py).
constexpr int64_t kUnit = 2048;

double temperature_of(const LogitTile& in, int64_t i) {
  return in.temperatures != nullptr ? in.temperatures[i] : in.temperature;
}

// Row i of a contiguous output like the tile, or of the tile itself.
template <class T>
T* row_of_output(void* out, const LogitTile& in, int64_t i) {
  return out != nullptr ? static_cast<T*>(out) + i * in.columns : static_cast<T*>(in.tile) + i * in.stride;
}

Row tile_row(const LogitTile& in, int64_t i) { return Row(temperature_of(in, i), in.softcap); }

template <class Body>
void for_rows(const LogitTile& in, const Body& body) {
  parallel_for(in.rows, in.rows * in.columns, in.threads, body);
}

// ---- float lanes: blocks of capped logits in L1 ----------------------------------------------------------------

// x of columns [begin, begin + n), n <= kUnit; lanes behind the end are -inf, which adds nothing.
template <class T>
void logits_of(const LogitTile& in, const T* tile, const T* bias, int64_t n, float* x) {
  const f32v scale = splat(static_cast<float>(in.scale));
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    f32v v = load(tile + j);
    if (bias != nullptr) v += load(bias + j);
    store(x + j, v * scale);
  }
  if (j < n) {
    f32v v = load_tail(tile + j, n - j, 0.0f);
    if (bias != nullptr) v += load_tail(bias + j, n - j, 0.0f);
    v = v * scale;
    for (int i = 0; i < kLanes; ++i) x[j + i] = i < n - j ? v[i] : -__builtin_inff();
  }
}

template <bool capped>
void cap_block(float* x, int64_t n, const Row& row) {
  if (!capped) return;
  for (int64_t j = 0; j < n; j += kLanes) store(x + j, cap(load(x + j), row));
}

// A row of the tile, block by block: body(first column, size, x).
template <class T, class Body>
void for_blocks(const LogitTile& in, int64_t i, const Body& body) {
  alignas(64) float x[kUnit + kLanes];
  const T* tile = static_cast<const T*>(in.tile) + i * in.stride;
  for (int64_t j = 0; j < in.columns; j += kUnit) {
    const int64_t n = in.columns - j < kUnit ? in.columns - j : kUnit;
    logits_of(in, tile + j, in.bias != nullptr ? static_cast<const T*>(in.bias) + j : nullptr, n, x);
    body(j, n, x);
  }
}

template <bool entropy, bool capped, class T>
void fold_row(const FoldTileArgs& args, int64_t i) {
  const LogitTile& in = args.in;
  const Row row = tile_row(in, i);
  double* state = args.state + i * kLogprobState;
  // Block by block in the vocabulary's order, so that the result does not depend on the tiles' width.
  Fold total{state[0], state[1], state[2], state[3]};
  const int64_t y = in.ids[i] - in.first;
  for_blocks<T>(in, i, [&](int64_t j, int64_t n, float* x) {
    cap_block<capped>(x, n, row);
    if (y >= j && y < j + n) state[4] = static_cast<double>(x[y - j]);
    merge(total, fold_block<entropy>(x, n, row), row.inverse_t);
  });
  state[0] = total.largest, state[1] = total.ties, state[2] = total.rest, state[3] = total.moment;
}

// (old - new) / T, the shift of every earlier d; 0 where there was nothing before.
double shift_of(double before, double now, double inverse_t) {
  if (before == kMinusInfinity || before == now) return 0;
  const double shift = (before - now) * inverse_t;
  return shift < -800.0 ? -800.0 : shift;
}

template <bool capped, class T>
void weigh_row(const FoldTileArgs& args, int64_t i, double largest) {
  const LogitTile& in = args.in;
  const Row row = tile_row(in, i);
  const f32v reference = splat(largest == kMinusInfinity ? 0.0f : static_cast<float>(largest));
  T* weights = row_of_output<T>(args.weights, in, i);
  T* weighted = args.weighted != nullptr ? static_cast<T*>(args.weighted) + i * in.columns : nullptr;
  const int64_t y = in.ids[i] - in.first;
  for_blocks<T>(in, i, [&](int64_t first, int64_t n, float* x) {
    T* out = weights + first;
    for (int64_t j = 0; j < n; j += kLanes) {
      const f32v v = load(x + j);
      const Exponential found = exponential(logit<capped>(v, row), reference, row);
      f32v w = found.e;
      if (capped) w *= cap_slope(v, row);
      if (y >= first + j && y < first + j + kLanes) w[y - first - j] = 0.0f;
      if (j + kLanes <= n) {
        store(out + j, w);
        if (weighted != nullptr) store(weighted + first + j, w * found.d);
      } else {
        store_tail(out + j, n - j, w);
        if (weighted != nullptr) store_tail(weighted + first + j, n - j, w * found.d);
      }
    }
  });
}

// ---- double, element by element ----------------------------------------------------------------------------------

double double_logit(const LogitTile& in, const double* tile, int64_t j) {
  const double* bias = static_cast<const double*>(in.bias);
  return in.scale * (tile[j] + (bias != nullptr ? bias[j] : 0.0));
}

double double_slope(const LogitTile& in, double x) {
  if (in.softcap == 0) return 1;
  const double tail = std::exp(-2 * std::fabs(x / in.softcap));
  return 4 * tail / ((1 + tail) * (1 + tail));
}

double double_cap(const LogitTile& in, double x) {
  return in.softcap > 0 ? capped_logit<true>(x, in.softcap) : x;
}

void fold_row(const FoldTileArgs& args, int64_t i, double) {
  const LogitTile& in = args.in;
  const double* tile = static_cast<const double*>(in.tile) + i * in.stride;
  const double inverse_t = 1.0 / temperature_of(in, i);
  double* state = args.state + i * kLogprobState;
  Fold total{state[0], state[1], state[2], state[3]};
  for (int64_t j = 0; j < in.columns; ++j) {
    Fold one;
    one.largest = double_cap(in, double_logit(in, tile, j));
    if (in.ids[i] == in.first + j) state[4] = one.largest;
    if (one.largest == kMinusInfinity) continue;
    if (one.largest != one.largest) one.rest = one.largest;
    one.ties = 1;
    merge(total, one, inverse_t);
  }
  state[0] = total.largest, state[1] = total.ties, state[2] = total.rest, state[3] = total.moment;
}

void weigh_row(const FoldTileArgs& args, int64_t i, double largest, double) {
  const LogitTile& in = args.in;
  const double* tile = static_cast<const double*>(in.tile) + i * in.stride;
  double* weights = row_of_output<double>(args.weights, in, i);
  double* weighted = args.weighted != nullptr ? static_cast<double*>(args.weighted) + i * in.columns : nullptr;
  const double inverse_t = 1.0 / temperature_of(in, i), reference = largest == kMinusInfinity ? 0 : largest;
  for (int64_t j = 0; j < in.columns; ++j) {
    const double x = double_logit(in, tile, j), d = (double_cap(in, x) - reference) * inverse_t, e = std::exp(d);
    const double w = in.ids[i] == in.first + j || e == 0 ? 0 : e * double_slope(in, x);
    weights[j] = w;
    if (weighted != nullptr) weighted[j] = w == 0 ? 0 : w * d;
  }
}

// ---- forward -----------------------------------------------------------------------------------------------------

template <class T, class Real>
void fold_of(const FoldTileArgs& args) {
  const LogitTile& in = args.in;
  const bool capped = in.softcap > 0;
  for_rows(in, [&](int64_t i) {
    double* state = args.state + i * kLogprobState;
    const double before = state[0];
    if constexpr (sizeof(T) == 8) {
      fold_row(args, i, 0.0);
    } else if (args.moment) {
      capped ? fold_row<true, true, T>(args, i) : fold_row<true, false, T>(args, i);
    } else {
      capped ? fold_row<false, true, T>(args, i) : fold_row<false, false, T>(args, i);
    }
    if (args.factor == nullptr) return;
    const double shift = shift_of(before, state[0], 1.0 / temperature_of(in, i));
    static_cast<Real*>(args.factor)[i] = static_cast<Real>(std::exp(shift));
    static_cast<Real*>(args.shift)[i] = static_cast<Real>(shift);
    if constexpr (sizeof(T) == 8) {
      weigh_row(args, i, state[0], 0.0);
    } else {
      capped ? weigh_row<true, T>(args, i, state[0]) : weigh_row<false, T>(args, i, state[0]);
    }
  });
}

void fold(const FoldTileArgs& args) {
  switch (args.in.dtype) {
    case DType::float32: return fold_of<float, float>(args);
    case DType::float64: return fold_of<double, double>(args);
    case DType::float16: return fold_of<f16, float>(args);
    case DType::bfloat16: return fold_of<bf16, float>(args);
    default: return;
  }
}

// ---- backward ----------------------------------------------------------------------------------------------------
//
//   d logp / d z_j = [j = y] - p_j      d H / d z_j = -p_j (log p_j + H)      d z / d (tile + bias) = slope scale / T

struct Turn {
  double largest, log_sum, entropy, g, h, scale;
  bool zero;
};

Turn turn_of(const TurnTileArgs& args, int64_t i) {
  const double* s = args.stats + i * kLogprobState;
  Turn t{s[0], s[1], s[2], s[3], s[4], args.in.scale / temperature_of(args.in, i), false};
  t.zero = (t.g == 0 && t.h == 0) || t.log_sum == kMinusInfinity;
  if (t.largest == kMinusInfinity) t.largest = 0;
  return t;
}

// The chosen token apart: 1 - p = -expm1(log p) does not cancel.
double turn_chosen(const Turn& t, double d, double slope) {
  const double gap = d - t.log_sum, logp = gap > 0 ? 0 : gap;
  if (d == kMinusInfinity) return 0;
  return (-t.g * std::expm1(logp) - t.h * std::exp(logp) * (logp + t.entropy)) * slope * t.scale;
}

inline void put(double x, double& out) { out = x; }
template <class T>
void put(double x, T& out) {
  from_float(static_cast<float>(x), out);
}

template <bool capped, class T>
void turn_row(const TurnTileArgs& args, int64_t i, const Turn& t) {
  const LogitTile& in = args.in;
  const Row row = tile_row(in, i);
  const double share = std::exp(-t.log_sum) * t.scale;
  const f32v a = splat(static_cast<float>((t.h * (t.log_sum - t.entropy) - t.g) * share));
  const f32v b = splat(static_cast<float>(-t.h * share)), largest = splat(static_cast<float>(t.largest));
  const int64_t y = in.ids[i] - in.first;
  T* turned = row_of_output<T>(args.out, in, i);
  for_blocks<T>(in, i, [&](int64_t first, int64_t n, float* x) {
    T* out = turned + first;
    for (int64_t j = 0; j < n; j += kLanes) {
      const f32v v = load(x + j);
      const Exponential found = exponential(logit<capped>(v, row), largest, row);
      f32v value = found.e * (b * found.d + a);
      if (capped) value *= cap_slope(v, row);
      j + kLanes <= n ? store(out + j, value) : store_tail(out + j, n - j, value);
    }
    if (y < first || y >= first + n) return;
    const double chosen = static_cast<double>(x[y - first]);
    const double u = static_cast<double>(logit<capped>(splat(x[y - first]), row)[0]);
    put(turn_chosen(t, (u - t.largest) * row.inverse_t, double_slope(in, chosen)), out[y - first]);
  });
}

void turn_row(const TurnTileArgs& args, int64_t i, const Turn& t, double) {
  const LogitTile& in = args.in;
  const double* tile = static_cast<const double*>(in.tile) + i * in.stride;
  double* out = row_of_output<double>(args.out, in, i);
  const double share = std::exp(-t.log_sum) * t.scale, inverse_t = 1.0 / temperature_of(in, i);
  for (int64_t j = 0; j < in.columns; ++j) {
    const double x = double_logit(in, tile, j), d = (double_cap(in, x) - t.largest) * inverse_t, e = std::exp(d);
    if (in.ids[i] == in.first + j) {
      out[j] = turn_chosen(t, d, double_slope(in, x));
    } else {
      out[j] = e == 0 ? 0 : e * (t.h * (t.log_sum - t.entropy - d) - t.g) * share * double_slope(in, x);
    }
  }
}

template <class T>
void turn_of_type(const TurnTileArgs& args) {
  const LogitTile& in = args.in;
  for_rows(in, [&](int64_t i) {
    const Turn t = turn_of(args, i);
    if (t.zero) {
      T* out = row_of_output<T>(args.out, in, i);
      for (int64_t j = 0; j < in.columns; ++j) put(0.0, out[j]);
      return;
    }
    if constexpr (sizeof(T) == 8) {
      turn_row(args, i, t, 0.0);
    } else {
      in.softcap > 0 ? turn_row<true, T>(args, i, t) : turn_row<false, T>(args, i, t);
    }
  });
}

void turn(const TurnTileArgs& args) {
  switch (args.in.dtype) {
    case DType::float32: return turn_of_type<float>(args);
    case DType::float64: return turn_of_type<double>(args);
    case DType::float16: return turn_of_type<f16>(args);
    case DType::bfloat16: return turn_of_type<bf16>(args);
    default: return;
  }
}

}  // namespace

extern const LinearLogprob linear_logprob_table;
const LinearLogprob linear_logprob_table = {&fold, &turn};

}  // namespace RF_ISA
}  // namespace rf
