// react_fast._core: the hot paths on raw memory. Pointers are integers (torch.Tensor.data_ptr(), or
// ndarray.ctypes.data), 0 for an absent array; strides count elements; dtypes are the tags of dtype.h. Nothing
// is checked here: react_fast.ops refuses bad input before it calls. Every call releases the GIL.
#include <array>
#include <vector>

#include "bind.h"
#include "bounds.h"
#include "isa.h"
#include "moments.h"

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

// ---- advantage ---------------------------------------------------------------------------------------------

rf::GaeInput gae_input(Address values, Address last_values, Address bootstrap_values, Address terminated,
                       Address truncated, Address mask, Address lams, Address offsets, int64_t rows, int64_t length,
                       int dtype, double gamma, double lam, int threads) {
  return {at(values), at(last_values), at(bootstrap_values), at<uint8_t>(terminated), at<uint8_t>(truncated),
          at<uint8_t>(mask), at<double>(lams), {at<int64_t>(offsets), rows, length}, rf::DType(dtype), gamma, lam,
          threads};
}

// Returns the advantages' (count, mean, M2) if they are wanted, else zeros.
std::array<double, 3> gae(Address rewards, Address values, Address last_values, Address bootstrap_values,
                          Address terminated, Address truncated, Address mask, Address lams, Address offsets,
                          int64_t rows, int64_t length, int dtype, double gamma, double lam, Address advantages,
                          Address returns, bool want_moments, bool time_major, int threads) {
  py::gil_scoped_release release;
  std::vector<rf::Moments> of_rows(want_moments ? static_cast<std::size_t>(rows) : 0);
  const auto in = gae_input(values, last_values, bootstrap_values, terminated, truncated, mask, lams, offsets, rows,
                            length, dtype, gamma, lam, threads);
  rf::kernels().advantage->gae(
      {in, at(rewards), at(advantages), at(returns), want_moments ? of_rows.data() : nullptr, time_major});
  rf::Moments total{0, 0, 0};
  for (const rf::Moments& row : of_rows) total = rf::merge(total, row);
  return {total.count, total.mean, total.m2};
}

void gae_backward(Address d_advantages, Address d_returns, Address terminated, Address truncated, Address mask,
                  Address lams, Address offsets, int64_t rows, int64_t length, int dtype, double gamma, double lam,
                  Address d_rewards, Address d_values, Address d_last_values, Address d_bootstrap_values,
                  int threads) {
  py::gil_scoped_release release;
  const auto in = gae_input(0, 0, 0, terminated, truncated, mask, lams, offsets, rows, length, dtype, gamma, lam,
                            threads);
  rf::kernels().advantage->gae_backward({in, at(d_advantages), at(d_returns), at(d_rewards), at(d_values),
                                         at(d_last_values), at(d_bootstrap_values)});
}

void reverse_linear_scan(Address a, Address b, Address init, Address offsets, int64_t rows, int64_t length, int dtype,
                         Address out, int threads) {
  py::gil_scoped_release release;
  rf::kernels().advantage->scan(
      {at(a), at(b), at(init), {at<int64_t>(offsets), rows, length}, rf::DType(dtype), at(out), threads});
}

void reverse_linear_scan_backward(Address a, Address y, Address init, Address upstream, Address offsets, int64_t rows,
                                  int64_t length, int dtype, Address d_a, Address d_b, Address d_init, int threads) {
  py::gil_scoped_release release;
  rf::kernels().advantage->scan_backward({at(a), at(y), at(init), at(upstream), {at<int64_t>(offsets), rows, length},
                                          rf::DType(dtype), at(d_a), at(d_b), at(d_init), threads});
}

void group_advantages(Address rewards, Address groups, Address valid, Address upstream, Address aside, int64_t count,
                      int baseline, int scale, bool raw_singleton, double eps, double ddof, double min_std,
                      Address out) {
  py::gil_scoped_release release;
  rf::group_advantages({at<double>(rewards), at<int64_t>(groups), at<uint8_t>(valid), at<double>(upstream),
                        at<double>(aside), count, baseline, scale, raw_singleton, eps, ddof, min_std,
                        at<double>(out)});
}

std::array<double, 3> moments(Address x, Address mask, int dtype, int64_t count, int threads) {
  py::gil_scoped_release release;
  const rf::Moments m =
      rf::kernels().whiten->moments({at(x), at<uint8_t>(mask), rf::DType(dtype), count, threads});
  return {m.count, m.mean, m.m2};
}

std::array<double, 3> merge_moments(std::array<double, 3> a, std::array<double, 3> b) {
  const rf::Moments m = rf::merge({a[0], a[1], a[2]}, {b[0], b[1], b[2]});
  return {m.count, m.mean, m.m2};
}

void whiten(Address x, Address mask, int dtype, int64_t count, double shift, double scale, double offset,
            Address out, int threads) {
  py::gil_scoped_release release;
  rf::kernels().whiten->whiten(
      {at(x), at<uint8_t>(mask), rf::DType(dtype), count, shift, scale, offset, at(out), threads});
}

// Returns (sum g, sum g (x - mean)) over counting elements.
std::array<double, 2> whiten_sums(Address x, Address mask, Address upstream, int dtype, int64_t count, double mean,
                                  int threads) {
  py::gil_scoped_release release;
  std::array<double, 2> sums;
  rf::kernels().whiten->whiten_sums({at(x), at<uint8_t>(mask), at(upstream), rf::DType(dtype), count, mean, 0, 0,
                                        0, nullptr, threads}, sums.data());
  return sums;
}

void whiten_backward(Address x, Address mask, Address upstream, int dtype, int64_t count, double mean, double slope,
                     double constant, double linear, Address d_x, int threads) {
  py::gil_scoped_release release;
  rf::kernels().whiten->whiten_backward({at(x), at<uint8_t>(mask), at(upstream), rf::DType(dtype), count, mean,
                                            slope, constant, linear, at(d_x), threads});
}

void carry_whitened(Address values, Address mask, Address advantages, Address returns, int dtype, int64_t rows,
                    int64_t length, double shift, double scale, int threads) {
  py::gil_scoped_release release;
  rf::kernels().whiten->carry_whitened({at(values), at<uint8_t>(mask), at(advantages), at(returns), rf::DType(dtype),
                                        rows, length, shift, scale, threads});
}

void bind_advantage(py::module_& m) {
  m.def("gae", &gae, "rewards"_a, "values"_a, "last_values"_a, "bootstrap_values"_a, "terminated"_a, "truncated"_a,
        "mask"_a, "lams"_a, "offsets"_a, "rows"_a, "length"_a, "dtype"_a, "gamma"_a, "lam"_a, "advantages"_a,
        "returns"_a, "want_moments"_a, "time_major"_a, "threads"_a);
  m.def("gae_backward", &gae_backward, "d_advantages"_a, "d_returns"_a, "terminated"_a, "truncated"_a, "mask"_a,
        "lams"_a, "offsets"_a, "rows"_a, "length"_a, "dtype"_a, "gamma"_a, "lam"_a, "d_rewards"_a, "d_values"_a,
        "d_last_values"_a, "d_bootstrap_values"_a, "threads"_a);
  m.def("reverse_linear_scan", &reverse_linear_scan, "a"_a, "b"_a, "init"_a, "offsets"_a, "rows"_a, "length"_a,
        "dtype"_a, "out"_a, "threads"_a);
  m.def("reverse_linear_scan_backward", &reverse_linear_scan_backward, "a"_a, "y"_a, "init"_a, "upstream"_a,
        "offsets"_a, "rows"_a, "length"_a, "dtype"_a, "d_a"_a, "d_b"_a, "d_init"_a, "threads"_a);
  m.def("group_advantages", &group_advantages, "rewards"_a, "groups"_a, "valid"_a, "upstream"_a, "aside"_a, "count"_a,
        "baseline"_a, "scale"_a, "raw_singleton"_a, "eps"_a, "ddof"_a, "min_std"_a, "out"_a);
  m.def("moments", &moments, "x"_a, "mask"_a, "dtype"_a, "count"_a, "threads"_a);
  m.def("merge_moments", &merge_moments, "a"_a, "b"_a);
  m.def("whiten", &whiten, "x"_a, "mask"_a, "dtype"_a, "count"_a, "shift"_a, "scale"_a, "offset"_a, "out"_a,
        "threads"_a);
  m.def("whiten_sums", &whiten_sums, "x"_a, "mask"_a, "upstream"_a, "dtype"_a, "count"_a, "mean"_a, "threads"_a);
  m.def("whiten_backward", &whiten_backward, "x"_a, "mask"_a, "upstream"_a, "dtype"_a, "count"_a, "mean"_a,
        "slope"_a, "constant"_a, "linear"_a, "d_x"_a, "threads"_a);
  m.def("carry_whitened", &carry_whitened, "values"_a, "mask"_a, "advantages"_a, "returns"_a, "dtype"_a, "rows"_a,
        "length"_a, "shift"_a, "scale"_a, "threads"_a);
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
