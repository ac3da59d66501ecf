// The forward pass of the consolidator op on vectors of floats, blocks of rows shared out among threads; see
// consolidator_blocks.h.
#pragma once

#include "consolidator_blocks.h"

namespace vitadapter::cpu {
namespace {

template <class E>
struct ForwardCall {
  Branches<E> branches;
  float* bias[kMaxBranches];  // null where there is none

  ForwardCall(Pieces& pieces, const ConsolidatorForward& p) : branches(pieces, p) {
    for (int i = 0; i < p.branches; ++i) bias[i] = p.branch[i].bias.data ? pieces.take<float>(p.out) : nullptr;
  }

  void read(const ConsolidatorForward& p) const {
    branches.read(p, p.compute, kBlockRows<E>);
    for (int i = 0; i < p.branches; ++i) {
      if (bias[i]) read_floats<E>(p.branch[i].bias, p.out, bias[i]);
    }
  }
};

template <class E>
struct ForwardRoom {
  float *x, *panel, *lying, *keep;

  ForwardRoom(Pieces& pieces, const ConsolidatorForward& p)
      : x(pieces.take<float>(turned_size<E>(p.in))),
        panel(pieces.take<float>(kPanel * kBlockRows<E>)),
        lying(pieces.take<float>(kBlockRows<E> * kPanel)),
        keep(pieces.take<float>(p.branches * kBlockRows<E>)) {}
};

// Outputs [begin, end) of a branch, in a panel of just these; `bias` may be null.
template <class E>
void add_outputs(const ConsolidatorBranch& b, const float* weight, const float* bias, const int32_t* column,
                 const float* keep, bool first, int64_t begin, int64_t end, const float* x, float* panel) {
  int64_t start = begin;
  for (int64_t group = begin / b.group_out; start < end; ++group) {
    const int64_t stop = least((group + 1) * b.group_out, end);
    in_fours(start, stop, [&](int64_t output, auto together) {
      constexpr int kColumns = decltype(together)::kColumns;
      float* to[kColumns];
      for (int c = 0; c < kColumns; ++c) to[c] = panel + (output - begin + c) * kBlockRows<E>;
      add_products<E, kColumns>(b.group_in, x, column + group * b.group_in, weight + output * b.group_in, 1, b.group_in,
                                bias ? bias + output : nullptr, keep, first, to);
    });
    start = stop;
  }
}

template <class E>
void consolidator_forward(const ConsolidatorForward& p, ParallelFor parallel_for) {
  const auto call = laid_out<ForwardCall<E>>(Slot::kCall, p);
  call.read(p);
  const int64_t row_bytes = p.out * element_size(p.y.dtype);
  const bool stream = streams(p.y.data, p.rows, row_bytes);
  expect_writes(p.y.data, p.rows * row_bytes);
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
          add_outputs<E>(p.branch[i], call.branches.weight[i], call.bias[i], call.branches.column[i], keep, i == 0,
                         output, stop, room.x, room.panel);
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
