// What ARC adds to the adapter's kernels at the level avx2.
#include "level.h"
#if VITADAPTER_X86
#include <immintrin.h>

#include "arc.h"
#include "memory.h"
#include "simd/target.h"

VA_TARGET_BEGIN("avx2,fma,f16c")
#include "arc_simd.h"
#include "simd/avx2.h"

namespace vitadapter::cpu {

void arc_down_avx2(const ArcProblem& problem, const float* rescale, Result down, ParallelFor parallel_for) {
  arc_down<Floats<Avx2>>(problem, rescale, down, parallel_for);
}
void arc_gradients_avx2(const ArcBackward& problem, const float* rescale, const ArcWeightGrads<float>& grads,
                        ParallelFor parallel_for) {
  arc_gradients<Floats<Avx2>>(problem, rescale, grads, parallel_for);
}

}  // namespace vitadapter::cpu
VA_TARGET_END
#endif
