// The vectors of the level avx2: 8 floats, 16 registers. One interface with avx512.h; see simd/unit.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "unit.h"

namespace vitadapter::cpu {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8;
  using Vector = __m256;

  // The tiles of products.h, of up to six rows (kReduceRanks ranks). Sums, a row of vectors and a broadcast value must
  // fit the 16 registers.
  static constexpr int kTileVectors = 2;
  static constexpr int kReduceRanks = 6, kReduceVectors = 2;

  static VA_INLINE Vector zero() { return _mm256_setzero_ps(); }
  static VA_INLINE Vector set(float value) { return _mm256_set1_ps(value); }
  static VA_INLINE Vector load(const void* from) { return _mm256_loadu_ps(static_cast<const float*>(from)); }
  static VA_INLINE void store(void* to, Vector v) { _mm256_storeu_ps(static_cast<float*>(to), v); }
  // The first `count` lanes.
  static VA_INLINE void store_first(float* to, Vector v, int64_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_maskstore_ps(to, _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), lane), v);
  }
  // Past the caches; the address is a multiple of 32 bytes.
  static VA_INLINE void stream(void* to, Vector v) { _mm256_stream_ps(static_cast<float*>(to), v); }
  static VA_INLINE void stream_fence() { _mm_sfence(); }
  // One 32-bit word in every lane.
  static VA_INLINE Vector broadcast(const Unit* from) { return _mm256_castsi256_ps(_mm256_set1_epi32(int(*from))); }

  static VA_INLINE Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static VA_INLINE Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
  static VA_INLINE Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
  static VA_INLINE Vector div(Vector a, Vector b) { return _mm256_div_ps(a, b); }
  static VA_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static VA_INLINE Vector abs(Vector a) { return _mm256_andnot_ps(set(-0.0f), a); }
  // The second argument where either is NaN.
  static VA_INLINE Vector max(Vector a, Vector b) { return _mm256_max_ps(a, b); }
  static VA_INLINE Vector round(Vector a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // a · 2^n of an integer n in [-126, 0].
  static VA_INLINE Vector times_power_of_two(Vector a, Vector n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return mul(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  // a > 0 ? yes : no, and `yes` where a is NaN.
  static VA_INLINE Vector where_positive(Vector a, Vector yes, Vector no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, zero(), _CMP_NLE_UQ));
  }

  static VA_INLINE Vector load_bfloat16(const uint16_t* from) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  static VA_INLINE Vector load_float16(const uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  // The bits of each lane rounded to bfloat16, in the upper half.
  static VA_INLINE Vector rounded_to_bfloat16(Vector v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    // A NaN keeps its upper half and becomes quiet.
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const Vector nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const Vector chosen = _mm256_blendv_ps(_mm256_castsi256_ps(up), _mm256_castsi256_ps(quiet), nan);
    return _mm256_and_ps(chosen, _mm256_castsi256_ps(_mm256_set1_epi32(int(0xffff0000))));
  }
  static VA_INLINE Vector rounded_to_float16(Vector v) { return _mm256_cvtph_ps(_mm256_cvtps_ph(v, 0)); }
  // Two vectors as one of 16-bit numbers.
  static VA_INLINE Vector to_bfloat16(Vector low, Vector high) {
    const __m256i a = _mm256_srli_epi32(_mm256_castps_si256(rounded_to_bfloat16(low)), 16);
    const __m256i b = _mm256_srli_epi32(_mm256_castps_si256(rounded_to_bfloat16(high)), 16);
    // packus works within halves: (a0, b0, a1, b1) → (a0, a1, b0, b1).
    return _mm256_castsi256_ps(_mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8));
  }
  static VA_INLINE Vector to_float16(Vector low, Vector high) {
    return _mm256_castsi256_ps(_mm256_set_m128i(_mm256_cvtps_ph(high, 0), _mm256_cvtps_ph(low, 0)));
  }

  // Lane i of the result is the sum of the lanes of v[i].
  static VA_INLINE Vector lane_sums(const Vector (&v)[8]) {
    const Vector a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const Vector b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return add(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }

  // Rows become columns.
  static VA_INLINE void transpose(Vector (&v)[8]) {
    Vector t[8];
    VA_UNROLL
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    VA_UNROLL
    for (int i = 0; i < 8; i += 4) {
      v[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      v[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      v[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      v[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    // Now half k of v[4i + j] holds column 4k + j of the rows 4i … 4i + 3.
    VA_UNROLL
    for (int j = 0; j < 4; ++j) {
      t[j] = _mm256_permute2f128_ps(v[j], v[4 + j], 0x20);
      t[4 + j] = _mm256_permute2f128_ps(v[j], v[4 + j], 0x31);
    }
    VA_UNROLL
    for (int i = 0; i < 8; ++i) v[i] = t[i];
  }
};

}  // namespace
}  // namespace vitadapter::cpu
