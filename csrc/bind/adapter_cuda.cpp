// The adapter op for PyTorch on CUDA devices; the schemas are in adapter.cpp.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "../cuda/adapter.h"
#include "adapter.h"

namespace vitadapter::bind {
namespace {

cuda::Stream current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

template <typename T>
T* workspace(const Tensor& like, int64_t count, Tensor& owner) {
  owner = torch::stable::new_empty(like, {count}, hidden_dtype(like));
  return static_cast<T*>(owner.mutable_data_ptr());
}

template <typename T>
void forward(const Tensor& x, const AdapterForward& p) {
  // The simple kernel always goes through a stored hidden layer.
  Tensor owner = x;
  T* hidden = p.hidden ? static_cast<T*>(p.hidden) : workspace<T>(x, p.rows * p.rank, owner);
  cuda::adapter_forward_simple<T>(p, hidden, current_stream(x));
}

template <typename T>
void backward(const Tensor& x, const AdapterBackward& p) {
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

STABLE_TORCH_LIBRARY_IMPL(vitadapter, CUDA, library) {
  library.impl("adapter_forward", TORCH_BOX(&adapter_forward<Cuda>));
  library.impl("adapter_backward", TORCH_BOX(&adapter_backward<Cuda>));
}

}  // namespace vitadapter::bind
