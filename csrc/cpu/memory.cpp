#include "memory.h"

#include <cstdio>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vitadapter::cpu {
namespace {

struct Memory {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Memory() { std::free(data); }
};

// In bytes. From sysfs, for sysconf adds all of a socket's caches up where a core reaches one of them only.
int64_t last_level_cache() {
  long kilobytes = 0;
  if (FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    if (std::fscanf(file, "%ldK", &kilobytes) != 1) kilobytes = 0;
    std::fclose(file);
  }
  return kilobytes > 0 ? int64_t(kilobytes) << 10 : 32 << 20;
}

}  // namespace

void* workspace(Slot slot, int64_t bytes) {
  thread_local Memory slots[kSlots];
  Memory& memory = slots[int(slot)];
  if (bytes > memory.bytes) {
    std::free(memory.data);
    memory.data = nullptr;
    memory.bytes = 0;
    const int64_t rounded = (bytes + 4095) / 4096 * 4096;
    memory.data = std::aligned_alloc(64, rounded);
    if (!memory.data) throw std::bad_alloc();
    memory.bytes = rounded;
  }
  return memory.data;
}

int64_t stream_bytes() {
  static const int64_t bytes = last_level_cache() / 16;
  return bytes;
}

bool streams(const void* data, int64_t rows, int64_t row_bytes) {
  constexpr int64_t kCacheLine = 64;
  return row_bytes % kCacheLine == 0 && reinterpret_cast<uintptr_t>(data) % kCacheLine == 0 &&
         rows * row_bytes > stream_bytes();
}

void expect_writes(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t kHugePage = 2 << 20, kWorthwhile = 4 * kHugePage;
  if (bytes < kWorthwhile) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace vitadapter::cpu
