// The forward pass of the consolidator op on vectors of floats, blocks of rows shared out among threads; see
// consolidator_blocks.h.
#pragma once

#include "consolidator_blocks.h"

namespace vitadapter::cpu {
namespace {

template <class E>
struct ForwardRoom {
  float *x, *panel, *lying, *keep;

  ForwardRoom(Pieces& pieces, const ConsolidatorForward& p)
      : x(pieces.take<float>(turned_size<E>(p.in))),
        panel(pieces.take<float>(kPanel * kBlockRows<E>)),
        lying(pieces.take<float>(kBlockRows<E> * kPanel)),
        keep(pieces.take<float>(p.branches * kBlockRows<E>)) {}
};

// Outputs [begin, end) of a branch in a panel that begins at output `origin`.
template <class E>
void add_outputs(const ConsolidatorBranch& b, const float* weight, const float* bias, const int32_t* column,
                 const float* keep, bool first, int64_t begin, int64_t end, int64_t origin, const float* x,
                 float* panel) {
  for (int64_t group = begin / b.group_out; begin < end; ++group) {
    const int64_t stop = least((group + 1) * b.group_out, end);
    in_fours(begin, stop, [&](int64_t output, auto together) {
      constexpr int kColumns = decltype(together)::kColumns;
      float* to[kColumns];
      for (int c = 0; c < kColumns; ++c) to[c] = panel + (output - origin + c) * kBlockRows<E>;
      add_products<E, kColumns>(b.group_in, x, column + group * b.group_in, weight + output * b.group_in, 1, b.group_in,
                                bias + output, keep, first, to);
    });
    begin = stop;
  }
}

template <class E>
void consolidator_forward(const ConsolidatorForward& p, ParallelFor parallel_for) {
  const auto branches = laid_out<Branches<E>>(Slot::kCall, p);
  branches.read(p, p.compute, kBlockRows<E>);
  const bool stream = streams(p.y, p.rows, p.out);
  expect_writes(p.y.data, p.rows * p.out * element_size(p.y.dtype));
  const int64_t grain = quotient_up(kGrain, kBlockRows<E> * (p.in + p.out));
  for_ranges(parallel_for, quotient_up(p.rows, kBlockRows<E>), grain, [&](int64_t begin, int64_t end) {
    const auto room = laid_out<ForwardRoom<E>>(Slot::kThread, p);
    for (int64_t row = begin * kBlockRows<E>; row < least(end * kBlockRows<E>, p.rows); row += kBlockRows<E>) {
      const int64_t rows = least(kBlockRows<E>, p.rows - row);
      turn_in<E>(at(p.x, row * p.in), p.compute, p.in, rows, room.x);
      read_keep<E>(p, row, rows, room.keep);
      for (int64_t output = 0; output < p.out; output += kPanel) {
        const int64_t stop = least(output + kPanel, p.out);
        for (int i = 0; i < p.branches; ++i) {
          const float* const keep = p.drop_path.active() ? room.keep + i * kBlockRows<E> : nullptr;
          add_outputs<E>(p.branch[i], branches.weight[i], branches.bias[i], branches.column[i], keep, i == 0, output,
                         stop, output, room.x, room.panel);
        }
        const int64_t begins = row * p.out + output;
        turn_out<E>(room.panel, stop - output, rows, p.out, at(p.base, begins), at(p.y, begins), stream, room.lying);
      }
    }
    if (stream) E::stream_fence();
  });
}

}  // namespace
}  // namespace vitadapter::cpu
