// The adapter op for PyTorch on CUDA devices; the schemas are in adapter.cpp.
#include "adapter.h"
#include "cuda.h"

namespace vitadapter::bind {
namespace {

void use_cuda_plan(int64_t tile_rows, int64_t keep, int64_t slices) {
  VA_CHECK(tile_rows >= kSimple && tile_rows <= 1024 && keep >= -1 && keep <= 1 && slices >= 0 && slices <= 10000,
           "use_cuda_plan: tile_rows is ", tile_rows, ", keep ", keep, " and slices ", slices,
           "; accepted are -1 (the simple kernels), 0 (open) or a number of rows up to 1024, -1 (open), 0 or 1, and 0 "
           "(open) or a number of slices up to 10000");
  asked_tile_rows = int(tile_rows);
  asked_keep = int(keep);
  asked_slices = int(slices);
}

struct Calls {
  template <typename T>
  static void forward(const Tensor& x, const AdapterForward& p) {
    const cuda::Stream stream = current_stream(x);
    const auto fast = [&](const cuda::AdapterRequest& asked) { return cuda::adapter_forward_fast(p, stream, asked); };
    if (run_fast("adapter", fast)) return;
    // The simple kernel always goes through a stored hidden layer.
    Tensor owner = x;
    T* hidden = p.hidden ? static_cast<T*>(p.hidden) : workspace<T>(x, p.rows * p.rank, owner);
    cuda::adapter_forward_simple<T>(p, hidden, stream);
  }

  template <typename T>
  static void backward(const Tensor& x, const AdapterBackward& p) {
    const cuda::Stream stream = current_stream(x);
    if (backward_fast(x, p, stream)) return;
    Tensor hidden_grad = x, up_product = x, grad_sum = x;
    T* const hidden_grad_data = workspace<T>(x, p.needs_hidden_grad() ? p.rows * p.rank : 0, hidden_grad);
    T* const up_product_data = workspace<T>(x, p.needs_up_product() ? p.dim * p.rank : 0, up_product);
    T* const grad_sum_data = workspace<T>(x, p.needs_grad_sum() ? p.dim : 0, grad_sum);
    cuda::adapter_backward_simple<T>(p, hidden_grad_data, up_product_data, grad_sum_data, stream);
  }

  static bool backward_fast(const Tensor& x, const AdapterBackward& p, cuda::Stream stream) {
    // Without rows or ranks there is nothing to be fast at, whatever plan is asked for.
    if (p.rows == 0 || p.rank == 0) return false;
    return run_fast_in_memory(
        "adapter", x, [&](const cuda::AdapterRequest& asked) { return cuda::adapter_backward_workspace(p, asked); },
        [&](const cuda::AdapterRequest& asked, void* memory) {
          return cuda::adapter_backward_fast(p, memory, stream, asked);
        });
  }
};

using Cuda = CudaBackend<Calls>;

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
