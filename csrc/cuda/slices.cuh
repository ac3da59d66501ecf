// How are the sums that slices of the rows left behind (reduction.cuh) added? In the slices' order, with several loads
// under way at a time.
#pragma once

#include "simt.cuh"

namespace vitadapter::cuda {

struct SliceSums {
  int count;  // of slices

  // The four elements, or the one, at `from` in the first slice; `size`: elements from a slice to the next.
  VA_DEVICE void sum(float (&to)[4], const float* from, int64_t size) const {
    add(to, [&](int slice) { return load16(from + slice * size); });
  }
  VA_DEVICE float sum(const float* from, int64_t size) const {
    struct Word {
      uint32_t word[1];
    };
    float to[1];
    add(to, [&](int slice) { return Word{{load4(from + slice * size)}}; });
    return to[0];
  }

 private:
  template <int kCount, typename Load>
  VA_DEVICE void add(float (&to)[kCount], const Load& load_slice) const {
    constexpr int kUnderWay = 8;
    VA_UNROLL
    for (int i = 0; i < kCount; ++i) to[i] = 0;
    for (int first = 0; first < count; first += kUnderWay) {
      decltype(load_slice(0)) loaded[kUnderWay] = {};
      VA_UNROLL
      for (int s = 0; s < kUnderWay; ++s) {
        if (first + s < count) loaded[s] = load_slice(first + s);
      }
      VA_UNROLL
      for (int s = 0; s < kUnderWay; ++s) {
        VA_UNROLL
        for (int i = 0; i < kCount; ++i) to[i] += float_of(loaded[s].word[i]);
      }
    }
  }
};

}  // namespace vitadapter::cuda
