// What the two files of the emulator's tests share: how they say that something is not so, and kernels from lambdas.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>

#include "adapter_cases.h"
#include "cuda/products.cuh"
#include "cuda_test.h"

namespace vitadapter::test::emulated {

using namespace vitadapter::cuda;
using emulator::settings;
using emulator::statistics;

#if defined(VA_ADDRESS_SANITIZER)
constexpr bool kHasAddressSanitizer = true;
#else
constexpr bool kHasAddressSanitizer = false;
#endif

constexpr int kSeed = 4;
constexpr int kOrders = 5;

inline int checks = 0, wrong_checks = 0, caught = 0;

[[gnu::format(printf, 2, 3)]] inline void expect(bool right, const char* format, ...) {
  ++checks;
  if (right) return;
  ++wrong_checks;
  va_list values;
  va_start(values, format);
  std::printf("emulator: not so: ");
  std::vprintf(format, values);
  std::printf("\n");
  va_end(values);
}

// A kernel from a lambda: what one thread does.
template <typename Run>
struct Kernel {
  static constexpr int kMaxThreads = 1024, kMinBlocks = 1;
  static constexpr bool kNeedsSm80 = true;
  const Run& run;
  void operator()() const { run(); }
};

template <typename Run>
void run_kernel(int64_t blocks, int threads, int64_t shared_bytes, const Run& run) {
  launch(nullptr, blocks, threads, shared_bytes, Kernel<Run>{run});
}

inline float random_float(double spread = 1) { return float(std::normal_distribution<double>(0, spread)(generator)); }
inline uint32_t random_word() { return uint32_t(generator()); }
inline float quiet_nan() { return std::numeric_limits<float>::quiet_NaN(); }

// As it is poisoned: no other NaN.
inline bool is_poison(const void* from, size_t bytes) {
  const auto* const begin = static_cast<const unsigned char*>(from);
  return std::all_of(begin, begin + bytes, [](unsigned char byte) { return byte == 0xff; });
}

// Random bytes at a 16-byte boundary that end where their heap block ends; none is as shared memory is poisoned.
struct Bytes {
  std::unique_ptr<char, Buffer::Free> block;
  unsigned char delivered[16] = {};

  explicit Bytes(size_t count) : block(static_cast<char*>(::operator new[](count, Buffer::kAlignment))) {
    for (size_t i = 0; i < count; ++i) delivered[i] = static_cast<unsigned char>(draw(0, 254));
    memcpy(block.get(), delivered, count);
  }
  bool are_at(const unsigned char* place) const { return !memcmp(place, delivered, 16); }
};

struct Floats {
  float value[33];
};

// Those of emulator_faults_test.cpp.
void check_planted_faults();
void check_demands();

}  // namespace vitadapter::test::emulated
