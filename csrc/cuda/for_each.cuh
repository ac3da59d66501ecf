// One thread an index, with nothing shared between threads: under nvcc a grid-stride kernel, under a host compiler a
// plain loop, so that kernels made of such maps run in the C++ tests of a machine without a GPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace vitadapter::cuda {

// A cudaStream_t, without the toolkit's headers.
using Stream = void*;

#if defined(__CUDACC__)

template <typename Body>
__global__ void for_each_kernel(int64_t count, const Body body) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) body(i);
}

template <typename Body>
void for_each(Stream stream, int64_t count, const Body& body) {
  constexpr int kThreads = 256;
  constexpr int64_t kMaxBlocks = 1 << 20;
  if (count == 0) return;
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  for_each_kernel<<<unsigned(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0, cudaStream_t(stream)>>>(count,
                                                                                                              body);
}

#else

template <typename Body>
void for_each(Stream, int64_t count, const Body& body) {
  for (int64_t i = 0; i < count; ++i) body(i);
}

#endif

}  // namespace vitadapter::cuda
