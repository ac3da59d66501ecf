// Who runs the chunks of a CPU kernel? The caller's pool: PyTorch's in the extension, std::thread in the C++ tests.
#pragma once

#include <cstdint>

namespace vitadapter::cpu {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Calls the function on disjoint ranges that cover [begin, end), each of at least `grain` items where there are enough.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context);

// Rows are cut into no more chunks than this. Those that have sums of their own for the gradients of parameters take no
// more memory for them together than this, except for a single chunk.
constexpr int64_t kMostChunks = 64, kSumsBytes = 16 << 20;

// Runs body(begin, end) on disjoint ranges that cover [0, count).
template <typename Body>
void for_ranges(ParallelFor parallel_for, int64_t count, int64_t grain, const Body& body) {
  if (count == 0) return;
  parallel_for(
      0, count, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

}  // namespace vitadapter::cpu
