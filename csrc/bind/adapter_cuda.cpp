// The adapter op for PyTorch on CUDA devices; the schemas are in adapter.cpp.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <array>
#include <atomic>

#include "../cuda/adapter.h"
#include "adapter.h"

namespace vitadapter::bind {
namespace {

cuda::Stream current_stream(const Tensor& tensor) {
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
std::atomic<int> asked_tile_rows{0}, asked_keep{-1}, asked_slices{0};

void use_cuda_plan(int64_t tile_rows, int64_t keep, int64_t slices) {
  VA_CHECK(tile_rows >= kSimple && tile_rows <= 1024 && keep >= -1 && keep <= 1 && slices >= 0 && slices <= 10000,
           "use_cuda_plan: tile_rows is ", tile_rows, ", keep ", keep, " and slices ", slices,
           "; accepted are -1 (the simple kernels), 0 (open) or a number of rows up to 1024, -1 (open), 0 or 1, and 0 "
           "(open) or a number of slices up to 10000");
  asked_tile_rows = int(tile_rows);
  asked_keep = int(keep);
  asked_slices = int(slices);
}

// Whether a fast kernel has done it: `run` gets what is asked of it, and says. One that cannot do what a plan asks for
// is an error, or a sweep would time another.
template <typename Run>
bool run_fast(const Run& run) {
  const cuda::AdapterRequest asked{asked_tile_rows, asked_keep, asked_slices};
  if (asked.tile_rows == kSimple) return false;
  const bool done = run(asked);
  VA_CHECK(done || (asked.tile_rows == 0 && asked.keep == -1 && asked.slices == 0),
           "adapter: no fast kernel serves this with tile_rows ", asked.tile_rows, ", keep ", asked.keep,
           " and slices ", asked.slices, ", as use_cuda_plan asks");
  return done;
}

bool forward_fast(const Tensor& x, const AdapterForward& p) {
  return run_fast(
      [&](const cuda::AdapterRequest& asked) { return cuda::adapter_forward_fast(p, current_stream(x), asked); });
}

bool backward_fast(const Tensor& x, const AdapterBackward& p) {
  // Without rows or ranks there is nothing to be fast at, whatever plan is asked for.
  if (p.rows == 0 || p.rank == 0) return false;
  return run_fast([&](const cuda::AdapterRequest& asked) {
    const int64_t bytes = cuda::adapter_backward_workspace(p, asked);
    if (bytes < 0) return false;
    Tensor owner = x;
    char* const memory = bytes ? workspace<char>(x, bytes, owner) : nullptr;
    return cuda::adapter_backward_fast(p, memory, current_stream(x), asked);
  });
}

template <typename T>
void forward(const Tensor& x, const AdapterForward& p) {
  if (forward_fast(x, p)) return;
  // The simple kernel always goes through a stored hidden layer.
  Tensor owner = x;
  T* hidden = p.hidden ? static_cast<T*>(p.hidden) : workspace<T>(x, p.rows * p.rank, owner);
  cuda::adapter_forward_simple<T>(p, hidden, current_stream(x));
}

template <typename T>
void backward(const Tensor& x, const AdapterBackward& p) {
  if (backward_fast(x, p)) return;
  Tensor hidden_grad = x, up_product = x, grad_sum = x;
  T* const hidden_grad_data = workspace<T>(x, p.needs_hidden_grad() ? p.rows * p.rank : 0, hidden_grad);
  T* const up_product_data = workspace<T>(x, p.needs_up_product() ? p.dim * p.rank : 0, up_product);
  T* const grad_sum_data = workspace<T>(x, p.needs_grad_sum() ? p.dim : 0, grad_sum);
  cuda::adapter_backward_simple<T>(p, hidden_grad_data, up_product_data, grad_sum_data, current_stream(x));
}

struct Cuda {
  static void forward(const Tensor& x, const AdapterForward& problem) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    is_wide(x.scalar_type()) ? bind::forward<double>(x, problem) : bind::forward<float>(x, problem);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  static void backward(const Tensor& x, const AdapterBackward& problem) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    is_wide(x.scalar_type()) ? bind::backward<double>(x, problem) : bind::backward<float>(x, problem);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vitadapter, library) {
  library.def("use_cuda_plan(int tile_rows, int keep, int slices=0) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitadapter, CompositeExplicitAutograd, library) {
  library.impl("use_cuda_plan", TORCH_BOX(&use_cuda_plan));
}

STABLE_TORCH_LIBRARY_IMPL(vitadapter, CUDA, library) {
  library.impl("adapter_forward", TORCH_BOX(&adapter_forward<Cuda>));
  library.impl("adapter_backward", TORCH_BOX(&adapter_backward<Cuda>));
}

}  // namespace vitadapter::bind
