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

// Its parts, by compute dtype and by how x is stored, each compiled on its own.
bool adapter_forward_bfloat16(const AdapterForward& problem, Stream stream, const AdapterRequest& request);
bool adapter_forward_float16(const AdapterForward& problem, Stream stream, const AdapterRequest& request);
bool adapter_forward_tf32(const AdapterForward& problem, Stream stream, const AdapterRequest& request);
bool adapter_forward_float32(const AdapterForward& problem, Stream stream, const AdapterRequest& request);

// Where the backward pass shall run.
struct AdapterBackwardRun {
  void* workspace = nullptr;
  Stream stream = nullptr;
};

// Bytes of workspace, or -1; with `run`, launched, too.
int64_t adapter_backward_bfloat16(const AdapterBackward& problem, const AdapterRequest& request,
                                  const AdapterBackwardRun* run);
int64_t adapter_backward_float16(const AdapterBackward& problem, const AdapterRequest& request,
                                 const AdapterBackwardRun* run);
int64_t adapter_backward_tf32(const AdapterBackward& problem, const AdapterRequest& request,
                              const AdapterBackwardRun* run);
int64_t adapter_backward_float32(const AdapterBackward& problem, const AdapterRequest& request,
                                 const AdapterBackwardRun* run);

}  // namespace vitadapter::cuda
