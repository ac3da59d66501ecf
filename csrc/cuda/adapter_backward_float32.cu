// The fast backward kernels of the adapter whose products are float32, without tensor cores.
#include "adapter_launch.cuh"

namespace vitadapter::cuda {

int64_t adapter_backward_float32(const AdapterOrArcBackward& p, const AdapterRequest& request,
                                 const AdapterBackwardRun* run) {
  return launch_adapter_backward<Float32, Float32>(p, request, run);
}

}  // namespace vitadapter::cuda
