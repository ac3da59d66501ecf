// Which kernel serves a consolidator problem at a level?
#include "consolidator.h"

namespace vitadapter::cpu {

void consolidator_forward(Level level, const ConsolidatorForward& p, ParallelFor parallel_for) {
#if VITADAPTER_X86
  if (p.x.dtype != DType::kFloat64 && p.rows > 0) {
    if (level >= Level::kAvx512) return consolidator_forward_avx512(p, parallel_for);
    if (level == Level::kAvx2) return consolidator_forward_avx2(p, parallel_for);
  }
#endif
  consolidator_forward_portable(p, parallel_for);
}

void consolidator_backward(Level level, const ConsolidatorBackward& p, ParallelFor parallel_for) {
#if VITADAPTER_X86
  if (p.x.dtype != DType::kFloat64 && p.rows > 0) {
    if (level >= Level::kAvx512) return consolidator_backward_avx512(p, parallel_for);
    if (level == Level::kAvx2) return consolidator_backward_avx2(p, parallel_for);
  }
#endif
  consolidator_backward_portable(p, parallel_for);
}

void consolidator_weight(Level level, const ConsolidatorWeight& p, ParallelFor parallel_for) {
#if VITADAPTER_X86
  if (p.weight.dtype != DType::kFloat64) {
    if (level >= Level::kAvx512) return consolidator_weight_avx512(p, parallel_for);
    if (level == Level::kAvx2) return consolidator_weight_avx2(p, parallel_for);
  }
#endif
  consolidator_weight_portable(p, parallel_for);
}

}  // namespace vitadapter::cpu
