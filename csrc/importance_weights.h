// Importance weights exp(log p - log b) a token or a row, bounded; included by policy_loss.cpp, once per
// instruction set. Token level: one read of both inputs and one write. Row levels read the inputs once for the
// row sums and the mask again for the write.
#pragma once

#include <utility>

#include "policy_loss_lanes.h"

namespace rf {
namespace RF_ISA {
namespace {

enum ImportanceSum : int {
  kCount, kRawSum, kRawMax, kAppliedSum, kAppliedMax, kSquares, kOutside, kVetoed, kImportanceSums
};

template <class T>
class ImportancePass {
  using V = typename LaneOf<T>::type;
  using Real = typename LaneOf<T>::scalar;

 public:
  explicit ImportancePass(const ImportanceArgs& args) : args_(args), rows_(by_row() ? args.layout.rows : 0) {}

  void run() {
    const Layout& layout = args_.layout;
    if (by_row()) {
      parallel_for(layout.rows, layout.tokens, args_.threads, [&](int64_t row) { rows_[row] = row_of_tokens(row); });
    }
    const int64_t blocks = block_count(layout.tokens);
    Buffer<double> partial(blocks * kImportanceSums);
    parallel_for(blocks, layout.tokens, args_.threads, [&](int64_t block) {
      double* sums = partial.data + block * kImportanceSums;
      for (int slot = 0; slot < kImportanceSums; ++slot) sums[slot] = 0;
      for_each_piece(layout, by_row(), block, [&](int64_t row, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += kChunk) piece(row, i, smaller(i + kChunk, end), sums);
      });
    });
    double total[kImportanceSums] = {};
    for (int64_t block = 0; block < blocks; ++block) merge(partial.data + block * kImportanceSums, total);
    finish(total);
  }

 private:
  struct Row {
    double sum, mean;  // of the log-ratios, in +-20
    bool vetoed;
  };

  bool by_row() const {
    return args_.level != Level::token || args_.bound_level != Level::token || args_.veto > 0;
  }
  double log_of(const Row& row, Level level) const { return level == Level::sequence ? row.sum : row.mean; }

  static void merge(const double* sums, double* total) {
    for (int slot = 0; slot < kImportanceSums; ++slot) {
      const bool maximum = slot == kRawMax || slot == kAppliedMax;
      total[slot] = maximum ? larger(sums[slot], total[slot]) : total[slot] + sums[slot];
    }
  }

  V token_log(int64_t i, int64_t count, Flag<V> counts) const {
    const V logprob = load_some(static_cast<const T*>(args_.logprobs) + i, count);
    const V behavior = load_some(static_cast<const T*>(args_.behavior_logprobs) + i, count);
    return log_ratio(select(counts, logprob, V{}), select(counts, behavior, V{})).value;
  }

  Row row_of_tokens(int64_t row) const {
    const int64_t begin = row_begin(args_.layout, row), end = row_begin(args_.layout, row + 1);
    double total = 0, largest = -HUGE_VAL;
    for (int64_t start = begin; start < end; start += kChunk) {
      const int64_t stop = smaller(start + kChunk, end);
      V lanes{}, drop = all<V>(-HUGE_VAL);  // the largest -l
      for (int64_t i = start; i < stop; i += kWidth<V>) {
        const Flag<V> counts = flags_some<V>(args_.layout.mask + i, stop - i);
        const V l = token_log(i, stop - i, counts);
        lanes += l;
        drop = larger(select(counts, -l, all<V>(-HUGE_VAL)), drop);
      }
      total += static_cast<double>(sum_lanes(lanes));
      largest = larger(static_cast<double>(max_lanes(drop)), largest);
    }
    const double count = static_cast<double>(count_set(args_.layout.mask + begin, end - begin));
    const bool vetoed = args_.veto > 0 && -largest < std::log(args_.veto);
    return {bounded(total, -20.0, 20.0), bounded(total * inverse(count), -20.0, 20.0), vetoed};
  }

  void piece(int64_t row, int64_t begin, int64_t end, double* sums) {
    const V low = all<V>(args_.low), high = all<V>(args_.high);
    const bool token_weight = args_.level == Level::token, token_bound = args_.bound_level == Level::token;
    V row_weight{}, row_bound{};
    bool vetoed = false;
    if (by_row()) {
      row_weight = exp20(all<V>(log_of(rows_[row], args_.level))).value;
      row_bound = exp20(all<V>(log_of(rows_[row], args_.bound_level))).value;
      vetoed = rows_[row].vetoed;
    }
    V lanes[kImportanceSums] = {};
    for (int64_t i = begin; i < end; i += kWidth<V>) {
      const Flag<V> counts = flags_some<V>(args_.layout.mask + i, end - i);
      const V one = select(counts, all<V>(1.0), V{});
      const V own = token_weight || token_bound ? exp20(token_log(i, end - i, counts)).value : V{};
      const V raw = select(counts, token_weight ? own : row_weight, V{});
      const V held = token_bound ? own : row_bound;
      const Flag<V> outside = counts & (lt(held, low) | gt(held, high));
      const V kept = args_.mode == Bound::mask ? V{} : bounded(raw, low, high);
      const V applied = vetoed ? V{} : select(outside, kept, raw);
      store_some(static_cast<Real*>(args_.weights) + i, end - i, applied);
      lanes[kCount] += one;
      lanes[kRawSum] += raw;
      lanes[kRawMax] = larger(raw, lanes[kRawMax]);
      lanes[kAppliedSum] += applied;
      lanes[kAppliedMax] = larger(applied, lanes[kAppliedMax]);
      lanes[kSquares] += applied * applied;
      lanes[kOutside] += select(outside, one, V{});
      if (vetoed) lanes[kVetoed] += one;
    }
    double here[kImportanceSums];
    for (int slot = 0; slot < kImportanceSums; ++slot) {
      const bool maximum = slot == kRawMax || slot == kAppliedMax;
      here[slot] = static_cast<double>(maximum ? max_lanes(lanes[slot]) : sum_lanes(lanes[slot]));
    }
    merge(here, sums);
  }

  // The first weight of every row that counts, summed, and their number.
  std::pair<double, double> row_weights() const {
    double total = 0, number = 0;
    for (int64_t row = 0; row < args_.layout.rows; ++row) {
      const int64_t end = row_begin(args_.layout, row + 1);
      int64_t first = row_begin(args_.layout, row);
      while (first < end && !args_.layout.mask[first]) ++first;
      if (first == end) continue;
      total += static_cast<double>(static_cast<const Real*>(args_.weights)[first]);
      number += 1;
    }
    return {total, number};
  }

  double normalizer(const double* total) const {
    if (args_.normalize == Normalize::none) return 1.0;
    if (args_.normalize == Normalize::tokens) return total[kCount] * inverse(total[kAppliedSum]);
    const auto [sum, number] = row_weights();
    return number * inverse(sum);
  }

  void finish(const double* total) {
    const double per_token = inverse(total[kCount]), scale = normalizer(total);
    if (args_.normalize != Normalize::none) rescale(static_cast<Real>(scale));
    Real* stats = static_cast<Real*>(args_.stats);
    stats[0] = static_cast<Real>(total[kRawSum] * per_token);
    stats[1] = static_cast<Real>(total[kRawMax]);
    stats[2] = static_cast<Real>(total[kAppliedSum] * per_token * scale);
    stats[3] = static_cast<Real>(total[kAppliedMax] * scale);
    const double effective = total[kAppliedSum] * total[kAppliedSum] * per_token;
    stats[4] = static_cast<Real>(total[kSquares] == 0 ? 0 : effective / total[kSquares]);
    stats[5] = static_cast<Real>(total[kOutside] * per_token);
    stats[6] = static_cast<Real>(total[kVetoed] * per_token);
  }

  void rescale(Real scale) {
    Real* weights = static_cast<Real*>(args_.weights);
    parallel_for(block_count(args_.layout.tokens), args_.layout.tokens, args_.threads, [&](int64_t block) {
      const int64_t end = smaller((block + 1) * kBlock, args_.layout.tokens);
      for (int64_t i = block * kBlock; i < end; ++i) weights[i] *= scale;
    });
  }

  const ImportanceArgs& args_;
  Buffer<Row> rows_;
};

void importance_weights(const ImportanceArgs& args) {
  switch (args.dtype) {
    case DType::float32: return ImportancePass<float>(args).run();
    case DType::float64: return ImportancePass<double>(args).run();
    case DType::float16: return ImportancePass<f16>(args).run();
    case DType::bfloat16: return ImportancePass<bf16>(args).run();
    default: return;
  }
}

}  // namespace
}  // namespace RF_ISA
}  // namespace rf
