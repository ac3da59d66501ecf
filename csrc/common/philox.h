// Which elements does dropout keep? A pure function of (seed, row, column, stream), so no mask is ever stored.
// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "dtype.h"

namespace vitadapter {

// Each use of one seed has a stream of its own; the same numbers stand in vitadapter_ext/reference.py.
enum class Stream : uint32_t { kDropout = 0, kDropoutOut = 1, kDropPath = 2 };

struct Philox4 {
  uint32_t word[4];
};

VA_HOST_DEVICE inline Philox4 philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// One kind of dropout: probability, seed and stream. Four neighbouring columns share one Philox call.
struct Dropout {
  const int64_t* seed = nullptr;  // one element, where the kernel runs; read only where p > 0
  Stream stream = Stream::kDropout;
  double p = 0;

  Dropout() = default;
  Dropout(const int64_t* seed, Stream stream, double p)
      : seed(seed),
        stream(stream),
        p(p),
        on(p > 0),
        dropped_below(uint32_t(p * 4294967296.0)),
        scale(1.0 / (1.0 - p)),
        scale_float(float(scale)) {}

  VA_HOST_DEVICE bool active() const { return on; }

  // The draw of four columns, with *seed read before or now.
  VA_HOST_DEVICE Philox4 words(int64_t row, int64_t column) const { return words(uint64_t(*seed), row, column); }
  VA_HOST_DEVICE Philox4 words(uint64_t key, int64_t row, int64_t column) const {
    return philox(key, uint32_t(column >> 2), uint32_t(row), uint32_t(uint64_t(row) >> 32), uint32_t(stream));
  }

  // 0 where the word drops its element, else 1/(1-p).
  template <typename T>
  VA_HOST_DEVICE T factor(uint32_t word) const {
    return word < dropped_below ? T(0) : sizeof(T) == sizeof(float) ? T(scale_float) : T(scale);
  }

  // The factor of one element; 1 everywhere where dropout is off.
  template <typename T>
  VA_HOST_DEVICE T at(int64_t row, int64_t column) const {
    return active() ? factor<T>(words(row, column).word[column & 3]) : T(1);
  }

 private:
  // Of p, once and not for each element: a GPU has little float64.
  bool on = false;
  uint32_t dropped_below = 0;
  double scale = 1;
  float scale_float = 1;
};

}  // namespace vitadapter
