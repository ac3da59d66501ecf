// How do the simple kernels (for_each.cuh) of every op load what they multiply, and add it up? In runs of 64 terms,
// which are added in float64: so float32 stays as good as a library's products over a hundred thousand rows. The order
// depends on the shape only.
#pragma once

#include "simt.cuh"

namespace vitadapter::cuda {

// The sum of term(i) for i in [0, count), in runs.
template <typename T, typename Term>
VA_HOST_DEVICE T sum_in_runs(int64_t count, const Term& term) {
  constexpr int64_t kRun = 64;
  double total = 0;
  VA_ROLL
  for (int64_t begin = 0; begin < count; begin += kRun) {
    const int64_t end = begin + kRun < count ? begin + kRun : count;
    T run = 0;
    VA_ROLL
    for (int64_t i = begin; i < end; ++i) run += term(i);
    total += run;
  }
  return T(total);
}

// An operand of a product, in the compute dtype.
template <typename T, typename Problem>
VA_HOST_DEVICE T load_operand(const Problem& p, Operand operand, int64_t index) {
  return rounded(load<T>(operand, index), p.compute);
}

}  // namespace vitadapter::cuda
