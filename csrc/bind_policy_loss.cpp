// The policy_loss part of react_fast._core; conventions as in bindings.cpp.
#include <vector>

#include "bind.h"
#include "isa.h"

namespace {

rf::Layout layout(Address mask, Address cu_seqlens, int64_t tokens, int64_t rows, int64_t row_length) {
  return {at<uint8_t>(mask), at<int64_t>(cu_seqlens), tokens, rows, row_length};
}

void policy_loss(Address logprobs, Address old_logprobs, Address advantages, Address ref_logprobs, Address entropy,
                 Address importance, Address mask, Address cu_seqlens, int64_t tokens, int64_t rows,
                 int64_t row_length, int dtype, bool row_advantages, int objective,
                 const std::vector<double>& parameters, int aggregation, double denominator, double kl_coef,
                 int kl_estimator, int kl_gradient, double entropy_coef, Address loss, Address stats,
                 Address d_logprobs, Address d_entropy, int threads) {
  py::gil_scoped_release release;
  double numbers[rf::kParameters] = {};
  for (size_t i = 0; i < parameters.size() && i < rf::kParameters; ++i) numbers[i] = parameters[i];
  rf::kernels().policy_loss->policy_loss(
      {at(logprobs), at(old_logprobs), at(advantages), at(ref_logprobs), at(entropy), at(importance),
       layout(mask, cu_seqlens, tokens, rows, row_length), rf::DType(dtype), row_advantages,
       rf::Objective(objective),
       {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]},
       rf::Aggregation(aggregation), denominator, kl_coef, rf::KlEstimator(kl_estimator),
       rf::KlGradient(kl_gradient), entropy_coef, at(loss), at(stats), at(d_logprobs), at(d_entropy), threads});
}

void value_loss(Address values, Address old_values, Address returns, Address mask, int64_t tokens, int dtype,
                double clip, double denominator, Address loss, Address d_values, int threads) {
  py::gil_scoped_release release;
  rf::kernels().policy_loss->value_loss({at(values), at(old_values), at(returns), layout(mask, 0, tokens, 1, tokens),
                                         rf::DType(dtype), clip, denominator, at(loss), at(d_values), threads});
}

void importance_weights(Address logprobs, Address behavior_logprobs, Address mask, Address cu_seqlens,
                        int64_t tokens, int64_t rows, int64_t row_length, int dtype, int level, int mode, double low,
                        double high, int bound_level, double veto, int normalize, Address weights, Address stats,
                        int threads) {
  py::gil_scoped_release release;
  rf::kernels().policy_loss->importance_weights(
      {at(logprobs), at(behavior_logprobs), layout(mask, cu_seqlens, tokens, rows, row_length), rf::DType(dtype),
       rf::Level(level), rf::Bound(mode), low, high, rf::Level(bound_level), veto, rf::Normalize(normalize), at(weights), at(stats), threads});
}

void high_entropy_mask(Address entropy, Address mask, int64_t tokens, int dtype, double fraction, Address kept,
                       int threads) {
  py::gil_scoped_release release;
  rf::kernels().policy_loss->high_entropy_mask(
      {at(entropy), at<uint8_t>(mask), tokens, rf::DType(dtype), fraction, at<uint8_t>(kept), threads});
}

void kl_rewards(Address rewards, Address logprobs, Address ref_logprobs, Address mask, Address cu_seqlens,
                int64_t tokens, int64_t rows, int64_t row_length, int dtype, bool row_rewards, double kl_coef,
                int estimator, double clip, Address shaped, Address stats, int threads) {
  py::gil_scoped_release release;
  rf::kernels().policy_loss->kl_rewards({at(rewards), at(logprobs), at(ref_logprobs),
                                         layout(mask, cu_seqlens, tokens, rows, row_length), rf::DType(dtype),
                                         row_rewards, kl_coef, rf::KlEstimator(estimator), clip, at(shaped), at(stats),
                                         threads});
}

}  // namespace

void bind_policy_loss(py::module_& m) {
  m.def("policy_loss", &policy_loss, "logprobs"_a, "old_logprobs"_a, "advantages"_a, "ref_logprobs"_a, "entropy"_a,
        "importance"_a, "mask"_a, "cu_seqlens"_a, "tokens"_a, "rows"_a, "row_length"_a, "dtype"_a,
        "row_advantages"_a, "objective"_a, "parameters"_a, "aggregation"_a, "denominator"_a, "kl_coef"_a,
        "kl_estimator"_a, "kl_gradient"_a, "entropy_coef"_a, "loss"_a, "stats"_a, "d_logprobs"_a, "d_entropy"_a,
        "threads"_a);
  m.def("value_loss", &value_loss, "values"_a, "old_values"_a, "returns"_a, "mask"_a, "tokens"_a, "dtype"_a,
        "clip"_a, "denominator"_a, "loss"_a, "d_values"_a, "threads"_a);
  m.def("importance_weights", &importance_weights, "logprobs"_a, "behavior_logprobs"_a, "mask"_a, "cu_seqlens"_a,
        "tokens"_a, "rows"_a, "row_length"_a, "dtype"_a, "level"_a, "mode"_a, "low"_a, "high"_a,
        "bound_level"_a, "veto"_a, "normalize"_a, "weights"_a, "stats"_a, "threads"_a);
  m.def("high_entropy_mask", &high_entropy_mask, "entropy"_a, "mask"_a, "tokens"_a, "dtype"_a, "fraction"_a, "kept"_a,
        "threads"_a);
  m.def("kl_rewards", &kl_rewards, "rewards"_a, "logprobs"_a, "ref_logprobs"_a, "mask"_a, "cu_seqlens"_a, "tokens"_a,
        "rows"_a, "row_length"_a, "dtype"_a, "row_rewards"_a, "kl_coef"_a, "estimator"_a, "clip"_a, "shaped"_a,
        "stats"_a, "threads"_a);
}
