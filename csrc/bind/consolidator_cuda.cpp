// The consolidator op for PyTorch on CUDA devices; the schemas are in consolidator.cpp.
#include "../cuda/consolidator.h"
#include "consolidator.h"
#include "cuda.h"

namespace vitadapter::bind {
namespace {

// The kernels choose their tiles and slices themselves: no other plan can be asked for.
bool is_own_choice(const cuda::AdapterRequest& asked) {
  return asked.tile_rows == 0 && asked.keep == -1 && asked.slices == 0;
}

struct Calls {
  template <typename T>
  static void forward(const Tensor& x, const ConsolidatorForward& p) {
    const cuda::Stream stream = current_stream(x);
    const auto fast = [&](const cuda::AdapterRequest& asked) {
      return is_own_choice(asked) && cuda::consolidator_forward_fast(p, stream);
    };
    if (!run_fast("consolidator", fast)) cuda::consolidator_forward_simple<T>(p, stream);
  }

  template <typename T>
  static void backward(const Tensor& x, const ConsolidatorBackward& p) {
    const cuda::Stream stream = current_stream(x);
    // Without rows there is nothing to be fast at, whatever plan is asked for.
    const bool done = p.rows > 0 && run_fast_in_memory(
                                        "consolidator", x,
                                        [&](const cuda::AdapterRequest& asked) {
                                          return is_own_choice(asked) ? cuda::consolidator_backward_workspace(p) : -1;
                                        },
                                        [&](const cuda::AdapterRequest&, void* memory) {
                                          return cuda::consolidator_backward_fast(p, memory, stream);
                                        });
    if (!done) cuda::consolidator_backward_simple<T>(p, stream);
  }

  template <typename T>
  static void weight(const Tensor& weight, const ConsolidatorWeight& p) {
    cuda::consolidator_weight<T>(p, current_stream(weight));
  }
};

using Cuda = CudaBackend<Calls>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitadapter, CUDA, library) {
  library.impl("consolidator_forward", TORCH_BOX(&consolidator_forward<Cuda>));
  library.impl("consolidator_backward", TORCH_BOX(&consolidator_backward<Cuda>));
  library.impl("consolidator_weight", TORCH_BOX(&consolidator_weight<Cuda>));
}

}  // namespace vitadapter::bind
