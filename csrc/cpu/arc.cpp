// ARC on the CPU: the adapter's kernels, with weights that are made for them.
//
// Idea: ARC is the adapter whose down-projection is diag(rescale) · basisᵀ, whose up-projection is the basis, and which
// has no activation. So nothing of the pipeline is here: the down-projection is written once a call, and the backward
// pass puts together what the adapter says of its two weights.
//
// float16 is float32 here: no kernel multiplies in it, and a small rescale would leave its range.
#include "arc.h"

#include <algorithm>

#include "adapter.h"
#include "elements.h"
#include "memory.h"

namespace vitadapter::cpu {
namespace {

// A matrix is transposed in strips of so many of its rows, which the first-level cache holds.
constexpr int64_t kStripRows = 16;

DType compute_of(const ArcProblem& p) { return p.compute == DType::kFloat16 ? DType::kFloat32 : p.compute; }

template <typename T>
constexpr DType kDTypeOf = sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;

// A vector or matrix as T: where it lies, or converted into `room`.
template <typename T>
const T* read_all(Operand from, int64_t count, T* room) {
  if (from.dtype == kDTypeOf<T>) return static_cast<const T*>(from.data);
  read(from, 0, count, room);
  return room;
}

// Room for what this op makes beside the adapter's call.
template <typename T>
struct Room {
  T *basis, *rescale;
  char* down;     // (rank, dim) in the compute dtype
  T* down_grad;   // (rank, dim)
  T* basis_grad;  // (dim, rank), where it cannot be made in its own place
  double* rescale_grad;

  Room(Pieces& pieces, const ArcProblem& p, bool needs_weight_grads)
      : basis(pieces.take<T>(p.basis.dtype == kDTypeOf<T> ? 0 : p.dim * p.rank)),
        rescale(pieces.take<T>(p.rank)),
        down(pieces.take<char>(p.dim * p.rank * element_size(compute_of(p)))),
        down_grad(pieces.take<T>(needs_weight_grads ? p.dim * p.rank : 0)),
        basis_grad(pieces.take<T>(needs_weight_grads ? p.dim * p.rank : 0)),
        rescale_grad(pieces.take<double>(needs_weight_grads ? p.rank : 0)) {}
};

// diag(rescale) · basisᵀ, rounded once.
template <typename T>
Operand make_down(const ArcProblem& p, const T* basis, const T* rescale, char* room) {
  const DType dtype = compute_of(p);
  auto transpose = [&](auto* to, auto round) {
    for (int64_t begin = 0; begin < p.dim; begin += kStripRows) {
      const int64_t end = std::min(begin + kStripRows, p.dim);
      for (int64_t j = 0; j < p.rank; ++j) {
        for (int64_t d = begin; d < end; ++d) to[j * p.dim + d] = round(rescale[j] * basis[d * p.rank + j]);
      }
    }
  };
  if (dtype == DType::kBFloat16) {
    transpose(reinterpret_cast<uint16_t*>(room), [](T value) { return to_bfloat16(float(value)); });
  } else {
    transpose(reinterpret_cast<T*>(room), [](T value) { return value; });
  }
  return {room, dtype};
}

// basis_grad, which holds gᵀ · z, gets (rescale ∘ G)ᵀ too, and rescale_grad becomes colsum(basis ∘ Gᵀ). G is down_grad.
template <typename T>
void put_together(const ArcProblem& p, const T* basis, const T* rescale, const T* down_grad, T* basis_grad,
                  double* rescale_grad) {
  std::fill(rescale_grad, rescale_grad + p.rank, 0.0);
  for (int64_t begin = 0; begin < p.dim; begin += kStripRows) {
    const int64_t end = std::min(begin + kStripRows, p.dim);
    for (int64_t j = 0; j < p.rank; ++j) {
      T sum = 0;
      for (int64_t d = begin; d < end; ++d) {
        const T grad = down_grad[j * p.dim + d];
        sum += basis[d * p.rank + j] * grad;
        if (basis_grad) basis_grad[d * p.rank + j] += rescale[j] * grad;
      }
      rescale_grad[j] += sum;
    }
  }
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
  const auto room = laid_out<Room<T>>(Slot::kOuterCall, p, false);
  const T* basis = read_all(p.basis, p.dim * p.rank, room.basis);
  const T* rescale = read_all(p.rescale, p.rank, room.rescale);
  AdapterForward adapter = as_adapter(p, make_down(p, basis, rescale, room.down));
  adapter.compute = compute_of(p);
  adapter_forward(level, adapter, parallel_for);
}

template <typename T>
void backward(Level level, const ArcBackward& p, ParallelFor parallel_for) {
  const bool needs_weight_grads = p.basis_grad.data || p.rescale_grad.data;
  const auto room = laid_out<Room<T>>(Slot::kOuterCall, p, needs_weight_grads);
  const T* basis = read_all(p.basis, p.dim * p.rank, room.basis);
  const T* rescale = read_all(p.rescale, p.rank, room.rescale);
  Result down_grad, basis_grad;
  if (needs_weight_grads) down_grad = {room.down_grad, kDTypeOf<T>};
  if (p.basis_grad.data) {
    const bool in_place = p.basis_grad.dtype == kDTypeOf<T>;
    basis_grad = {in_place ? p.basis_grad.data : room.basis_grad, kDTypeOf<T>};
  }
  AdapterBackward adapter = as_adapter(p, make_down(p, basis, rescale, room.down), down_grad, basis_grad);
  adapter.compute = compute_of(p);
  // The adapter sums g as it goes into products.
  const bool sums_alone = p.bias_grad.data && p.grad.dtype == DType::kFloat32 && adapter.compute != DType::kFloat32;
  if (sums_alone) {
    adapter.up_bias_grad = {};
    sum_grad(p, parallel_for);
  }
  adapter_backward(level, adapter, parallel_for);
  if (!needs_weight_grads) return;

  put_together(p, basis, rescale, room.down_grad, static_cast<T*>(basis_grad.data), room.rescale_grad);
  if (p.basis_grad.data != basis_grad.data) write(p.basis_grad, 0, p.dim * p.rank, room.basis_grad);
  for (int64_t j = 0; p.rescale_grad.data && j < p.rank; ++j) store(p.rescale_grad, j, room.rescale_grad[j]);
}

}  // namespace

void arc_forward(Level level, const ArcForward& p, ParallelFor parallel_for) {
  p.x.dtype == DType::kFloat64 ? forward<double>(level, p, parallel_for) : forward<float>(level, p, parallel_for);
}

void arc_backward(Level level, const ArcBackward& p, ParallelFor parallel_for) {
  p.x.dtype == DType::kFloat64 ? backward<double>(level, p, parallel_for) : backward<float>(level, p, parallel_for);
}

}  // namespace vitadapter::cpu
