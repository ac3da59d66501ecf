// The fast backward kernels of the adapter whose products take TF32.
#include "adapter_launch.cuh"

namespace vitadapter::cuda {

int64_t adapter_backward_tf32(const AdapterOrArcBackward& p, const AdapterRequest& request,
                              const AdapterBackwardRun* run) {
  return launch_adapter_backward<Tf32, Float32>(p, request, run);
}

}  // namespace vitadapter::cuda
