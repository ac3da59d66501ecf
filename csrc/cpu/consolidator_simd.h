// The consolidator op on vectors of floats, and a linear layer's weight with the branches in it: read and written once,
// a row at a time.
#pragma once

#include "consolidator_backward.h"
#include "consolidator_forward.h"

namespace vitadapter::cpu {
namespace {

template <class E>
struct WeightRoom {
  float* row;
  WeightRoom(Pieces& pieces, int64_t in) : row(pieces.take<float>(in)) {}
};

template <class E>
void consolidator_weight(const ConsolidatorWeight& p, ParallelFor parallel_for) {
  const auto branches = laid_out<Branches<E>>(Slot::kCall, p);
  branches.read(p, DType::kFloat32, 1);
  for_ranges(parallel_for, p.out, quotient_up(kGrain, p.in), [&](int64_t begin, int64_t end) {
    const auto room = laid_out<WeightRoom<E>>(Slot::kThread, p.in);
    for (int64_t output = begin; output < end; ++output) {
      read_floats<E>(at(p.weight, output * p.in), p.in, room.row);
      for (int i = 0; i < p.branches; ++i) {
        const int64_t group_in = p.branch[i].group_in;
        const int32_t* const source = branches.column[i] + output / p.branch[i].group_out * group_in;
        const float* const weight = branches.weight[i] + output * group_in;
        for (int64_t s = 0; s < group_in; ++s) room.row[source[s]] += weight[s];
      }
      write_floats<E>(room.row, p.in, at(p.result, output * p.in));
    }
  });
}

}  // namespace
}  // namespace vitadapter::cpu
