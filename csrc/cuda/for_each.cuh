// One thread an index, with nothing shared between threads: the form of the simple kernels.
#pragma once

#include "simt.cuh"

namespace vitadapter::cuda {

template <typename Map>
struct ForEach {
  static constexpr int kMaxThreads = 256, kMinBlocks = 1;
  static constexpr bool kNeedsSm80 = false;

  int64_t count;
  Map map;

  VA_DEVICE void operator()() const {
    const int64_t stride = block_count() * thread_count();
    for (int64_t i = block_index() * thread_count() + thread_index(); i < count; i += stride) map(i);
  }
};

// map(i) for every i in [0, count).
template <typename Map>
void for_each(Stream stream, int64_t count, const Map& map) {
  constexpr int kThreads = ForEach<Map>::kMaxThreads;
  constexpr int64_t kMaxBlocks = 1 << 20;
  if (count == 0) return;
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  launch(stream, blocks < kMaxBlocks ? blocks : kMaxBlocks, kThreads, 0, ForEach<Map>{count, map});
}

}  // namespace vitadapter::cuda
