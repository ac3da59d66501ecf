// What ARC adds to the adapter's kernels, in standard C++: any processor, any dtype.
#include <algorithm>
#include <vector>

#include "arc.h"
#include "elements.h"

namespace vitadapter::cpu {
namespace {

// Calls body(first row, rows, their elements as T, a strip's room) for each strip of rows of the basis.
template <typename T, typename Body>
void for_strips(const ArcProblem& p, ParallelFor parallel_for, const Body& body) {
  const int64_t strips = (p.dim + kArcStrip - 1) / kArcStrip;
  for_ranges(parallel_for, strips, 8, [&](int64_t begin, int64_t end) {
    std::vector<T> basis(kArcStrip * p.rank), room(kArcStrip * std::max<int64_t>(p.rank, 1));
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = strip * kArcStrip, rows = std::min(kArcStrip, p.dim - first);
      read(p.basis, first * p.rank, rows * p.rank, basis.data());
      body(first, rows, basis.data(), room.data());
    }
  });
}

}  // namespace

template <typename T>
void arc_down_portable(const ArcProblem& p, const T* rescale, Result down, ParallelFor parallel_for) {
  for_strips<T>(p, parallel_for, [&](int64_t first, int64_t rows, const T* basis, T* column) {
    for (int64_t j = 0; j < p.rank; ++j) {
      for (int64_t i = 0; i < rows; ++i) column[i] = rescale[j] * basis[i * p.rank + j];
      write(down, j * p.dim + first, rows, column);
    }
  });
}

template <typename T>
void arc_gradients_portable(const ArcBackward& p, const T* rescale, const ArcWeightGrads<T>& grads,
                            ParallelFor parallel_for) {
  for_strips<T>(p, parallel_for, [&](int64_t first, int64_t rows, const T* basis, T*) {
    T* const up = grads.up ? grads.up + first * p.rank : nullptr;
    for (int64_t j = 0; j < p.rank; ++j) {
      const T* const down = grads.down + j * p.dim + first;
      T sum = 0;
      for (int64_t i = 0; i < rows; ++i) {
        sum += basis[i * p.rank + j] * down[i];
        if (up) up[i * p.rank + j] += rescale[j] * down[i];
      }
      grads.rescale_parts[first / kArcStrip * p.rank + j] = sum;
    }
    if (grads.up != p.basis_grad.data) write(p.basis_grad, first * p.rank, rows * p.rank, up);
  });
}

template void arc_down_portable<float>(const ArcProblem&, const float*, Result, ParallelFor);
template void arc_down_portable<double>(const ArcProblem&, const double*, Result, ParallelFor);
template void arc_gradients_portable<float>(const ArcBackward&, const float*, const ArcWeightGrads<float>&,
                                            ParallelFor);
template void arc_gradients_portable<double>(const ArcBackward&, const double*, const ArcWeightGrads<double>&,
                                             ParallelFor);

}  // namespace vitadapter::cpu
