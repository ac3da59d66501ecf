// The fast forward kernels of the adapter whose products take float16.
#include "adapter_launch.cuh"

namespace vitadapter::cuda {

bool adapter_forward_float16(const AdapterForward& p, Stream stream, const AdapterRequest& request) {
  return p.x.dtype == DType::kFloat32 ? launch_adapter_forward<Float16, Float32>(p, stream, request)
                                      : launch_adapter_forward<Float16, Float16>(p, stream, request);
}

}  // namespace vitadapter::cuda
