// The fast forward kernels of the adapter whose products take bfloat16.
#include "adapter_launch.cuh"

namespace vitadapter::cuda {

bool adapter_forward_bfloat16(const AdapterOrArcForward& p, const AdapterRequest& request, const Stream* stream) {
  return p.x.dtype == DType::kFloat32 ? launch_adapter_forward<BFloat16, Float32>(p, request, stream)
                                      : launch_adapter_forward<BFloat16, BFloat16>(p, request, stream);
}

}  // namespace vitadapter::cuda
