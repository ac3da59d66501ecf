// Where do the CPU kernels keep packed weights, blocks of rows and partial sums, and what do they know of the machine's
// memory?
#pragma once

#include <cstdint>

namespace vitadapter::cpu {

// What a thread has for its own part of a call, for what all threads of the call share, and for an op that is made of
// another's call.
enum class Slot { kThread, kCall, kOuterCall };
constexpr int kSlots = 3;

// At least `bytes`, aligned to 64, valid until this thread asks for the same slot again. Each thread keeps it from call
// to call: fresh pages would cost more than the arithmetic of a small problem. Throws std::bad_alloc.
void* workspace(Slot slot, int64_t bytes);

// Takes pieces one after the other; without memory it only counts. So one constructor both measures and divides.
class Pieces {
 public:
  explicit Pieces(void* memory = nullptr) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// A T(pieces, arguments...) over this thread's workspace.
template <typename T, typename... Arguments>
T laid_out(Slot slot, const Arguments&... arguments) {
  Pieces count;
  T(count, arguments...);
  Pieces pieces(workspace(slot, count.used()));
  return T(pieces, arguments...);
}

// An output larger than this is better written past the caches: it is new memory, which an ordinary store would first
// read, and by the time that it is used other tensors have taken its place.
int64_t stream_bytes();
// Whether to write so many rows that way, which wants whole cache lines.
bool streams(const void* data, int64_t rows, int64_t row_bytes);

// Asks for huge pages under a large output that nobody has written yet, which makes its first writes cheaper.
void expect_writes(void* data, int64_t bytes);

}  // namespace vitadapter::cpu
