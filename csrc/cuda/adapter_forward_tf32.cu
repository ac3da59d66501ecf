// The fast forward kernels of the adapter whose products take TF32.
#include "adapter_launch.cuh"

namespace vitadapter::cuda {

bool adapter_forward_tf32(const AdapterOrArcForward& p, const AdapterRequest& request, const Stream* stream) {
  return launch_adapter_forward<Tf32, Float32>(p, request, stream);
}

}  // namespace vitadapter::cuda
