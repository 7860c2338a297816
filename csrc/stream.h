#pragma once

#include <cstdint>

namespace rf {

struct Span {
  void* data;
  int64_t bytes;
};

// The memory traffic of an op without its arithmetic: every span of `reads` is read once and every span of
// `writes` is written once, `chunks` equal pieces at a time over the threads.
struct StreamArgs {
  const Span* reads;
  int64_t read_count;
  const Span* writes;
  int64_t write_count;
  int64_t chunks;
  int64_t elements;  // decides, as in the ops, whether the calling thread works alone
  int threads;
};

struct Stream {
  uint64_t (*run)(const StreamArgs&);
};

}  // namespace rf
