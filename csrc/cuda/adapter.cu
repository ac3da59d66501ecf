// Which fast kernel serves an adapter?
#include "adapter.h"

namespace vitadapter::cuda {

bool adapter_forward_fast(const AdapterForward& p, Stream stream, const AdapterRequest& request) {
  if (p.x.dtype == DType::kFloat64 || p.rank < 1 || p.rank > 256 || device().capability < 80) return false;
  switch (p.compute) {
    case DType::kBFloat16: return adapter_forward_bfloat16(p, stream, request);
    case DType::kFloat16: return adapter_forward_float16(p, stream, request);
    default:
      // A product of bfloat16 or float16 would lose nothing in TF32, but up and z may be float32.
      return p.allow_tf32 && p.x.dtype == DType::kFloat32 ? adapter_forward_tf32(p, stream, request)
                                                          : adapter_forward_float32(p, stream, request);
  }
}

}  // namespace vitadapter::cuda
