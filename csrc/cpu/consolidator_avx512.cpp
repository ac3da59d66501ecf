// The consolidator op at the level avx512, which is bf16's too.
#include "level.h"
#if VITADAPTER_X86
#include <immintrin.h>

#include "consolidator.h"
#include "memory.h"
#include "simd/target.h"

VA_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "consolidator_simd.h"
#include "simd/avx512.h"

namespace vitadapter::cpu {

void consolidator_forward_avx512(const ConsolidatorForward& problem, ParallelFor parallel_for) {
  consolidator_forward<Floats<Avx512>>(problem, parallel_for);
}
void consolidator_backward_avx512(const ConsolidatorBackward& problem, ParallelFor parallel_for) {
  consolidator_backward<Floats<Avx512>>(problem, parallel_for);
}
void consolidator_weight_avx512(const ConsolidatorWeight& problem, ParallelFor parallel_for) {
  consolidator_weight<Floats<Avx512>>(problem, parallel_for);
}

}  // namespace vitadapter::cpu
VA_TARGET_END
#endif
