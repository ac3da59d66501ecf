// The fast backward kernels of the adapter whose products take bfloat16.
#include "adapter_launch.cuh"

namespace vitadapter::cuda {

int64_t adapter_backward_bfloat16(const AdapterOrArcBackward& p, const AdapterRequest& request,
                                  const AdapterBackwardRun* run) {
  return p.grad.dtype == DType::kFloat32 ? launch_adapter_backward<BFloat16, Float32>(p, request, run)
                                         : launch_adapter_backward<BFloat16, BFloat16>(p, request, run);
}

}  // namespace vitadapter::cuda
