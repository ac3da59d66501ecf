// The CUDA kernels of the arc op; the mathematics is in ../common/arc.h. They are the adapter's (adapter.h), with an
// end of the reduction of its own. Launch errors are left to the caller, who asks cudaGetLastError().
#pragma once

#include "../common/arc.h"
#include "adapter.h"

namespace vitadapter::cuda {

// The simple kernels: T is double where the tensors are float64, else float.
//
// hidden: (rows, rank) of T, always written (problem.hidden is not read); down: (rank, dim) of T, workspace.
template <typename T>
void arc_forward_simple(const ArcForward& problem, T* hidden, T* down, Stream stream);

// hidden_grad: (rows, rank) of T; down: (rank, dim); down_grad: (rank, dim); up_product: (dim, rank); grad_sum: (dim);
// all of them workspace.
template <typename T>
struct ArcWorkspace {
  T *hidden_grad, *down, *down_grad, *up_product, *grad_sum;
};
template <typename T>
void arc_backward_simple(const ArcBackward& problem, const ArcWorkspace<T>& workspace, Stream stream);

// The fast kernels, which serve where the adapter's do: one forward, and three backward.
bool arc_forward_fast(const ArcForward& problem, Stream stream, const AdapterRequest& request = {});

// In memory of its own: so many bytes, at an address that is a multiple of 16. -1 where the fast kernels do not serve.
int64_t arc_backward_workspace(const ArcBackward& problem, const AdapterRequest& request = {});
bool arc_backward_fast(const ArcBackward& problem, void* workspace, Stream stream, const AdapterRequest& request = {});

}  // namespace vitadapter::cuda
