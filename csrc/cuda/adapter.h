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

}  // namespace vitadapter::cuda
