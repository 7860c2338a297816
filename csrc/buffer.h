// Scratch that a call frees at its end. Included by sources that are compiled per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rf {
namespace RF_ISA {
namespace {

template <class T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t count) : data(new T[static_cast<size_t>(count > 0 ? count : 1)]) {}
  ~Buffer() { delete[] data; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T& operator[](int64_t i) { return data[i]; }
};

}  // namespace
}  // namespace RF_ISA
}  // namespace rf
