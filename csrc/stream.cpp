// The physical limit that benchmarks put beside every op: the same bytes with the same threads, no arithmetic.
#include "stream.h"

#include "parallel.h"
#include "simd.h"

namespace rf {
namespace RF_ISA {
namespace {

Span piece(const Span& span, int64_t chunk, int64_t chunks) {
  const int64_t size = (span.bytes / chunks) & ~int64_t{63};
  const int64_t begin = chunk * size;
  return {static_cast<char*>(span.data) + begin, chunk + 1 == chunks ? span.bytes - begin : size};
}

uint32_t read(const Span& span) {
  const char* p = static_cast<const char*>(span.data);
  constexpr int64_t step = RF_VECTOR_BYTES;
  u32v folds[4] = {};
  int64_t i = 0;
  for (; i + 4 * step <= span.bytes; i += 4 * step) {
    for (int u = 0; u < 4; ++u) {
      u32v x;
      std::memcpy(&x, p + i + u * step, step);
      folds[u] ^= x;
    }
  }
  const u32v fold = (folds[0] ^ folds[1]) ^ (folds[2] ^ folds[3]);
  uint32_t sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum ^= fold[lane];
  for (; i < span.bytes; ++i) sum ^= static_cast<unsigned char>(p[i]);
  return sum;
}

void write(const Span& span) {
  char* p = static_cast<char*>(span.data);
  const f32v one = splat(1.0f);
  int64_t i = 0;
  for (; i + RF_VECTOR_BYTES <= span.bytes; i += RF_VECTOR_BYTES) std::memcpy(p + i, &one, RF_VECTOR_BYTES);
  std::memset(p + i, 0, static_cast<size_t>(span.bytes - i));
}

uint64_t run(const StreamArgs& args) {
  uint64_t checksum = 0;
  uint64_t* shared = &checksum;
  parallel_for(args.chunks, args.elements, args.threads, [&](int64_t chunk) {
    uint32_t fold = 0;
    for (int64_t i = 0; i < args.read_count; ++i) fold ^= read(piece(args.reads[i], chunk, args.chunks));
    for (int64_t i = 0; i < args.write_count; ++i) write(piece(args.writes[i], chunk, args.chunks));
    __atomic_fetch_xor(shared, fold, __ATOMIC_RELAXED);
  });
  return checksum;
}

}  // namespace

extern const Stream stream_table;
const Stream stream_table = {&run};

}  // namespace RF_ISA
}  // namespace rf
