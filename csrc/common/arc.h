// What does the arc op compute, and in which arguments does a kernel get it? One struct a direction, shared by every
// CPU and CUDA kernel. Dong et al., "Efficient Adaptation of Large Vision Transformer via Adapter Re-Composing",
// NeurIPS 2023.
//
//   hidden = (x · basis) ∘ rescale                     (rows, rank), kept for the backward pass
//   z      = dropout ∘ hidden
//   y      = x + z · basisᵀ + bias
//
// Backward, with g = dy:
//
//   gh        = (g · basis) ∘ dropout                  (rows, rank)
//   gx        = g + (gh ∘ rescale) · basisᵀ
//   G         = ghᵀ · x                                (rank, dim)
//   g_basis   = gᵀ · z + (rescale ∘ G)ᵀ                (dim, rank), for the basis is used twice
//   g_rescale = colsum(basis ∘ Gᵀ)                     so nobody divides by rescale, which starts at 0
//   g_bias    = Σ g
//
// x, basis and g are rounded to the compute dtype where they enter a product, basis before or after it meets rescale;
// all else is float32, or float64 when the tensors are, and g_bias sums g as it came. Kernels whose products take 2
// bytes alone also round z and gh there, gh once more after it has met rescale. A rescale of any size must stay what it
// is: diag(rescale) · basisᵀ in float16 would lose a small one, as those kernels' z does below 1e-7 in float16: there
// g_basis lacks gᵀ · z. Tensors are contiguous. Rows or rank may be 0.
#pragma once

#include "adapter.h"

namespace vitadapter {

struct ArcProblem {
  int64_t rows = 0, dim = 0, rank = 0;
  Operand x;        // (rows, dim), the residual too
  Operand basis;    // (dim, rank)
  Operand rescale;  // (rank)
  Dropout dropout;  // the adapter's stream kDropout: equal seeds, equal masks
  DType compute = DType::kFloat32;
  bool allow_tf32 = false;  // whether float32 products may round their operands to TF32
};

struct ArcForward : ArcProblem {
  Operand bias;            // (dim) or null
  Result y;                // (rows, dim), in x's dtype
  void* hidden = nullptr;  // (rows, rank), float32 or float64; null: not kept
};

struct ArcBackward : ArcProblem {
  Operand grad;                  // (rows, dim), dy
  const void* hidden = nullptr;  // (rows, rank), as the forward pass kept it
  // Null where the gradient is not asked for.
  Result x_grad;        // (rows, dim)
  Result basis_grad;    // (dim, rank)
  Result rescale_grad;  // (rank)
  Result bias_grad;     // (dim)
};

// ---- the same as the adapter's problem: `down` is diag(rescale) · basisᵀ, (rank, dim), which the caller has written

inline AdapterProblem as_adapter(const ArcProblem& p, Operand down) {
  AdapterProblem same;
  same.rows = p.rows;
  same.dim = p.dim;
  same.rank = p.rank;
  same.x = p.x;
  same.down = down;
  same.up = p.basis;
  same.activation = Activation::kIdentity;
  same.dropout = p.dropout;
  same.compute = p.compute;
  same.allow_tf32 = p.allow_tf32;
  return same;
}

inline AdapterForward as_adapter(const ArcForward& p, Operand down) {
  AdapterForward same;
  static_cast<AdapterProblem&>(same) = as_adapter(static_cast<const ArcProblem&>(p), down);
  same.up_bias = p.bias;
  same.residual = p.x;
  same.y = p.y;
  same.hidden = p.hidden;
  return same;
}

// Its down_grad is G and its up_grad gᵀ · z. The caller has room for them where the basis' gradient (both) or the
// rescale's (G) is asked for, and puts those together.
inline AdapterBackward as_adapter(const ArcBackward& p, Operand down, Result down_grad, Result up_grad) {
  AdapterBackward same;
  static_cast<AdapterProblem&>(same) = as_adapter(static_cast<const ArcProblem&>(p), down);
  same.grad = p.grad;
  same.hidden = p.hidden;
  same.residual_is_x = true;
  same.x_grad = p.x_grad;
  same.down_grad = down_grad;
  same.up_grad = up_grad;
  same.up_bias_grad = p.bias_grad;
  return same;
}

}  // namespace vitadapter
