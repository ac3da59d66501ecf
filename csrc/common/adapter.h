// What does the adapter op compute, and in which arguments does a kernel get it? One struct a direction, shared by
// every CPU and CUDA kernel.
//
//   hidden = x · downᵀ + down_bias                     (rows, rank), kept for the backward pass
//   z      = dropout ∘ act(hidden)
//   y      = residual + drop_path ∘ scale ∘ dropout_out ∘ (z · upᵀ + up_bias)
//
// Backward, with g = dy and g' = drop_path ∘ dropout_out ∘ g:
//
//   gh   = ((g' ∘ scale) · up) ∘ dropout ∘ act'(hidden)
//   gx   = gh · down (+ g, where x is the residual)
//   G    = g'ᵀ · z                                     (dim, rank)
//   g_up = scale ∘ G         g_up_bias = scale ∘ Σ g'
//   g_down = ghᵀ · x         g_down_bias = Σ gh
//   g_scale = rowsum(up ∘ G) + up_bias ∘ Σ g'          so a learned scale costs no pass over the rows
//
// x, down, up and g are rounded to the compute dtype where they enter a product; all else is float32, or float64 when
// the tensors are. Kernels whose products take 2 bytes alone also round z and gh there, and scale ∘ up or scale ∘ g',
// as plain PyTorch does; the CUDA kernels' g_down_bias sums the rounded gh. Tensors are contiguous. Rows or rank may be
// 0.
#pragma once

#include "activation.h"
#include "philox.h"

namespace vitadapter {

struct AdapterProblem {
  int64_t rows = 0, dim = 0, rank = 0;
  int64_t rows_per_sample = 1;  // drop-path keeps or drops this many rows together
  Operand x;                    // (rows, dim)
  Operand down;                 // (rank, dim)
  Operand up;                   // (dim, rank)
  Operand up_bias;              // (dim) or null
  Operand scale;                // (1) or (dim); null: scale_value
  bool scale_is_channel = false;
  double scale_value = 1;
  Activation activation = Activation::kGelu;
  Dropout dropout, dropout_out, drop_path;
  DType compute = DType::kFloat32;
  bool allow_tf32 = false;  // whether float32 products may round their operands to TF32

  template <typename T>
  VA_HOST_DEVICE T scale_at(int64_t column) const {
    return scale.data ? load<T>(scale, scale_is_channel ? column : 0) : T(scale_value);
  }
  template <typename T>
  VA_HOST_DEVICE T sample_factor(int64_t row) const {
    return drop_path.active() ? drop_path.at<T>(row / rows_per_sample, 0) : T(1);
  }
};

struct AdapterForward : AdapterProblem {
  Operand down_bias;       // (rank) or null
  Operand residual;        // (rows, dim); may be x itself
  Result y;                // (rows, dim)
  void* hidden = nullptr;  // (rows, rank), float32 or float64; null: not kept
};

struct AdapterBackward : AdapterProblem {
  Operand grad;                  // (rows, dim), dy
  const void* hidden = nullptr;  // (rows, rank), as the forward pass kept it
  bool residual_is_x = true;     // whether gx carries the residual's gradient too
  // Null where the gradient is not asked for.
  Result x_grad;          // (rows, dim)
  Result down_grad;       // (rank, dim)
  Result down_bias_grad;  // (rank)
  Result up_grad;         // (dim, rank)
  Result up_bias_grad;    // (dim)
  Result scale_grad;      // (1) or (dim)

  VA_HOST_DEVICE bool needs_hidden_grad() const { return x_grad.data || down_grad.data || down_bias_grad.data; }
  VA_HOST_DEVICE bool needs_up_product() const { return up_grad.data || scale_grad.data; }
  VA_HOST_DEVICE bool needs_grad_sum() const { return up_bias_grad.data || (scale_grad.data && up_bias.data); }
};

}  // namespace vitadapter
