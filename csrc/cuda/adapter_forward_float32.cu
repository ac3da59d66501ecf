// The fast forward kernels of the adapter whose products are float32, without tensor cores.
#include "adapter_launch.cuh"

namespace vitadapter::cuda {

bool adapter_forward_float32(const AdapterOrArcForward& p, const AdapterRequest& request, const Stream* stream) {
  return launch_adapter_forward<Float32, Float32>(p, request, stream);
}

}  // namespace vitadapter::cuda
