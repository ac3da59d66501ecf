// The fast forward kernels of the adapter whose products are float32, without tensor cores.
#include "adapter_launch.cuh"

namespace vitadapter::cuda {

bool adapter_forward_float32(const AdapterForward& p, Stream stream, const AdapterRequest& request) {
  switch (p.x.dtype) {
    case DType::kFloat32: return launch_adapter_forward<Float32, Float32>(p, stream, request);
    case DType::kBFloat16: return launch_adapter_forward<Float32, BFloat16>(p, stream, request);
    default: return launch_adapter_forward<Float32, Float16>(p, stream, request);
  }
}

}  // namespace vitadapter::cuda
