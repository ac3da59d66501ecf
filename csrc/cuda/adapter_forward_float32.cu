// The fast forward kernels of the adapter whose products are float32, without tensor cores.
#include "adapter_launch.cuh"

namespace vitadapter::cuda {

bool adapter_forward_float32(const AdapterForward& p, Stream stream, const AdapterRequest& request) {
  return launch_adapter_forward<Float32, Float32>(p, stream, request);
}

}  // namespace vitadapter::cuda
