// Which fast kernels serve an adapter, or ARC?
#include "adapter.h"

namespace vitadapter::cuda {
namespace {

bool is_served(const AdapterProblem& p) {
  const bool has_rank = p.rank >= 1 && p.rank <= 256;
  return p.x.dtype != DType::kFloat64 && has_rank && p.rows >= 1 && device().capability >= 80;
}

// A product of bfloat16 or float16 would lose nothing in TF32, but up and z may be float32.
bool takes_tf32(const AdapterProblem& p) { return p.allow_tf32 && p.x.dtype == DType::kFloat32; }

}  // namespace

bool adapter_or_arc_forward(const AdapterOrArcForward& p, const AdapterRequest& request, const Stream* stream) {
  if (!is_served(p)) return false;
  switch (p.compute) {
    case DType::kBFloat16: return adapter_forward_bfloat16(p, request, stream);
    case DType::kFloat16: return adapter_forward_float16(p, request, stream);
    default:
      return takes_tf32(p) ? adapter_forward_tf32(p, request, stream) : adapter_forward_float32(p, request, stream);
  }
}

int64_t adapter_or_arc_backward(const AdapterOrArcBackward& p, const AdapterRequest& request,
                                const AdapterBackwardRun* run) {
  if (!is_served(p)) return -1;
  switch (p.compute) {
    case DType::kBFloat16: return adapter_backward_bfloat16(p, request, run);
    case DType::kFloat16: return adapter_backward_float16(p, request, run);
    default: return takes_tf32(p) ? adapter_backward_tf32(p, request, run) : adapter_backward_float32(p, request, run);
  }
}

bool adapter_forward_fast(const AdapterForward& p, Stream stream, const AdapterRequest& request) {
  return adapter_or_arc_forward({p}, request, &stream);
}

int64_t adapter_backward_workspace(const AdapterBackward& p, const AdapterRequest& request) {
  return adapter_or_arc_backward({p}, request, nullptr);
}

bool adapter_backward_fast(const AdapterBackward& p, void* workspace, Stream stream, const AdapterRequest& request) {
  const AdapterBackwardRun run{workspace, stream};
  return adapter_or_arc_backward({p}, request, &run) >= 0;
}

}  // namespace vitadapter::cuda
