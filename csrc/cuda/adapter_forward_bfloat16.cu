// The fast forward kernels of the adapter whose products take bfloat16.
#include "adapter_launch.cuh"

namespace vitadapter::cuda {

bool adapter_forward_bfloat16(const AdapterForward& p, Stream stream, const AdapterRequest& request) {
  return p.x.dtype == DType::kFloat32 ? launch_adapter_forward<BFloat16, Float32>(p, stream, request)
                                      : launch_adapter_forward<BFloat16, BFloat16>(p, stream, request);
}

}  // namespace vitadapter::cuda
