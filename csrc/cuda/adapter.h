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
};

// The fast kernel. False where it does not serve: float64, ranks of 0 and above 256, rows of more than 2^22 elements,
// devices below sm_80, and where shared memory has no room for what is asked.
bool adapter_forward_fast(const AdapterForward& problem, Stream stream, const AdapterRequest& request = {});

// Its parts, by compute dtype and by how x is stored, each compiled on its own.
bool adapter_forward_bfloat16(const AdapterForward& problem, Stream stream, const AdapterRequest& request);
bool adapter_forward_float16(const AdapterForward& problem, Stream stream, const AdapterRequest& request);
bool adapter_forward_tf32(const AdapterForward& problem, Stream stream, const AdapterRequest& request);
bool adapter_forward_float32(const AdapterForward& problem, Stream stream, const AdapterRequest& request);

}  // namespace vitadapter::cuda
