// The sum_tree part of react_fast._core; conventions as in bindings.cpp. A tree is its memory and its capacity.
#include "bind.h"
#include "sum_tree.h"

namespace {

using Check = std::pair<const char*, int64_t>;

// The argument that is wrong and its element, ("", 0) when nothing is; then nothing has been written.
Check named(const rf::SumTreeCheck& found) {
  static const char* const names[] = {"", "indices", "priorities", "uniforms", "empty"};
  return {names[static_cast<int>(found.fault)], found.element};
}

rf::SumTree tree_at(Address nodes, int64_t capacity) { return {at<double>(nodes), capacity}; }

void build(Address nodes, int64_t capacity) {
  py::gil_scoped_release release;
  rf::sum_tree_build(tree_at(nodes, capacity));
}

std::pair<double, double> summary(Address nodes, int64_t capacity) {
  const auto [total, least] = rf::sum_tree_summary(tree_at(nodes, capacity));
  return {total, least};
}

Check update(Address nodes, int64_t capacity, Address indices, Address priorities, int64_t count) {
  py::gil_scoped_release release;
  return named(rf::sum_tree_update(tree_at(nodes, capacity), at<int64_t>(indices), at<double>(priorities), count));
}

Check sample(Address nodes, int64_t capacity, Address uniforms, int64_t count, Address indices, Address priorities) {
  py::gil_scoped_release release;
  return named(rf::sum_tree_sample(tree_at(nodes, capacity), at<double>(uniforms), count, at<int64_t>(indices),
                                   at<double>(priorities)));
}

}  // namespace

void bind_sum_tree(py::module_& m) {
  m.def("sum_tree_size", &rf::sum_tree_size, "capacity"_a);
  m.def("sum_tree_build", &build, "nodes"_a, "capacity"_a);
  m.def("sum_tree_summary", &summary, "nodes"_a, "capacity"_a);
  m.def("sum_tree_update", &update, "nodes"_a, "capacity"_a, "indices"_a, "priorities"_a, "count"_a);
  m.def("sum_tree_sample", &sample, "nodes"_a, "capacity"_a, "uniforms"_a, "count"_a, "indices"_a, "priorities"_a);
}
