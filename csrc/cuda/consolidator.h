// The CUDA kernels of the consolidator op; the mathematics is in ../common/consolidator.h. Launch errors are left to
// the caller, who asks cudaGetLastError().
#pragma once

#include "../common/consolidator.h"
#include "simt.cuh"

namespace vitadapter::cuda {

// The simple kernels: T is double where the tensors are float64, else float. A thread an element, which reads all that
// it needs.
template <typename T>
void consolidator_forward_simple(const ConsolidatorForward& problem, Stream stream);
template <typename T>
void consolidator_backward_simple(const ConsolidatorBackward& problem, Stream stream);

// The fast kernels. False where they do not serve: float64, no rows, rows of more than 65,535 elements, devices below
// sm_80, and where shared memory has no room for a row.
bool consolidator_forward_fast(const ConsolidatorForward& problem, Stream stream);

// The same for the backward pass, in memory of its own: so many bytes, at an address that is a multiple of 16. -1 where
// the fast kernels do not serve.
int64_t consolidator_backward_workspace(const ConsolidatorBackward& problem);
bool consolidator_backward_fast(const ConsolidatorBackward& problem, void* workspace, Stream stream);

// weight + Σ_i G_i: the one kernel for it, which serves every dtype, shape and device. T as above.
template <typename T>
void consolidator_weight(const ConsolidatorWeight& problem, Stream stream);

}  // namespace vitadapter::cuda
