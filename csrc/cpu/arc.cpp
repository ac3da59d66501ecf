// ARC on the CPU: the adapter's kernels, with weights that are made for them.
//
// Idea: ARC is the adapter whose down-projection is diag(rescale) · basisᵀ, whose up-projection is the basis, and which
// has no activation. So nothing of the pipeline is here: the down-projection is written once a call, and the backward
// pass puts together what the adapter says of its two weights. At dim 768 and rank 64 that takes 5 µs forward and 12 µs
// backward (rank 8: 1 and 3), 1 to 2 % of the time of 1,576 tokens: two cores of an AMD EPYC (Zen 5) at level bf16. On
// a few rows it is a large part of the time, and so it is at ranks that ARC is not made for (dim 1,280, rank 256: 70
// and 150 µs or more on one core). A rescale in the middle of the adapter's kernels would save it, at the price of a
// second way through each of them.
//
// float16 is float32 here: no kernel multiplies in it, and a small rescale would leave its range.
#include "arc.h"

#include <algorithm>

#include "adapter.h"
#include "elements.h"
#include "memory.h"

namespace vitadapter::cpu {
namespace {

DType compute_of(const ArcProblem& p) { return p.compute == DType::kFloat16 ? DType::kFloat32 : p.compute; }

template <typename T>
constexpr DType kDTypeOf = sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;

int64_t strips_of(const ArcProblem& p) { return (p.dim + kArcStrip - 1) / kArcStrip; }

// What is made beside the adapter's call.
template <typename T>
struct Room {
  T* rescale;
  char* down;  // (rank, dim) in the compute dtype
  T *down_grad, *up_grad, *rescale_parts;

  Room(Pieces& pieces, const ArcProblem& p, bool needs_down_grad, bool needs_up_grad)
      : rescale(pieces.take<T>(p.rank)),
        down(pieces.take<char>(p.dim * p.rank * element_size(compute_of(p)))),
        // A vector at the end of the last row may reach past it.
        down_grad(pieces.take<T>(needs_down_grad ? p.dim * p.rank + kArcStrip : 0)),
        up_grad(pieces.take<T>(needs_up_grad ? p.dim * p.rank : 0)),
        rescale_parts(pieces.take<T>(needs_down_grad ? strips_of(p) * p.rank : 0)) {}
};

Operand make_down(Level level, const ArcProblem& p, const Room<float>& room, ParallelFor parallel_for) {
  const Result down{room.down, compute_of(p)};
#if VITADAPTER_X86
  if (level >= Level::kAvx512) {
    arc_down_avx512(p, room.rescale, down, parallel_for);
  } else if (level == Level::kAvx2) {
    arc_down_avx2(p, room.rescale, down, parallel_for);
  } else
#endif
    arc_down_portable(p, room.rescale, down, parallel_for);
  return {down.data, down.dtype};
}
Operand make_down(Level, const ArcProblem& p, const Room<double>& room, ParallelFor parallel_for) {
  arc_down_portable(p, room.rescale, {room.down, DType::kFloat64}, parallel_for);
  return {room.down, DType::kFloat64};
}

void put_together(Level level, const ArcBackward& p, const float* rescale, const ArcWeightGrads<float>& grads,
                  ParallelFor parallel_for) {
#if VITADAPTER_X86
  if (level >= Level::kAvx512) return arc_gradients_avx512(p, rescale, grads, parallel_for);
  if (level == Level::kAvx2) return arc_gradients_avx2(p, rescale, grads, parallel_for);
#endif
  arc_gradients_portable(p, rescale, grads, parallel_for);
}
void put_together(Level, const ArcBackward& p, const double* rescale, const ArcWeightGrads<double>& grads,
                  ParallelFor parallel_for) {
  arc_gradients_portable(p, rescale, grads, parallel_for);
}

// Σ g in float32. A thread has whole columns, so that nothing is left to be added up.
void sum_grad(const ArcBackward& p, ParallelFor parallel_for) {
  constexpr int64_t kColumns = 128, kBlockRows = 64;
  const int64_t strips = (p.dim + kColumns - 1) / kColumns;
  for_ranges(parallel_for, strips, 1, [&](int64_t first, int64_t last) {
    for (int64_t strip = first; strip < last; ++strip) {
      const int64_t begin = strip * kColumns, columns = std::min(kColumns, p.dim - begin);
      const float* const grad = static_cast<const float*>(p.grad.data) + begin;
      float total[kColumns] = {};
      for (int64_t row = 0; row < p.rows; row += kBlockRows) {
        // The block's own sum first: short sums keep float32's rounding small over many rows.
        float sum[kColumns] = {};
        for (int64_t i = row; i < std::min(row + kBlockRows, p.rows); ++i) {
          for (int64_t d = 0; d < columns; ++d) sum[d] += grad[i * p.dim + d];
        }
        for (int64_t d = 0; d < columns; ++d) total[d] += sum[d];
      }
      write(p.bias_grad, begin, columns, total);
    }
  });
}

template <typename T>
void forward(Level level, const ArcForward& p, ParallelFor parallel_for) {
  const auto room = laid_out<Room<T>>(Slot::kOuterCall, p, false, false);
  read(p.rescale, 0, p.rank, room.rescale);
  AdapterForward adapter = as_adapter(p, make_down(level, p, room, parallel_for));
  adapter.compute = compute_of(p);
  adapter_forward(level, adapter, parallel_for);
}

template <typename T>
void backward(Level level, const ArcBackward& p, ParallelFor parallel_for) {
  // The basis' gradient is made in its own place where that is as wide as its sums.
  const bool needs_down_grad = p.basis_grad.data || p.rescale_grad.data;
  const bool needs_up_grad = p.basis_grad.data && p.basis_grad.dtype != kDTypeOf<T>;
  const auto room = laid_out<Room<T>>(Slot::kOuterCall, p, needs_down_grad, needs_up_grad);
  read(p.rescale, 0, p.rank, room.rescale);
  const ArcWeightGrads<T> grads{needs_down_grad ? room.down_grad : nullptr,
                                needs_up_grad ? room.up_grad : static_cast<T*>(p.basis_grad.data), room.rescale_parts};
  // The down-projection is for x's gradient alone.
  const Operand down = p.x_grad.data ? make_down(level, p, room, parallel_for) : Operand{room.down, compute_of(p)};
  AdapterBackward adapter = as_adapter(p, down, {const_cast<T*>(grads.down), kDTypeOf<T>}, {grads.up, kDTypeOf<T>});
  adapter.compute = compute_of(p);
  // The adapter sums g as it goes into products.
  if (p.bias_grad.data && p.grad.dtype == DType::kFloat32 && adapter.compute != DType::kFloat32) {
    adapter.up_bias_grad = {};
    sum_grad(p, parallel_for);
  }
  adapter_backward(level, adapter, parallel_for);
  if (!needs_down_grad) return;

  put_together(level, p, room.rescale, grads, parallel_for);
  for (int64_t j = 0; p.rescale_grad.data && j < p.rank; ++j) {
    double sum = 0;
    for (int64_t strip = 0; strip < strips_of(p); ++strip) sum += room.rescale_parts[strip * p.rank + j];
    store(p.rescale_grad, j, sum);
  }
}

}  // namespace

void arc_forward(Level level, const ArcForward& p, ParallelFor parallel_for) {
  p.x.dtype == DType::kFloat64 ? forward<double>(level, p, parallel_for) : forward<float>(level, p, parallel_for);
}

void arc_backward(Level level, const ArcBackward& p, ParallelFor parallel_for) {
  p.x.dtype == DType::kFloat64 ? backward<double>(level, p, parallel_for) : backward<float>(level, p, parallel_for);
}

}  // namespace vitadapter::cpu
