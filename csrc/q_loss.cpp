// Regression of Q or V on targets: loss, gradient and statistics of one or two heads in one pass.
//
// Roofline, per token in float32: prediction, target 8 bytes read, mask 1, gradient 4 written, 8 more for a second
// head, for some 20 flops a head: bandwidth-bound. The mask is read once more to count tokens.
#include "q_loss.h"

#include "policy_loss_lanes.h"

namespace rf {
namespace RF_ISA {
namespace {

enum QSum : int { kQLoss = kQStats, kQSums };

template <class V>
struct Slope {
  V value, slope;
};

template <class V>
Slope<V> regress(Regression kind, V parameter, V e) {
  const V half = all<V>(0.5), two = all<V>(2.0), one = all<V>(1.0);
  if (kind == Regression::expectile) {
    const V side = select(gt(e, V{}), one - parameter, parameter);
    return {side * e * e, two * side * e};
  }
  if (kind == Regression::squared) return {half * e * e, e};
  const V size = abs(e);
  const Flag<V> far = gt(size, parameter);
  const V bound = bounded(e, -parameter, parameter);
  return {select(far, parameter * (size - half * parameter), half * e * e), bound};
}

template <class Real>
class QPass {
  using V = typename LaneOf<Real>::type;

 public:
  explicit QPass(const QLossArgs& args) : args_(args), heads_(args.second != nullptr ? 2 : 1) {}

  void run() {
    const Layout& layout = args_.layout;
    const int64_t blocks = block_count(layout.tokens);
    Weights weights(layout, args_.aggregation, args_.denominator, args_.threads);
    Buffer<double> partial(blocks * kQSums);
    parallel_for(blocks, layout.tokens, args_.threads, [&](int64_t block) {
      double* sums = partial.data + block * kQSums;
      for (int slot = 0; slot < kQSums; ++slot) sums[slot] = 0;
      for_each_piece(layout, weights.by_row, block, [&](int64_t row, int64_t begin, int64_t end) {
        for (int64_t start = begin; start < end; start += kChunk) {
          chunk(start, smaller(start + kChunk, end), weights[row], sums);
        }
      });
    });
    double total[kQSums] = {};
    for (int64_t block = 0; block < blocks; ++block) {
      const double* sums = partial.data + block * kQSums;
      for (int slot = 0; slot < kQSums; ++slot) {
        total[slot] = slot == kQErrorMax ? (sums[slot] > total[slot] ? sums[slot] : total[slot]) : total[slot] + sums[slot];
      }
    }
    *static_cast<Real*>(args_.loss) = static_cast<Real>(total[kQLoss]);
    const double scale = inverse(total[kQTokens] * heads_);
    Real* stats = static_cast<Real*>(args_.stats);
    for (int slot = 0; slot < kQStats; ++slot) {
      const double by = slot == kQTokens || slot == kQErrorMax ? 1.0 : slot == kQTarget ? scale * heads_ : scale;
      stats[slot] = static_cast<Real>(total[slot] * by);
    }
  }

 private:
  static V at(const void* array, int64_t i, int64_t count, Flag<V> counts) {
    return select(counts, load_some(static_cast<const Real*>(array) + i, count), V{});
  }

  void chunk(int64_t begin, int64_t end, double weight, double* sums) const {
    V lanes[kQSums] = {};
    const V parameter = all<V>(args_.parameter), one = all<V>(1.0), token_weight = all<V>(weight);
    for (int64_t i = begin; i < end; i += kWidth<V>) {
      const int64_t count = end - i;
      const Flag<V> counts = flags_some<V>(args_.layout.mask + i, count);
      const V target = at(args_.targets, i, count, counts);
      const V scale = args_.weights != nullptr ? at(args_.weights, i, count, counts) : one;
      lanes[kQTokens] += select(counts, one, V{});
      lanes[kQTarget] += target;
      for (int head = 0; head < heads_; ++head) {
        const V prediction = at(head == 0 ? args_.first : args_.second, i, count, counts), e = prediction - target;
        const Slope<V> found = regress(args_.kind, parameter, e);
        lanes[kQLoss] += scale * found.value;
        lanes[kQError] += e;
        lanes[kQAbsolute] += abs(e);
        lanes[kQErrorMax] = larger(abs(e), lanes[kQErrorMax]);
        lanes[kQPrediction] += prediction;
        lanes[kQAbove] += select(gt(e, V{}), one, V{});
        void* slope = head == 0 ? args_.d_first : args_.d_second;
        if (slope != nullptr) {
          store_some(static_cast<Real*>(slope) + i, count, select(counts, token_weight * scale * found.slope, V{}));
        }
      }
    }
    for (int slot = 0; slot < kQSums; ++slot) {
      if (slot == kQErrorMax) {
        const double found = static_cast<double>(max_lanes(lanes[slot]));
        if (found > sums[slot]) sums[slot] = found;
      } else {
        sums[slot] += static_cast<double>(sum_lanes(lanes[slot])) * (slot == kQLoss ? weight : 1.0);
      }
    }
  }

  const QLossArgs& args_;
  const int heads_;
};

void q_loss(const QLossArgs& args) {
  if (args.wide) return QPass<double>(args).run();
  QPass<float>(args).run();
}

}  // namespace

extern const QLoss q_loss_table;
const QLoss q_loss_table = {&q_loss};

}  // namespace RF_ISA
}  // namespace rf
