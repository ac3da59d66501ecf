// The engine of the level bf16: pairs of bfloat16 numbers, multiplied and added up as float by one instruction.
//
// That instruction takes subnormal numbers for zero; what is only copied (the residual) keeps them.
#pragma once

#include "avx512.h"

namespace vitadapter::cpu {
namespace {

struct BFloat16Pairs : Avx512 {
  using Element = uint16_t;
  static constexpr int kPerUnit = 2;
  // Strips of 32 columns: what one load of a row brings.
  static constexpr int kReduceVectors = 2;

  static VA_INLINE Vector mac(Vector sum, Vector a, Vector b) {
    return _mm512_dpbf16_ps(sum, __m512bh(_mm512_castps_si512(a)), __m512bh(_mm512_castps_si512(b)));
  }
  static VA_INLINE Vector ones() { return _mm512_castsi512_ps(_mm512_set1_epi16(0x3f80)); }
  static VA_INLINE Vector to_elements(const Vector (&v)[2]) {
    return _mm512_castsi512_ps(__m512i(_mm512_cvtne2ps_pbh(v[1], v[0])));
  }
  static VA_INLINE void store_elements(uint16_t* to, Vector v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), __m256i(_mm512_cvtneps_pbh(v)));
  }
  static VA_INLINE Vector units_down(const Vector (&v)[2]) {
    const __m512i low = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(v[0])));
    const __m512i high = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(v[1])));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  static VA_INLINE void interleave(const uint16_t* row, const uint16_t* next, Vector (&units)[2]) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    const __m512i a = _mm512_loadu_si512(row), b = next ? _mm512_loadu_si512(next) : _mm512_setzero_si512();
    units[0] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, first, b));
    units[1] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, second, b));
  }

  // The processor's conversion makes zeros of subnormal numbers.
  using Exact = Avx512;
  template <int kVectors>
  static VA_INLINE bool bfloat16_would_flush(const Vector (&v)[kVectors]) {
    constexpr int kSubnormal = 0x20;
    __mmask16 any = _mm512_fpclass_ps_mask(v[0], kSubnormal);
    VA_UNROLL
    for (int i = 1; i < kVectors; ++i) any = _kor_mask16(any, _mm512_fpclass_ps_mask(v[i], kSubnormal));
    return __builtin_expect(!_kortestz_mask16_u8(any, any), 0);
  }
  static VA_INLINE Vector to_bfloat16(Vector low, Vector high) {
    return _mm512_castsi512_ps(__m512i(_mm512_cvtne2ps_pbh(high, low)));
  }
};

}  // namespace
}  // namespace vitadapter::cpu
