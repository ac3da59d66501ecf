// What do the tests of every CPU kernel need? Threads, and workspaces that hold nothing of use.
#pragma once

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace vitadapter::test {

template <int kThreads>
void thread_pool(int64_t begin, int64_t end, int64_t, cpu::RangeFunction function, void* context) {
  std::vector<std::thread> threads;
  auto bound = [&](int64_t t) { return begin + (end - begin) * t / kThreads; };
  for (int64_t t = 1; t < kThreads; ++t) {
    if (bound(t) < bound(t + 1)) threads.emplace_back(function, bound(t), bound(t + 1), context);
  }
  // The caller takes part, as in PyTorch's pool: what it has in its workspace must outlive that.
  if (begin < bound(1)) function(begin, bound(1), context);
  for (std::thread& thread : threads) thread.join();
}

// What a kernel leaves in this thread's workspaces, the next one must not read.
inline void poison_workspaces() {
  constexpr int64_t kBytes = 4 << 20;
  for (int slot = 0; slot < cpu::kSlots; ++slot) memset(cpu::workspace(cpu::Slot(slot), kBytes), 0xff, kBytes);
}

}  // namespace vitadapter::test
