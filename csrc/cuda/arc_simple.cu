// ARC by the adapter's simple kernels, which take every dtype: diag(rescale) · basisᵀ is written for them, and the two
// weights' gradients that they find are put together. Slow, like those; the mathematics is in ../common/arc.h.
//
// float16 is float32 here, as on the CPU: a small rescale would leave its range.
#include "arc.h"

namespace vitadapter::cuda {
namespace {

template <typename T>
constexpr DType kDTypeOf = sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;

template <typename T>
struct MakeDown {
  ArcProblem p;
  T* down;
  VA_HOST_DEVICE void operator()(int64_t index) const {
    const int64_t j = index / p.dim, d = index % p.dim;
    down[index] = load<T>(p.rescale, j) * load<T>(p.basis, d * p.rank + j);
  }
};

template <typename T>
struct BasisGrad {
  ArcBackward p;
  const T *up_product, *down_grad;
  VA_HOST_DEVICE void operator()(int64_t index) const {
    const int64_t d = index / p.rank, j = index % p.rank;
    store(p.basis_grad, index, up_product[index] + load<T>(p.rescale, j) * down_grad[j * p.dim + d]);
  }
};

template <typename T>
struct RescaleGrad {
  ArcBackward p;
  const T* down_grad;
  VA_HOST_DEVICE void operator()(int64_t j) const {
    double sum = 0;
    for (int64_t d = 0; d < p.dim; ++d) sum += double(load<T>(p.basis, d * p.rank + j)) * down_grad[j * p.dim + d];
    store(p.rescale_grad, j, T(sum));
  }
};

template <typename T, typename Problem>
void make_down(const Problem& p, T* down, Stream stream) {
  for_each(stream, p.rank * p.dim, MakeDown<T>{p, down});
}

DType compute_of(const ArcProblem& p) { return p.compute == DType::kFloat16 ? DType::kFloat32 : p.compute; }

}  // namespace

template <typename T>
void arc_forward_simple(const ArcForward& p, T* hidden, T* down, Stream stream) {
  make_down(p, down, stream);
  AdapterForward adapter = as_adapter(p, Operand{down, kDTypeOf<T>});
  adapter.compute = compute_of(p);
  adapter_forward_simple<T>(adapter, hidden, stream);
}

template <typename T>
void arc_backward_simple(const ArcBackward& p, const ArcWorkspace<T>& workspace, Stream stream) {
  make_down(p, workspace.down, stream);
  const bool needs_down_grad = p.basis_grad.data || p.rescale_grad.data;
  AdapterBackward adapter =
      as_adapter(p, Operand{workspace.down, kDTypeOf<T>},
                 needs_down_grad ? Result{workspace.down_grad, kDTypeOf<T>} : Result{}, p.basis_grad);
  adapter.compute = compute_of(p);
  // The basis' gradient is written twice, the second time whole.
  adapter_backward_simple<T>(adapter, workspace.hidden_grad, workspace.up_product, workspace.grad_sum, stream);
  if (p.basis_grad.data) {
    for_each(stream, p.dim * p.rank, BasisGrad<T>{p, workspace.up_product, workspace.down_grad});
  }
  if (p.rescale_grad.data) for_each(stream, p.rank, RescaleGrad<T>{p, workspace.down_grad});
}

#define VA_INSTANTIATE(T)                                                 \
  template void arc_forward_simple<T>(const ArcForward&, T*, T*, Stream); \
  template void arc_backward_simple<T>(const ArcBackward&, const ArcWorkspace<T>&, Stream)
VA_INSTANTIATE(float);
VA_INSTANTIATE(double);
#undef VA_INSTANTIATE

}  // namespace vitadapter::cuda
