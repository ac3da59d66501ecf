// What ARC adds to the adapter's kernels, on vectors of floats. Of each strip of rows of the basis, one (rank, columns)
// matrix is turned around in the first-level cache: all else goes along the ranks or along dim as it lies.
#pragma once

#include "arc.h"
#include "memory.h"
#include "simd/rows.h"

namespace vitadapter::cpu {
namespace {

// Elements that are worth a thread.
constexpr int64_t kArcGrain = 1 << 14;

template <class E>
struct ArcStripRoom {
  float *basis, *turned;  // with room for a vector behind each

  ArcStripRoom(Pieces& pieces, int64_t rank)
      : basis(pieces.take<float>(kArcStrip * rank + E::kLanes)),
        turned(pieces.take<float>(kArcStrip * rank + E::kLanes)) {}
};

// Calls body(first row, rows, room) for each strip, with its rows of the basis in the room.
template <class E, typename Body>
void for_strips(const ArcProblem& p, ParallelFor parallel_for, const Body& body) {
  const int64_t grain = quotient_up(kArcGrain, kArcStrip * most(1, p.rank));
  for_ranges(parallel_for, quotient_up(p.dim, kArcStrip), grain, [&](int64_t begin, int64_t end) {
    const auto room = laid_out<ArcStripRoom<E>>(Slot::kThread, p.rank);
    for (int64_t first = begin * kArcStrip; first < least(end * kArcStrip, p.dim); first += kArcStrip) {
      const int64_t rows = least(kArcStrip, p.dim - first);
      read_floats<E>(at(p.basis, first * p.rank), rows * p.rank, room.basis);
      body(first, rows, room);
    }
  });
}

// to[column][row] = from[row][column] of any number of rows; whole vectors of `from` are read.
template <class E>
void turn(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t row = 0; row < rows; row += E::kLanes) {
    transpose_rows<E>(reinterpret_cast<const Unit*>(from + row * stride), stride, columns,
                      reinterpret_cast<Unit*>(to + row), to_stride, least(E::kLanes, rows - row));
  }
}

template <class E>
void arc_down(const ArcProblem& p, const float* rescale, Result down, ParallelFor parallel_for) {
  for_strips<E>(p, parallel_for, [&](int64_t first, int64_t rows, const ArcStripRoom<E>& room) {
    turn<E>(room.basis, p.rank, rows, p.rank, room.turned, kArcStrip);
    for (int64_t j = 0; j < p.rank; ++j) {
      float* const row = room.turned + j * kArcStrip;
      for (int64_t i = 0; i < rows; ++i) row[i] *= rescale[j];
      write_floats<E>(row, rows, at(down, j * p.dim + first));
    }
  });
}

template <class E>
void arc_gradients(const ArcBackward& p, const float* rescale, const ArcWeightGrads<float>& grads,
                   ParallelFor parallel_for) {
  for_strips<E>(p, parallel_for, [&](int64_t first, int64_t rows, const ArcStripRoom<E>& room) {
    turn<E>(grads.down + first, p.dim, p.rank, rows, room.turned, p.rank);
    float* __restrict part = grads.rescale_parts + first / kArcStrip * p.rank;
    for (int64_t j = 0; j < p.rank; ++j) part[j] = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const float *basis = room.basis + i * p.rank, *down = room.turned + i * p.rank;
      for (int64_t j = 0; j < p.rank; ++j) part[j] += basis[j] * down[j];
      if (!grads.up) continue;
      float* __restrict up = grads.up + (first + i) * p.rank;
      for (int64_t j = 0; j < p.rank; ++j) up[j] += rescale[j] * down[j];
    }
    if (grads.up != p.basis_grad.data) {
      write_floats<E>(grads.up + first * p.rank, rows * p.rank, at(p.basis_grad, first * p.rank));
    }
  });
}

}  // namespace
}  // namespace vitadapter::cpu
