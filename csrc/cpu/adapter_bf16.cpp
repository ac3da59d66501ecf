// The adapter op at the level bf16.
#include "level.h"
#if VITADAPTER_X86
#include <immintrin.h>

#include "adapter.h"
#include "memory.h"
#include "simd/target.h"

VA_TARGET_BEGIN("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "adapter_simd.h"
#include "simd/avx512_bf16.h"

namespace vitadapter::cpu {

void adapter_forward_bf16(const AdapterForward& problem, ParallelFor parallel_for) {
  forward<BFloat16Pairs>(problem, parallel_for);
}
void adapter_backward_bf16(const AdapterBackward& problem, ParallelFor parallel_for) {
  backward<BFloat16Pairs>(problem, parallel_for);
}

}  // namespace vitadapter::cpu
VA_TARGET_END
#endif
