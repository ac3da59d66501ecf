// Which fast kernels serve an adapter?
#include "adapter.h"

namespace vitadapter::cuda {
namespace {

bool is_served(const AdapterProblem& p) {
  const bool has_rank = p.rank >= 1 && p.rank <= 256;
  return p.x.dtype != DType::kFloat64 && has_rank && p.rows >= 1 && device().capability >= 80;
}

// A product of bfloat16 or float16 would lose nothing in TF32, but up and z may be float32.
bool takes_tf32(const AdapterProblem& p) { return p.allow_tf32 && p.x.dtype == DType::kFloat32; }

int64_t adapter_backward(const AdapterBackward& p, const AdapterRequest& request, const AdapterBackwardRun* run) {
  if (!is_served(p)) return -1;
  switch (p.compute) {
    case DType::kBFloat16: return adapter_backward_bfloat16(p, request, run);
    case DType::kFloat16: return adapter_backward_float16(p, request, run);
    default: return takes_tf32(p) ? adapter_backward_tf32(p, request, run) : adapter_backward_float32(p, request, run);
  }
}

}  // namespace

bool adapter_forward_fast(const AdapterForward& p, Stream stream, const AdapterRequest& request) {
  if (!is_served(p)) return false;
  switch (p.compute) {
    case DType::kBFloat16: return adapter_forward_bfloat16(p, stream, request);
    case DType::kFloat16: return adapter_forward_float16(p, stream, request);
    default:
      return takes_tf32(p) ? adapter_forward_tf32(p, stream, request) : adapter_forward_float32(p, stream, request);
  }
}

int64_t adapter_backward_workspace(const AdapterBackward& p, const AdapterRequest& request) {
  return adapter_backward(p, request, nullptr);
}

bool adapter_backward_fast(const AdapterBackward& p, void* workspace, Stream stream, const AdapterRequest& request) {
  const AdapterBackwardRun run{workspace, stream};
  return adapter_backward(p, request, &run) >= 0;
}

}  // namespace vitadapter::cuda
