// What do the CUDA bindings of all ops need? The stream, memory for a call, and how a plan is asked for.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <array>
#include <atomic>
#include <utility>

#include "../cuda/adapter.h"
#include "tensors.h"

namespace vitadapter::bind {

inline cuda::Stream current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

// So many elements on `like`'s device, for as long as `owner` lives.
template <typename T>
T* workspace(const Tensor& like, int64_t count, Tensor& owner) {
  owner = empty(like, std::array{count * int64_t(sizeof(T))}, ScalarType::Byte);
  return static_cast<T*>(owner.mutable_data_ptr());
}

// For tests and sweeps, of the whole process: -1 rows in a tile are the simple kernels.
constexpr int kSimple = -1;
inline std::atomic<int> asked_tile_rows{0}, asked_keep{-1}, asked_slices{0};

// Whether a fast kernel has done it: `run` gets what is asked of it, and says. One that cannot do what a plan asks for
// is an error, or a sweep would time another.
template <typename Run>
bool run_fast(const char* op, const Run& run) {
  const cuda::AdapterRequest asked{asked_tile_rows, asked_keep, asked_slices};
  if (asked.tile_rows == kSimple) return false;
  const bool done = run(asked);
  VA_CHECK(done || (asked.tile_rows == 0 && asked.keep == -1 && asked.slices == 0), op,
           ": no fast kernel serves this with tile_rows ", asked.tile_rows, ", keep ", asked.keep, " and slices ",
           asked.slices, ", as use_cuda_plan asks");
  return done;
}

// The same for a backward pass: bytes_of(asked) says how much memory it needs, or -1, and run(asked, memory) does it.
template <typename BytesOf, typename Run>
bool run_fast_in_memory(const char* op, const Tensor& like, const BytesOf& bytes_of, const Run& run) {
  return run_fast(op, [&](const cuda::AdapterRequest& asked) {
    const int64_t bytes = bytes_of(asked);
    if (bytes < 0) return false;
    Tensor owner = like;
    char* const memory = bytes ? workspace<char>(like, bytes, owner) : nullptr;
    return run(asked, memory);
  });
}

// A Backend (adapter.h, arc.h, consolidator.h) of functors forward(x, problem), backward(x, problem) and, where an op
// has it, weight(weight, problem), that are called with T.
template <typename Calls>
struct CudaBackend {
  template <typename Problem>
  static void forward(const Tensor& x, const Problem& problem) {
    run(x, [&](auto t) { Calls::template forward<decltype(t)>(x, problem); });
  }
  template <typename Problem>
  static void backward(const Tensor& x, const Problem& problem) {
    run(x, [&](auto t) { Calls::template backward<decltype(t)>(x, problem); });
  }
  template <typename Problem>
  static void weight(const Tensor& weight, const Problem& problem) {
    run(weight, [&](auto t) { Calls::template weight<decltype(t)>(weight, problem); });
  }

 private:
  template <typename Call>
  static void run(const Tensor& x, const Call& call) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    is_wide(x.scalar_type()) ? call(double()) : call(float());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace vitadapter::bind
