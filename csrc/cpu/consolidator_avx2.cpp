// The consolidator op at the level avx2.
#include "level.h"
#if VITADAPTER_X86
#include <immintrin.h>

#include "consolidator.h"
#include "memory.h"
#include "simd/target.h"

VA_TARGET_BEGIN("avx2,fma,f16c")
#include "consolidator_simd.h"
#include "simd/avx2.h"

namespace vitadapter::cpu {

void consolidator_forward_avx2(const ConsolidatorForward& problem, ParallelFor parallel_for) {
  consolidator_forward<Floats<Avx2>>(problem, parallel_for);
}
void consolidator_backward_avx2(const ConsolidatorBackward& problem, ParallelFor parallel_for) {
  consolidator_backward<Floats<Avx2>>(problem, parallel_for);
}
void consolidator_weight_avx2(const ConsolidatorWeight& problem, ParallelFor parallel_for) {
  consolidator_weight<Floats<Avx2>>(problem, parallel_for);
}

}  // namespace vitadapter::cpu
VA_TARGET_END
#endif
