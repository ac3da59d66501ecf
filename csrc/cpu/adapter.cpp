// Which kernel serves a problem at a level?
#include "adapter.h"

namespace vitadapter::cpu {

void adapter_forward(Level level, const AdapterForward& p, ParallelFor parallel_for) {
  if (p.x.dtype == DType::kFloat64) return adapter_forward_portable<double>(p, parallel_for);
#if VITADAPTER_X86
  if (p.rows > 0) {
    if (level == Level::kBf16 && p.compute == DType::kBFloat16) return adapter_forward_bf16(p, parallel_for);
    if (level >= Level::kAvx512) return adapter_forward_avx512(p, parallel_for);
    if (level == Level::kAvx2) return adapter_forward_avx2(p, parallel_for);
  }
#endif
  adapter_forward_portable<float>(p, parallel_for);
}

void adapter_backward(Level level, const AdapterBackward& p, ParallelFor parallel_for) {
  if (p.x.dtype == DType::kFloat64) return adapter_backward_portable<double>(p, parallel_for);
#if VITADAPTER_X86
  if (p.rows > 0) {
    if (level == Level::kBf16 && p.compute == DType::kBFloat16) return adapter_backward_bf16(p, parallel_for);
    if (level >= Level::kAvx512) return adapter_backward_avx512(p, parallel_for);
    if (level == Level::kAvx2) return adapter_backward_avx2(p, parallel_for);
  }
#endif
  adapter_backward_portable<float>(p, parallel_for);
}

}  // namespace vitadapter::cpu
