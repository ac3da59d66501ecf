// What ARC adds to the adapter's kernels at the level avx512, which is bf16's too: float32 is all that there is here.
#include "level.h"
#if VITADAPTER_X86
#include <immintrin.h>

#include "arc.h"
#include "memory.h"
#include "simd/target.h"

VA_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "arc_simd.h"
#include "simd/avx512.h"

namespace vitadapter::cpu {

void arc_down_avx512(const ArcProblem& problem, const float* rescale, Result down, ParallelFor parallel_for) {
  arc_down<Floats<Avx512>>(problem, rescale, down, parallel_for);
}
void arc_gradients_avx512(const ArcBackward& problem, const float* rescale, const ArcWeightGrads<float>& grads,
                          ParallelFor parallel_for) {
  arc_gradients<Floats<Avx512>>(problem, rescale, grads, parallel_for);
}

}  // namespace vitadapter::cpu
VA_TARGET_END
#endif
