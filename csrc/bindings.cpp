// react_fast._core: the hot paths on raw memory. Pointers are integers (torch.Tensor.data_ptr(), or
// ndarray.ctypes.data), 0 for an absent array; strides count elements; dtypes are the tags of dtype.h. Nothing
// is checked here: react_fast.ops refuses bad input before it calls. Every call releases the GIL.
#include <vector>

#include "bind.h"
#include "bounds.h"
#include "isa.h"
#include "moments.h"

void bind_advantage(py::module_& m);     // bind_advantage.cpp
void bind_policy_loss(py::module_& m);  // bind_policy_loss.cpp
void bind_q_learning(py::module_& m);   // bind_q_learning.cpp
void bind_sum_tree(py::module_& m);     // bind_sum_tree.cpp

namespace {

// ---- logprob -----------------------------------------------------------------------------------------------

// Keyword names of an input, shared by the two functions.
rf::LogprobInput logprob_input(Address logits, Address token_ids, Address mask, Address temperatures, Address floors,
                               int dtype, int id_dtype, int64_t rows, int64_t vocab, int64_t tokens, int64_t inner,
                               int64_t outer_stride, int64_t stride, double temperature, double softcap,
                               int threads) {
  return {at(logits), at(token_ids), at<const bool>(mask), at<const double>(temperatures), at<const double>(floors),
          rf::DType(dtype), rf::DType(id_dtype), rows, vocab, tokens, inner, outer_stride, stride, temperature,
          softcap, threads};
}

// Returns the argument that is wrong and its element, ("", 0) when nothing is; then nothing has been computed.
std::pair<const char*, int64_t> token_logprobs(Address logits, Address token_ids, Address mask, Address temperatures,
                                               Address floors, int dtype, int id_dtype, int64_t rows, int64_t vocab,
                                               int64_t tokens, int64_t inner, int64_t outer_stride, int64_t stride,
                                               double temperature, double softcap, double low, double high,
                                               Address logp, Address entropy, Address stats, int threads) {
  py::gil_scoped_release release;
  static const char* const names[] = {"", "token_ids", "temperature", "logit_floor"};
  const auto in = logprob_input(logits, token_ids, mask, temperatures, floors, dtype, id_dtype, rows, vocab, tokens,
                                inner, outer_stride, stride, temperature, softcap, threads);
  const rf::LogprobCheck found = rf::kernels().logprob->check(in, low, high);
  if (found.fault == rf::LogprobFault::none) rf::kernels().logprob->forward({in, at(logp), at(entropy), at(stats)});
  return {names[static_cast<int>(found.fault)], found.index};
}

void token_logprobs_backward(Address logits, Address token_ids, Address mask, Address temperatures, Address floors,
                             int dtype, int id_dtype, int64_t rows, int64_t vocab, int64_t tokens, int64_t inner,
                             int64_t outer_stride, int64_t stride, double temperature, double softcap, Address stats,
                             Address entropy, Address d_logp, Address d_entropy, Address d_logits, int threads) {
  py::gil_scoped_release release;
  const auto in = logprob_input(logits, token_ids, mask, temperatures, floors, dtype, id_dtype, rows, vocab, tokens,
                                inner, outer_stride, stride, temperature, softcap, threads);
  rf::kernels().logprob->backward({in, at(stats), at(entropy), at(d_logp), at(d_entropy), at(d_logits)});
}

void bind_logprob(py::module_& m) {
  m.def("token_logprobs", &token_logprobs, "logits"_a, "token_ids"_a, "mask"_a, "temperatures"_a, "floors"_a,
        "dtype"_a, "id_dtype"_a, "rows"_a, "vocab"_a, "tokens"_a, "inner"_a, "outer_stride"_a, "stride"_a,
        "temperature"_a, "softcap"_a, "low"_a, "high"_a, "logp"_a, "entropy"_a, "stats"_a, "threads"_a);
  m.def("token_logprobs_backward", &token_logprobs_backward, "logits"_a, "token_ids"_a, "mask"_a, "temperatures"_a,
        "floors"_a, "dtype"_a, "id_dtype"_a, "rows"_a, "vocab"_a, "tokens"_a, "inner"_a, "outer_stride"_a, "stride"_a,
        "temperature"_a, "softcap"_a, "stats"_a, "entropy"_a, "d_logp"_a, "d_entropy"_a, "d_logits"_a, "threads"_a);
}

rf::LogitTile logit_tile(Address tile, Address bias, Address token_ids, Address temperatures, int dtype, int64_t rows,
                         int64_t columns, int64_t stride, int64_t first, double scale, double temperature,
                         double softcap, int threads) {
  return {at(tile), at(bias), at<const int64_t>(token_ids), at<const double>(temperatures), rf::DType(dtype), rows,
          columns, stride, first, scale, temperature, softcap, threads};
}

void fold_tile(Address tile, Address bias, Address token_ids, Address temperatures, int dtype, int64_t rows,
               int64_t columns, int64_t stride, int64_t first, double scale, double temperature, double softcap,
               Address state, bool moment, Address factor, Address shift, Address weights, Address weighted,
               int threads) {
  py::gil_scoped_release release;
  const auto in = logit_tile(tile, bias, token_ids, temperatures, dtype, rows, columns, stride, first, scale,
                             temperature, softcap, threads);
  rf::kernels().linear_logprob->fold(
      {in, at<double>(state), moment, at(factor), at(shift), at(weights), at(weighted)});
}

void turn_tile(Address tile, Address bias, Address token_ids, Address temperatures, int dtype, int64_t rows,
               int64_t columns, int64_t stride, int64_t first, double scale, double temperature, double softcap,
               Address stats, Address out, int threads) {
  py::gil_scoped_release release;
  const auto in = logit_tile(tile, bias, token_ids, temperatures, dtype, rows, columns, stride, first, scale,
                             temperature, softcap, threads);
  rf::kernels().linear_logprob->turn({in, at(out), at<const double>(stats)});
}

void bind_linear_logprob(py::module_& m) {
  m.def("fold_tile", &fold_tile, "tile"_a, "bias"_a, "token_ids"_a, "temperatures"_a, "dtype"_a, "rows"_a,
        "columns"_a, "stride"_a, "first"_a, "scale"_a, "temperature"_a, "softcap"_a, "state"_a, "moment"_a,
        "factor"_a, "shift"_a, "weights"_a, "weighted"_a, "threads"_a);
  m.def("turn_tile", &turn_tile, "tile"_a, "bias"_a, "token_ids"_a, "temperatures"_a, "dtype"_a, "rows"_a,
        "columns"_a, "stride"_a, "first"_a, "scale"_a, "temperature"_a, "softcap"_a, "stats"_a, "out"_a, "threads"_a);
}

// ---- packed sequences ----------------------------------------------------------------------------------------

bool bounds_rise(Address bounds, int64_t count, int64_t total) {
  return rf::bounds_rise(at<int64_t>(bounds), count, total);
}

// ---- off_policy --------------------------------------------------------------------------------------------

rf::OffPolicyInput off_policy_input(Address rewards, Address values, Address log_rhos, Address aside,
                                    Address last_values, Address terminated, Address truncated, Address mask,
                                    Address lams, Address offsets, int64_t rows, int64_t length, int dtype,
                                    double gamma, double lam, int threads) {
  return {at(rewards), at(values), at(log_rhos), at(aside), at(last_values), at<uint8_t>(terminated),
          at<uint8_t>(truncated), at<uint8_t>(mask), at<double>(lams), {at<int64_t>(offsets), rows, length},
          rf::DType(dtype), gamma, lam, threads};
}

void vtrace(Address rewards, Address values, Address log_rhos, Address bootstrap_values, Address last_values,
            Address terminated, Address truncated, Address mask, Address lams, Address offsets, int64_t rows,
            int64_t length, int dtype, double gamma, double lam, double rho_clip, double c_clip,
            double advantage_rho_clip, Address targets, Address advantages, int threads) {
  py::gil_scoped_release release;
  const auto in = off_policy_input(rewards, values, log_rhos, bootstrap_values, last_values, terminated, truncated,
                                   mask, lams, offsets, rows, length, dtype, gamma, lam, threads);
  rf::kernels().off_policy->vtrace({in, rho_clip, c_clip, advantage_rho_clip, at(targets), at(advantages)});
}

void retrace(Address rewards, Address q_values, Address log_rhos, Address next_values, Address terminated,
             Address truncated, Address mask, Address lams, Address offsets, int64_t rows, int64_t length, int dtype,
             double gamma, double lam, Address targets, int threads) {
  py::gil_scoped_release release;
  const auto in = off_policy_input(rewards, q_values, log_rhos, next_values, 0, terminated, truncated, mask, lams,
                                   offsets, rows, length, dtype, gamma, lam, threads);
  rf::kernels().off_policy->retrace({in, at(targets)});
}

void bind_off_policy(py::module_& m) {
  m.def("vtrace", &vtrace, "rewards"_a, "values"_a, "log_rhos"_a, "bootstrap_values"_a, "last_values"_a,
        "terminated"_a, "truncated"_a, "mask"_a, "lams"_a, "offsets"_a, "rows"_a, "length"_a, "dtype"_a, "gamma"_a,
        "lam"_a, "rho_clip"_a, "c_clip"_a, "advantage_rho_clip"_a, "targets"_a, "advantages"_a, "threads"_a);
  m.def("retrace", &retrace, "rewards"_a, "q_values"_a, "log_rhos"_a, "next_values"_a, "terminated"_a,
        "truncated"_a, "mask"_a, "lams"_a, "offsets"_a, "rows"_a, "length"_a, "dtype"_a, "gamma"_a, "lam"_a,
        "targets"_a, "threads"_a);
}

// ---- attribution -------------------------------------------------------------------------------------------

void attribution_scores(Address grad, Address activation, int dtype, int reduction, int64_t rows, int64_t dim,
                        int64_t grad_stride, int64_t activation_stride, Address out, int threads) {
  py::gil_scoped_release release;
  rf::kernels().attribution->scores({at(grad), at(activation), rf::DType(dtype), rf::Reduction(reduction), rows, dim,
                                     grad_stride, activation_stride, at(out), threads});
}

void attribution_scores_backward(Address grad, Address activation, Address upstream, Address scores, int dtype,
                                 int reduction, int64_t rows, int64_t dim, int64_t grad_stride,
                                 int64_t activation_stride, Address d_grad, Address d_activation, int threads) {
  py::gil_scoped_release release;
  rf::kernels().attribution->scores_backward({at(grad), at(activation), at(upstream), at(scores), rf::DType(dtype),
                                              rf::Reduction(reduction), rows, dim, grad_stride, activation_stride,
                                              at(d_grad), at(d_activation), threads});
}

void segment_sum(Address scores, Address offsets, int dtype, int64_t segments, int64_t elements, Address out,
                 int threads) {
  py::gil_scoped_release release;
  rf::kernels().attribution->segment_sum(
      {at(scores), at<int64_t>(offsets), rf::DType(dtype), segments, elements, at(out), threads});
}

void segment_spread(Address values, Address offsets, int dtype, int64_t segments, int64_t elements, Address out,
                    int threads) {
  py::gil_scoped_release release;
  rf::kernels().attribution->segment_spread(
      {at(values), at<int64_t>(offsets), rf::DType(dtype), segments, elements, at(out), threads});
}

// Returns the first element with a wrong id, -1 when all were added.
int64_t accumulate_by_id(Address scores, Address ids, Address mask, int64_t elements, int64_t size, Address count,
                         Address mean, Address m2) {
  py::gil_scoped_release release;
  return rf::accumulate_by_id({at<double>(scores), at<int64_t>(ids), at<uint8_t>(mask), elements, size,
                               at<int64_t>(count), at<double>(mean), at<double>(m2)});
}

void bind_attribution(py::module_& m) {
  m.def("attribution_scores", &attribution_scores, "grad"_a, "activation"_a, "dtype"_a, "reduction"_a, "rows"_a,
        "dim"_a, "grad_stride"_a, "activation_stride"_a, "out"_a, "threads"_a);
  m.def("attribution_scores_backward", &attribution_scores_backward, "grad"_a, "activation"_a, "upstream"_a,
        "scores"_a, "dtype"_a, "reduction"_a, "rows"_a, "dim"_a, "grad_stride"_a, "activation_stride"_a, "d_grad"_a,
        "d_activation"_a, "threads"_a);
  m.def("segment_sum", &segment_sum, "scores"_a, "offsets"_a, "dtype"_a, "segments"_a, "elements"_a, "out"_a,
        "threads"_a);
  m.def("segment_spread", &segment_spread, "values"_a, "offsets"_a, "dtype"_a, "segments"_a, "elements"_a, "out"_a,
        "threads"_a);
  m.def("accumulate_by_id", &accumulate_by_id, "scores"_a, "ids"_a, "mask"_a, "elements"_a, "size"_a, "count"_a,
        "mean"_a, "m2"_a);
}

// ---- stream ------------------------------------------------------------------------------------------------

using Spans = std::vector<std::pair<Address, int64_t>>;

std::vector<rf::Span> spans_at(const Spans& spans) {
  std::vector<rf::Span> out;
  for (const auto& [address, bytes] : spans) out.push_back({at(address), bytes});
  return out;
}

uint64_t stream(const Spans& reads, const Spans& writes, int64_t chunks, int64_t elements, int threads) {
  const auto from = spans_at(reads), to = spans_at(writes);
  py::gil_scoped_release release;
  return rf::kernels().stream->run({from.data(), static_cast<int64_t>(from.size()), to.data(),
                                    static_cast<int64_t>(to.size()), chunks, elements, threads});
}

void bind_stream(py::module_& m) {
  m.def("stream", &stream, "reads"_a, "writes"_a, "chunks"_a, "elements"_a, "threads"_a);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled hot paths of react_fast on raw memory; use react_fast.ops.";
  m.def("isa", [] { return std::string(rf::kernels().isa); });
  m.def("compiled_isas", &rf::compiled_isas);
  m.def("supported_isas", &rf::supported_isas);
  m.def("set_isa", &rf::set_isa, "name"_a);
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  rf::kernels();  // a wrong REACT_FAST_ISA fails at import, in one line
  m.def("bounds_rise", &bounds_rise, "bounds"_a, "count"_a, "total"_a);
  bind_logprob(m);
  bind_linear_logprob(m);
  bind_advantage(m);
  bind_off_policy(m);
  bind_policy_loss(m);
  bind_attribution(m);
  bind_q_learning(m);
  bind_sum_tree(m);
  bind_stream(m);
}
