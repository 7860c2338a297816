// Moments and whitening.
//
//   mean = sum x / n      M2 = sum (x - mean)^2      y = (x - mean) / sqrt(M2 / (n - ddof) + eps), over counting elements
//
// Roofline: 5 bytes an element are read for the moments and 5 for the scaling, which writes 4, for some 6 flops:
// bandwidth-bound. A block of kBlock elements is read twice for its own mean and M2, the second time from L1, in
// double; blocks are merged in their order, so no number of threads changes a bit.
#include "whiten.h"

#include "memory.h"
#include "parallel.h"
#include "steps.h"

namespace rf {
namespace RF_ISA {
namespace {

// The unit of work: 16 KiB of float32 stay in L1 for the second look.
constexpr int64_t kBlock = 4096;
// Block results kept on the stack at a time: 48 KiB, so that a barrier is behind 8 million elements.
constexpr int64_t kBatch = 2048;

// Calls part(begin, size) for every block of [0, count) and join(result) in the blocks' order.
template <class Result, class Part, class Join>
void fold(int64_t count, int threads, const Part& part, const Join& join) {
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  Result results[kBatch];
  for (int64_t first = 0; first < blocks; first += kBatch) {
    const int64_t size = blocks - first < kBatch ? blocks - first : kBatch;
    parallel_for(size, size * kBlock, threads, [&](int64_t i) {
      const int64_t begin = (first + i) * kBlock;
      results[i] = part(begin, count - begin < kBlock ? count - begin : kBlock);
    });
    for (int64_t i = 0; i < size; ++i) join(results[i]);
  }
}

template <class Body>
void for_blocks(int64_t count, int threads, const Body& body) {
  parallel_for((count + kBlock - 1) / kBlock, count, threads, [&](int64_t block) {
    const int64_t begin = block * kBlock;
    body(begin, count - begin < kBlock ? count : begin + kBlock);
  });
}

// ---- moments -----------------------------------------------------------------------------------------------

// The lanes of [i, i + kLanes) that count; the others are `fill`.
template <class T>
f32v counting(const T* x, const uint8_t* mask, int64_t i, float fill) {
  const f32v found = load(x + i);
  return mask == nullptr ? found : select(load_flags(mask + i), found, splat(fill));
}

// Sums of distances to one of the elements: M2 = Q - S^2 / n loses at most a factor n + 1 of double's precision,
// since the distance from that element to the mean is itself part of M2.
template <class T>
Moments block_moments(const T* x, const uint8_t* mask, int64_t n) {
  int64_t first = 0;
  while (mask != nullptr && first < n && !mask[first]) ++first;
  if (first == n) return {0, 0, 0};
  const float pivot = to_float(x[first]);
  const double origin = pivot;
  Doubles sums{}, squares{};
  i32v skipped{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    f32v lanes = load(x + i);
    if (mask != nullptr) {
      const i32v counts = load_flags(mask + i);
      lanes = select(counts, lanes, splat(pivot));
      skipped += counts + 1;
    }
    Doubles d = widen(lanes);
    d.low -= origin, d.high -= origin;
    sums.low += d.low, sums.high += d.high;
    squares.low += d.low * d.low, squares.high += d.high * d.high;
  }
  double sum = sum_lanes(sums), square = sum_lanes(squares), count = static_cast<double>(n);
  for (int lane = 0; lane < kLanes; ++lane) count -= skipped[lane];
  for (; i < n; ++i) {
    const bool counts = mask == nullptr || mask[i];
    const double d = counts ? to_float(x[i]) - origin : 0.0;
    sum += d, square += d * d, count -= !counts;
  }
  const double m2 = square - sum * sum / count;
  return {count, origin + sum / count, m2 < 0 ? 0.0 : m2};
}

Moments block_moments(const double* x, const uint8_t* mask, int64_t n) {
  double count = 0, sum = 0, m2 = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool counts = mask == nullptr || mask[i];
    count += counts;
    sum += counts ? x[i] : 0.0;
  }
  const double mean = count > 0 ? sum / count : 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double d = mask == nullptr || mask[i] ? x[i] - mean : 0.0;
    m2 += d * d;
  }
  return {count, mean, m2};
}

template <class T, class Real>
Moments moments_of(const MomentsArgs& args) {
  Moments total{0, 0, 0};
  fold<Moments>(
      args.count, args.threads,
      [&](int64_t begin, int64_t n) { return block_moments(typed<T>(args.x, begin), from(args.mask, begin), n); },
      [&](const Moments& part) { total = merge(total, part); });
  return total;
}

// ---- scaling -----------------------------------------------------------------------------------------------

// y = (x - shift) scale + offset; the shift in two parts, since the mean is no float.
template <class T>
void scale_block(const T* x, const uint8_t* mask, float* out, int64_t begin, int64_t end, const WhitenArgs& args) {
  const float high = static_cast<float>(args.shift), low = static_cast<float>(args.shift - high);
  const float scale = static_cast<float>(args.scale), offset = static_cast<float>(args.offset);
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    const f32v y = ((load(x + i) - splat(high)) - splat(low)) * splat(scale) + splat(offset);
    store(out + i, mask == nullptr ? y : select(load_flags(mask + i), y, f32v{}));
  }
  for (; i < end; ++i) {
    const float y = ((to_float(x[i]) - high) - low) * scale + offset;
    out[i] = mask == nullptr || mask[i] ? y : 0.0f;
  }
}
void scale_block(const double* x, const uint8_t* mask, double* out, int64_t begin, int64_t end,
                 const WhitenArgs& args) {
  for (int64_t i = begin; i < end; ++i) {
    const double y = (x[i] - args.shift) * args.scale + args.offset;
    out[i] = mask == nullptr || mask[i] ? y : 0.0;
  }
}

template <class T, class Real>
void whiten_of(const WhitenArgs& args) {
  const T* x = static_cast<const T*>(args.x);
  Real* out = static_cast<Real*>(args.out);
  if (args.out != args.x) prefer_large_pages(out, static_cast<std::size_t>(args.count) * sizeof(Real));
  for_blocks(args.count, args.threads,
             [&](int64_t begin, int64_t end) { scale_block(x, args.mask, out, begin, end, args); });
}

// ---- gradient ----------------------------------------------------------------------------------------------

struct Sums {
  double plain, weighted;
};

template <class T>
Sums block_sums(const T* x, const float* g, int64_t begin, int64_t n, const WhitenBackwardArgs& args) {
  const uint8_t* mask = args.mask;
  Doubles plain{}, weighted{};
  int64_t i = begin;
  for (; i + kLanes <= begin + n; i += kLanes) {
    const Doubles upstream = widen(counting(g, mask, i, 0.0f));
    Doubles d = widen(counting(x, mask, i, 0.0f));
    d.low -= args.mean, d.high -= args.mean;
    plain.low += upstream.low, plain.high += upstream.high;
    weighted.low += upstream.low * d.low, weighted.high += upstream.high * d.high;
  }
  Sums found{sum_lanes(plain), sum_lanes(weighted)};
  for (; i < begin + n; ++i) {
    if (mask != nullptr && !mask[i]) continue;
    found.plain += static_cast<double>(g[i]);
    found.weighted += static_cast<double>(g[i]) * (static_cast<double>(to_float(x[i])) - args.mean);
  }
  return found;
}
Sums block_sums(const double* x, const double* g, int64_t begin, int64_t n, const WhitenBackwardArgs& args) {
  Sums found{0, 0};
  for (int64_t i = begin; i < begin + n; ++i) {
    if (args.mask != nullptr && !args.mask[i]) continue;
    found.plain += g[i];
    found.weighted += g[i] * (x[i] - args.mean);
  }
  return found;
}

template <class T, class Real>
Sums whiten_sums_of(const WhitenBackwardArgs& args) {
  Sums total{0, 0};
  const T* x = static_cast<const T*>(args.x);
  const Real* g = static_cast<const Real*>(args.upstream);
  fold<Sums>(
      args.count, args.threads, [&](int64_t begin, int64_t n) { return block_sums(x, g, begin, n, args); },
      [&](const Sums& part) { total.plain += part.plain, total.weighted += part.weighted; });
  return total;
}

template <class T, class Real>
void whiten_backward_of(const WhitenBackwardArgs& args) {
  const T* x = static_cast<const T*>(args.x);
  const Real* g = static_cast<const Real*>(args.upstream);
  Real* d_x = static_cast<Real*>(args.d_x);
  const auto one = [&](int64_t i) {
    const double distance = static_cast<double>(real(x[i])) - args.mean;
    const double y = args.slope * static_cast<double>(g[i]) + args.constant + args.linear * distance;
    d_x[i] = args.mask == nullptr || args.mask[i] ? static_cast<Real>(y) : Real(0);
  };
  for_blocks(args.count, args.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) one(i);
  });
}

void whiten(const WhitenArgs& args) { RF_BY_DTYPE(whiten_of, args.dtype) }
Moments moments(const MomentsArgs& args) { RF_BY_DTYPE(moments_of, args.dtype) }
void whiten_backward(const WhitenBackwardArgs& args) { RF_BY_DTYPE(whiten_backward_of, args.dtype) }
Sums sums_by_dtype(const WhitenBackwardArgs& args) { RF_BY_DTYPE(whiten_sums_of, args.dtype) }
void whiten_sums(const WhitenBackwardArgs& args, double out[2]) {
  const Sums total = sums_by_dtype(args);
  out[0] = total.plain;
  out[1] = total.weighted;
}

}  // namespace

extern const Whiten whiten_table;
const Whiten whiten_table = {moments, whiten, whiten_sums, whiten_backward};

}  // namespace RF_ISA
}  // namespace rf
