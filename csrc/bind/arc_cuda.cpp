// The arc op for PyTorch on CUDA devices; the schemas are in arc.cpp.
#include "../cuda/arc.h"
#include "arc.h"
#include "cuda.h"

namespace vitadapter::bind {
namespace {

struct Calls {
  template <typename T>
  static void forward(const Tensor& x, const ArcForward& p) {
    const cuda::Stream stream = current_stream(x);
    const auto fast = [&](const cuda::AdapterRequest& asked) { return cuda::arc_forward_fast(p, stream, asked); };
    if (run_fast("arc", fast)) return;
    Tensor hidden_owner = x, down_owner = x;
    T* hidden = p.hidden ? static_cast<T*>(p.hidden) : workspace<T>(x, p.rows * p.rank, hidden_owner);
    cuda::arc_forward_simple<T>(p, hidden, workspace<T>(x, p.rank * p.dim, down_owner), stream);
  }

  template <typename T>
  static void backward(const Tensor& x, const ArcBackward& p) {
    const cuda::Stream stream = current_stream(x);
    if (backward_fast(x, p, stream)) return;
    const int64_t weight = p.dim * p.rank;
    Tensor owner = x;
    T* next = workspace<T>(x, p.rows * p.rank + 3 * weight + p.dim, owner);
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    const cuda::ArcWorkspace<T> memory{take(p.rows * p.rank), take(weight), take(weight), take(weight), take(p.dim)};
    cuda::arc_backward_simple<T>(p, memory, stream);
  }

  static bool backward_fast(const Tensor& x, const ArcBackward& p, cuda::Stream stream) {
    // Without rows or ranks there is nothing to be fast at, whatever plan is asked for.
    if (p.rows == 0 || p.rank == 0) return false;
    return run_fast_in_memory(
        "arc", x, [&](const cuda::AdapterRequest& asked) { return cuda::arc_backward_workspace(p, asked); },
        [&](const cuda::AdapterRequest& asked, void* memory) {
          return cuda::arc_backward_fast(p, memory, stream, asked);
        });
  }
};

using Cuda = CudaBackend<Calls>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vitadapter, CUDA, library) {
  library.impl("arc_forward", TORCH_BOX(&arc_forward<Cuda>));
  library.impl("arc_backward", TORCH_BOX(&arc_backward<Cuda>));
}

}  // namespace vitadapter::bind
