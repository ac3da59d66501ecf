// What does the consolidator op compute, and in which arguments does a kernel get it? One struct a direction, shared by
// every CPU and CUDA kernel. Hao et al., "Consolidator: Mergeable Adapter with Grouped Connections for Visual
// Adaptation", ICLR 2023.
//
//   y = base + Σ_i keep_i ∘ (G_i · shuffle_i(x) + bias_i)
//
// G_i is block-diagonal with `groups` blocks: output o belongs to group k = o / group_out and is a sum over that
// group's places q = k·group_in … k·group_in + group_in - 1 of shuffle_i(x). Place q holds x[q] without the shuffle;
// with it, x seen as (groups, group_in) is transposed: x[(q % groups)·group_in + q / groups]. keep_i is drop-path: of
// each sample and branch, 0 or 1/(1 - p).
//
// Backward, with g = dy and g_i = keep_i ∘ g:
//
//   gx        = x_grad_base + Σ_i shuffle_iᵀ(G_iᵀ · g_i)
//   g_weight  = the entries of g_iᵀ · shuffle_i(x) inside the blocks
//   g_bias    = Σ g_i
//   grad_sum  = Σ g, what a bias of base's would get
//
// x, weights and g are rounded to the compute dtype where they enter a product; all else is float32, or float64 when
// the tensors are. The CPU kernels' sums of g are of the rounded g. Tensors are contiguous. Rows may be 0.
#pragma once

#include "philox.h"

namespace vitadapter {

constexpr int kMaxBranches = 16;

struct ConsolidatorBranch {
  Operand weight;  // (out, group_in)
  Operand bias;    // (out) or null
  int64_t groups = 1, group_in = 0, group_out = 0;

  // Which element of x stands at a place of shuffle(x), and the reverse.
  VA_HOST_DEVICE int64_t source(int64_t place, bool shuffle) const {
    return shuffle ? place % groups * group_in + place / groups : place;
  }
  VA_HOST_DEVICE int64_t place(int64_t source, bool shuffle) const {
    return shuffle ? source % group_in * groups + source / group_in : source;
  }
};

struct ConsolidatorProblem {
  int64_t rows = 0, in = 0, out = 0;
  int64_t rows_per_sample = 1;  // drop-path keeps or drops this many rows of a branch together
  Operand x;                    // (rows, in)
  int branches = 0;             // at least 1
  ConsolidatorBranch branch[kMaxBranches];
  bool shuffle = true;
  Dropout drop_path;  // element (sample, branch)
  DType compute = DType::kFloat32;

  template <typename T>
  VA_HOST_DEVICE T keep(int64_t row, int number) const {
    return drop_path.active() ? drop_path.at<T>(row / rows_per_sample, number) : T(1);
  }
};

struct ConsolidatorForward : ConsolidatorProblem {
  Operand base;  // (rows, out) or null, for 0
  Result y;      // (rows, out)
};

struct ConsolidatorBackward : ConsolidatorProblem {
  Operand grad;         // (rows, out), dy
  Operand x_grad_base;  // (rows, in) or null, for 0
  // Null where the gradient is not asked for.
  Result x_grad;                     // (rows, in)
  Result weight_grad[kMaxBranches];  // (out, group_in)
  Result bias_grad[kMaxBranches];    // (out)
  Result grad_sum;                   // (out), float32 or float64
};

// A linear layer's weight with the branches in it: weight + Σ_i G_i, each entry at its place, summed in float32
// (float64) and rounded once.
struct ConsolidatorWeight {
  int64_t in = 0, out = 0;
  Operand weight;  // (out, in)
  int branches = 0;
  ConsolidatorBranch branch[kMaxBranches];  // without biases
  bool shuffle = true;
  Result result;  // (out, in)
};

}  // namespace vitadapter
