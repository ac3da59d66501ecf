// The CPU side of the arc op; the mathematics is in ../common/arc.h.
#pragma once

#include "../common/arc.h"
#include "level.h"
#include "parallel.h"

namespace vitadapter::cpu {

// Runs a problem at a level that this machine has.
void arc_forward(Level level, const ArcForward& problem, ParallelFor parallel_for);
void arc_backward(Level level, const ArcBackward& problem, ParallelFor parallel_for);

// ---- what arc.cpp adds to the adapter's kernels, by level; T is double where the tensors are float64, else float

// Writes diag(rescale) · basisᵀ, (rank, dim), rounded once.
template <typename T>
void arc_down_portable(const ArcProblem& problem, const T* rescale, Result down, ParallelFor parallel_for);
void arc_down_avx2(const ArcProblem& problem, const float* rescale, Result down, ParallelFor parallel_for);
void arc_down_avx512(const ArcProblem& problem, const float* rescale, Result down, ParallelFor parallel_for);

// The gradients of the adapter's weights, to be put together.
template <typename T>
struct ArcWeightGrads {
  const T* down;     // G, (rank, dim), with room for a vector behind it
  T* up;             // gᵀ · z, (dim, rank), or null; may lie in the problem's basis_grad
  T* rescale_parts;  // (strips of kArcStrip columns, rank)
};
// Strips of basis rows: each has its own part of rescale's gradient, which are added up in order.
constexpr int64_t kArcStrip = 32;

// up += (rescale ∘ G)ᵀ, from there into the problem's basis_grad, and rescale_parts = colsum(basis ∘ Gᵀ) of each strip.
template <typename T>
void arc_gradients_portable(const ArcBackward& problem, const T* rescale, const ArcWeightGrads<T>& grads,
                            ParallelFor parallel_for);
void arc_gradients_avx2(const ArcBackward& problem, const float* rescale, const ArcWeightGrads<float>& grads,
                        ParallelFor parallel_for);
void arc_gradients_avx512(const ArcBackward& problem, const float* rescale, const ArcWeightGrads<float>& grads,
                          ParallelFor parallel_for);

}  // namespace vitadapter::cpu
