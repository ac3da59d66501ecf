// ARC by the adapter's fast kernels; the mathematics is in ../common/arc.h.
//
// The forward kernel multiplies by the basis and multiplies the product by rescale, in float32 and on chip; a second
// time by the basis, and y is there. With g for x, the same kernel finds the gradient of x, and on its way keeps what
// the parameters' gradients are made of. So nobody writes diag(rescale) · basisᵀ: the traffic is the adapter's, and so
// are the launches, one forward and three backward.
#include "arc.h"

namespace vitadapter::cuda {
namespace {

AdapterOrArcForward fast_problem(const ArcForward& p) {
  AdapterOrArcForward same{as_adapter(p, {})};
  same.rescale = p.rescale;
  return same;
}

AdapterOrArcBackward fast_problem(const ArcBackward& p) {
  AdapterOrArcBackward same{as_adapter(p, {}, {}, p.basis_grad)};
  same.rescale = p.rescale;
  same.rescale_grad = p.rescale_grad;
  return same;
}

}  // namespace

bool arc_forward_fast(const ArcForward& p, Stream stream, const AdapterRequest& request) {
  return adapter_or_arc_forward(fast_problem(p), request, &stream);
}

int64_t arc_backward_workspace(const ArcBackward& p, const AdapterRequest& request) {
  return adapter_or_arc_backward(fast_problem(p), request, nullptr);
}

bool arc_backward_fast(const ArcBackward& p, void* workspace, Stream stream, const AdapterRequest& request) {
  const AdapterBackwardRun run{workspace, stream};
  return adapter_or_arc_backward(fast_problem(p), request, &run) >= 0;
}

}  // namespace vitadapter::cuda
