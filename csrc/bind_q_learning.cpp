// The q_learning and q_loss part of react_fast._core; conventions as in bindings.cpp.
#include <array>

#include "bind.h"
#include "isa.h"

namespace {

using Strides = std::array<int64_t, 3>;  // inner, outer_stride, stride

rf::VocabRows vocab_rows(Address data, const Strides& s) { return {at(data), s[0], s[1], s[2]}; }

rf::VocabShape vocab_shape(int dtype, Address mask, int64_t rows, int64_t vocab, int threads) {
  return {rf::DType(dtype), at<uint8_t>(mask), rows, vocab, threads};
}

void best_token(Address q, Strides q_strides, Address other, Strides other_strides, int dtype, Address mask,
                int64_t rows, int64_t vocab, Address values, Address ids, int threads) {
  py::gil_scoped_release release;
  rf::kernels().q_learning->best({vocab_shape(dtype, mask, rows, vocab, threads), vocab_rows(q, q_strides),
                                  vocab_rows(other, other_strides), at(values), at<int64_t>(ids)});
}

void expected_values(Address logits, Strides logits_strides, Address q, Strides q_strides, int dtype, Address mask,
                     int64_t rows, int64_t vocab, double temperature, Address out, int threads) {
  py::gil_scoped_release release;
  rf::kernels().q_learning->expected({vocab_shape(dtype, mask, rows, vocab, threads),
                                      vocab_rows(logits, logits_strides), vocab_rows(q, q_strides), temperature,
                                      at(out)});
}

void soft_values_backward(Address q, Strides q_strides, int dtype, Address mask, int64_t rows, int64_t vocab,
                          Address stats, Address upstream, double alpha, Address d_q, int threads) {
  py::gil_scoped_release release;
  rf::kernels().q_learning->soft_backward({vocab_shape(dtype, mask, rows, vocab, threads), vocab_rows(q, q_strides),
                                           at(stats), at(upstream), alpha, at(d_q)});
}

void guided_logits(Address logits, Strides logits_strides, Address q, Strides q_strides, Address other,
                   Strides other_strides, int dtype, int64_t rows, int64_t vocab, Address values, double beta,
                   Address out, int threads) {
  py::gil_scoped_release release;
  rf::kernels().q_learning->guide({vocab_shape(dtype, 0, rows, vocab, threads), vocab_rows(logits, logits_strides),
                                   vocab_rows(q, q_strides), vocab_rows(other, other_strides), at(values), beta,
                                   at(out)});
}

rf::NStepInput n_step_input(Address terminated, Address truncated, Address mask, Address offsets, int64_t rows,
                            int64_t length, int dtype, double gamma, int64_t n, bool behind, int threads) {
  return {at<uint8_t>(terminated), at<uint8_t>(truncated), at<uint8_t>(mask), {at<int64_t>(offsets), rows, length},
          rf::DType(dtype), gamma, n, behind, threads};
}

void n_step(Address rewards, Address values, Address last_values, Address bootstrap_values, Address terminated,
            Address truncated, Address mask, Address offsets, int64_t rows, int64_t length, int dtype, double gamma,
            int64_t n, bool behind, Address out, int threads) {
  py::gil_scoped_release release;
  const auto in = n_step_input(terminated, truncated, mask, offsets, rows, length, dtype, gamma, n, behind, threads);
  rf::kernels().q_learning->n_step(
      {in, at(rewards), at(values), at(last_values), at(bootstrap_values), at(out)});
}

void n_step_backward(Address upstream, Address terminated, Address truncated, Address mask, Address offsets,
                     int64_t rows, int64_t length, int dtype, double gamma, int64_t n, bool behind, Address d_rewards,
                     Address d_values, Address d_last_values, Address d_bootstrap_values, int threads) {
  py::gil_scoped_release release;
  const auto in = n_step_input(terminated, truncated, mask, offsets, rows, length, dtype, gamma, n, behind, threads);
  rf::kernels().q_learning->n_step_backward({in, d_last_values != 0, d_bootstrap_values != 0, at(upstream),
                                             at(d_rewards), at(d_values), at(d_last_values), at(d_bootstrap_values)});
}

void q_loss(Address first, Address second, Address targets, Address weights, Address mask, Address cu_seqlens,
            int64_t tokens, int64_t rows, int64_t row_length, bool wide, int kind, double parameter, int aggregation,
            double denominator, Address loss, Address stats, Address d_first, Address d_second, int threads) {
  py::gil_scoped_release release;
  rf::kernels().q_loss->q_loss({at(first), at(second), at(targets), at(weights),
                                {at<uint8_t>(mask), at<int64_t>(cu_seqlens), tokens, rows, row_length}, wide,
                                rf::Regression(kind), parameter, rf::Aggregation(aggregation), denominator, at(loss),
                                at(stats), at(d_first), at(d_second), threads});
}

}  // namespace

void bind_q_learning(py::module_& m) {
  m.def("best_token", &best_token, "q"_a, "q_strides"_a, "other"_a, "other_strides"_a, "dtype"_a, "mask"_a, "rows"_a,
        "vocab"_a, "values"_a, "ids"_a, "threads"_a);
  m.def("expected_values", &expected_values, "logits"_a, "logits_strides"_a, "q"_a, "q_strides"_a, "dtype"_a,
        "mask"_a, "rows"_a, "vocab"_a, "temperature"_a, "out"_a, "threads"_a);
  m.def("soft_values_backward", &soft_values_backward, "q"_a, "q_strides"_a, "dtype"_a, "mask"_a, "rows"_a,
        "vocab"_a, "stats"_a, "upstream"_a, "alpha"_a, "d_q"_a, "threads"_a);
  m.def("guided_logits", &guided_logits, "logits"_a, "logits_strides"_a, "q"_a, "q_strides"_a, "other"_a,
        "other_strides"_a, "dtype"_a, "rows"_a, "vocab"_a, "values"_a, "beta"_a, "out"_a, "threads"_a);
  m.def("n_step", &n_step, "rewards"_a, "values"_a, "last_values"_a, "bootstrap_values"_a, "terminated"_a,
        "truncated"_a, "mask"_a, "offsets"_a, "rows"_a, "length"_a, "dtype"_a, "gamma"_a, "n"_a, "behind"_a, "out"_a,
        "threads"_a);
  m.def("n_step_backward", &n_step_backward, "upstream"_a, "terminated"_a, "truncated"_a, "mask"_a, "offsets"_a,
        "rows"_a, "length"_a, "dtype"_a, "gamma"_a, "n"_a, "behind"_a, "d_rewards"_a, "d_values"_a,
        "d_last_values"_a, "d_bootstrap_values"_a, "threads"_a);
  m.def("q_loss", &q_loss, "first"_a, "second"_a, "targets"_a, "weights"_a, "mask"_a, "cu_seqlens"_a, "tokens"_a,
        "rows"_a, "row_length"_a, "wide"_a, "kind"_a, "parameter"_a, "aggregation"_a, "denominator"_a, "loss"_a,
        "stats"_a, "d_first"_a, "d_second"_a, "threads"_a);
}
