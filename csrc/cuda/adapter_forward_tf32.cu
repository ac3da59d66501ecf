// The fast forward kernels of the adapter whose products take TF32.
#include "adapter_launch.cuh"

namespace vitadapter::cuda {

bool adapter_forward_tf32(const AdapterForward& p, Stream stream, const AdapterRequest& request) {
  return launch_adapter_forward<Tf32, Float32>(p, stream, request);
}

}  // namespace vitadapter::cuda
