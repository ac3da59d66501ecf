// The CUDA kernels of the adapter op; the mathematics is in ../common/adapter.h. Launch errors are left to the caller,
// who asks cudaGetLastError().
#pragma once

#include "../common/adapter.h"
#include "for_each.cuh"

namespace vitadapter::cuda {

// The simple kernels: T is double where the tensors are float64, else float.
//
// hidden: (rows, rank) of T, always written (problem.hidden is not read).
template <typename T>
void adapter_forward_simple(const AdapterForward& problem, T* hidden, Stream stream);

// hidden_grad: (rows, rank) of T, workspace; up_product: (dim, rank) of T, workspace; grad_sum: (dim) of T, workspace.
template <typename T>
void adapter_backward_simple(const AdapterBackward& problem, T* hidden_grad, T* up_product, T* grad_sum, Stream stream);

// How a fast kernel shall go about a problem; what is left open it chooses by itself.
struct AdapterRequest {
  int tile_rows = 0;  // rows that a block works on at a time; 0: open
  int keep = -1;      // whether x stays in shared memory until it is the residual; -1: open
  int slices = 0;     // of the rows, that the backward pass sums on their own; 0: open
};

// The fast kernel. False where it does not serve: float64, ranks of 0 and above 256, rows of more than 2^22 elements,
// devices below sm_80, and where shared memory has no room for what is asked.
bool adapter_forward_fast(const AdapterForward& problem, Stream stream, const AdapterRequest& request = {});

// The same for the backward pass, in memory of its own: so many bytes, at an address that is a multiple of 16. -1 where
// the fast kernels do not serve.
int64_t adapter_backward_workspace(const AdapterBackward& problem, const AdapterRequest& request = {});
bool adapter_backward_fast(const AdapterBackward& problem, void* workspace, Stream stream,
                           const AdapterRequest& request = {});

// ---- what the fast kernels do, of which ARC (arc.h) is a kind

// An adapter; or ARC, which is the adapter without an activation whose `up` is the basis and whose down-projection,
// diag(rescale) · upᵀ, nobody writes: the kernels multiply by up, and the product by rescale in float32.
struct AdapterOrArcForward : AdapterForward {
  Operand rescale = {};  // (rank), ARC's; null: an adapter
  // ARC's gradient of x is what its y would be of g, but that dropout comes before rescale and not behind it. On its
  // way it reads the hidden layer that the forward pass kept, and keeps gh and z, each null where nobody asks for it.
  bool is_gradient = false;
  const void* kept_hidden = nullptr;
  void *hidden_grad = nullptr, *z = nullptr;

  VA_HOST_DEVICE bool is_arc() const { return rescale.data; }
};

// ARC's up_grad is the basis' gradient; it has no down_grad.
struct AdapterOrArcBackward : AdapterBackward {
  Operand rescale = {};      // (rank), ARC's; null: an adapter
  Result rescale_grad = {};  // (rank); null where it is not asked for

  VA_HOST_DEVICE bool is_arc() const { return rescale.data; }
  // ghᵀ · x
  VA_HOST_DEVICE bool needs_down_product() const {
    return is_arc() ? up_grad.data || rescale_grad.data : down_grad.data != nullptr;
  }
  VA_HOST_DEVICE bool needs_hidden_grad() const { return x_grad.data || down_bias_grad.data || needs_down_product(); }
};

// Where the backward pass shall run.
struct AdapterBackwardRun {
  void* workspace = nullptr;
  Stream stream = nullptr;
};

// False, or -1 where it would be bytes of workspace, where the fast kernels do not serve. Launched with `stream` or
// `run` only.
bool adapter_or_arc_forward(const AdapterOrArcForward& problem, const AdapterRequest& request, const Stream* stream);
int64_t adapter_or_arc_backward(const AdapterOrArcBackward& problem, const AdapterRequest& request,
                                const AdapterBackwardRun* run);

// Their parts, by compute dtype, each compiled on its own.
bool adapter_forward_bfloat16(const AdapterOrArcForward& problem, const AdapterRequest& request, const Stream* stream);
bool adapter_forward_float16(const AdapterOrArcForward& problem, const AdapterRequest& request, const Stream* stream);
bool adapter_forward_tf32(const AdapterOrArcForward& problem, const AdapterRequest& request, const Stream* stream);
bool adapter_forward_float32(const AdapterOrArcForward& problem, const AdapterRequest& request, const Stream* stream);

int64_t adapter_backward_bfloat16(const AdapterOrArcBackward& problem, const AdapterRequest& request,
                                  const AdapterBackwardRun* run);
int64_t adapter_backward_float16(const AdapterOrArcBackward& problem, const AdapterRequest& request,
                                 const AdapterBackwardRun* run);
int64_t adapter_backward_tf32(const AdapterOrArcBackward& problem, const AdapterRequest& request,
                              const AdapterBackwardRun* run);
int64_t adapter_backward_float32(const AdapterOrArcBackward& problem, const AdapterRequest& request,
                                 const AdapterBackwardRun* run);

}  // namespace vitadapter::cuda
