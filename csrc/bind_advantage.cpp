// The advantage part of react_fast._core, whitening with it; conventions as in bindings.cpp.
#include <array>
#include <cmath>
#include <vector>

#include "bind.h"
#include "isa.h"

namespace {

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
                          Address returns, bool want_moments, int threads) {
  py::gil_scoped_release release;
  std::vector<rf::Moments> of_rows(want_moments ? static_cast<std::size_t>(rows) : 0);
  const auto in = gae_input(values, last_values, bootstrap_values, terminated, truncated, mask, lams, offsets, rows,
                            length, dtype, gamma, lam, threads);
  rf::kernels().advantage->gae(
      {in, at(rewards), at(advantages), at(returns), want_moments ? of_rows.data() : nullptr, false});
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

// Whether a mask of numbers holds zeros and ones alone; `flags` is the mask as bool.
bool zeros_and_ones(Address mask, int dtype, int64_t count, Address flags) {
  py::gil_scoped_release release;
  return rf::kernels().advantage->zeros_and_ones(at(mask), rf::DType(dtype), count, at<uint8_t>(flags));
}

// Advantages that masked steps take over from the next counting one, whitened over the counting ones, and A + V from
// before. Returns false, with nothing whitened, where the mask has other numbers than 0 and 1 or counts fewer than two.
bool gae_carried_whitened(Address rewards, Address values, Address mask, int mask_dtype, int64_t rows, int64_t length,
                          int dtype, double gamma, double lam, double eps, Address advantages, Address returns,
                          int threads) {
  py::gil_scoped_release release;
  const int64_t count = rows * length;
  std::vector<uint8_t> flags(static_cast<std::size_t>(count));
  std::vector<rf::Moments> of_rows(static_cast<std::size_t>(rows));
  const rf::Kernels& kernels = rf::kernels();
  if (!kernels.advantage->zeros_and_ones(at(mask), rf::DType(mask_dtype), count, flags.data())) return false;
  const rf::GaeInput in{at(values), nullptr, nullptr, nullptr, nullptr, flags.data(), nullptr, {nullptr, rows, length},
                        rf::DType(dtype), gamma, lam, threads};
  kernels.advantage->gae({in, at(rewards), at(advantages), at(returns), of_rows.data(), true});
  rf::Moments total{0, 0, 0};
  for (const rf::Moments& row : of_rows) total = rf::merge(total, row);
  if (total.count < 2) return false;
  const double scale = 1 / std::sqrt(total.m2 / (total.count - 1) + eps);
  kernels.whiten->whiten(
      {at(advantages), nullptr, rf::DType(dtype), count, total.mean, scale, 0, at(advantages), threads});
  return true;
}

rf::PlainGaeArgs plain_gae(Address rewards, Address values, Address next_values, Address last_values,
                           Address terminated, Address done, int64_t rows, int64_t length, int dtype, double gamma,
                           double decay, Address advantages, Address returns, int threads) {
  return {at(rewards), at(values), at(next_values), at(last_values), at<uint8_t>(terminated), at<uint8_t>(done), rows,
          length, rf::DType(dtype), gamma, decay, at(advantages), at(returns), threads};
}

void gae_by_time(Address rewards, Address values, Address last_values, Address terminated, int64_t rows,
                 int64_t length, int dtype, double gamma, double decay, Address advantages, Address returns,
                 int threads) {
  py::gil_scoped_release release;
  rf::kernels().plain_advantage->by_time(plain_gae(rewards, values, 0, last_values, terminated, 0, rows, length, dtype,
                                                   gamma, decay, advantages, returns, threads));
}

void gae_ahead(Address rewards, Address values, Address next_values, Address terminated, Address done, int64_t rows,
               int64_t length, double gamma, double decay, Address advantages, Address returns, int threads) {
  py::gil_scoped_release release;
  rf::kernels().plain_advantage->ahead(plain_gae(rewards, values, next_values, 0, terminated, done, rows, length,
                                                 static_cast<int>(rf::DType::float32), gamma, decay, advantages,
                                                 returns, threads));
}

}  // namespace

void bind_advantage(py::module_& m) {
  m.def("gae", &gae, "rewards"_a, "values"_a, "last_values"_a, "bootstrap_values"_a, "terminated"_a, "truncated"_a,
        "mask"_a, "lams"_a, "offsets"_a, "rows"_a, "length"_a, "dtype"_a, "gamma"_a, "lam"_a, "advantages"_a,
        "returns"_a, "want_moments"_a, "threads"_a);
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
  m.def("zeros_and_ones", &zeros_and_ones, "mask"_a, "dtype"_a, "count"_a, "flags"_a);
  m.def("gae_carried_whitened", &gae_carried_whitened, "rewards"_a, "values"_a, "mask"_a, "mask_dtype"_a, "rows"_a,
        "length"_a, "dtype"_a, "gamma"_a, "lam"_a, "eps"_a, "advantages"_a, "returns"_a, "threads"_a);
  m.def("gae_by_time", &gae_by_time, "rewards"_a, "values"_a, "last_values"_a, "terminated"_a, "rows"_a, "length"_a,
        "dtype"_a, "gamma"_a, "decay"_a, "advantages"_a, "returns"_a, "threads"_a);
  m.def("gae_ahead", &gae_ahead, "rewards"_a, "values"_a, "next_values"_a, "terminated"_a, "done"_a, "rows"_a,
        "length"_a, "gamma"_a, "decay"_a, "advantages"_a, "returns"_a, "threads"_a);
}
