// The vectors of the levels avx512 and bf16: 16 floats, 32 registers. One interface with avx2.h; see simd/unit.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "unit.h"

namespace vitadapter::cpu {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16;
  using Vector = __m512;

  // The tiles of products.h, of up to six rows (kReduceRanks ranks). Sums, a row of vectors and a broadcast value must
  // fit the 32 registers.
  static constexpr int kTileVectors = 4;
  static constexpr int kReduceRanks = 9, kReduceVectors = 3;

  static VA_INLINE Vector zero() { return _mm512_setzero_ps(); }
  static VA_INLINE Vector set(float value) { return _mm512_set1_ps(value); }
  static VA_INLINE Vector load(const void* from) { return _mm512_loadu_ps(from); }
  static VA_INLINE void store(void* to, Vector v) { _mm512_storeu_ps(to, v); }
  // The first `count` lanes.
  static VA_INLINE void store_first(float* to, Vector v, int64_t count) {
    _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), v);
  }
  // Past the caches; the address is a multiple of 64 bytes.
  static VA_INLINE void stream(void* to, Vector v) { _mm512_stream_ps(static_cast<float*>(to), v); }
  static VA_INLINE void stream_fence() { _mm_sfence(); }
  // One 32-bit word in every lane.
  static VA_INLINE Vector broadcast(const Unit* from) { return _mm512_castsi512_ps(_mm512_set1_epi32(int(*from))); }

  static VA_INLINE Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static VA_INLINE Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
  static VA_INLINE Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  static VA_INLINE Vector div(Vector a, Vector b) { return _mm512_div_ps(a, b); }
  static VA_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static VA_INLINE Vector abs(Vector a) { return _mm512_abs_ps(a); }
  // The second argument where either is NaN.
  static VA_INLINE Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
  static VA_INLINE Vector round(Vector a) { return _mm512_roundscale_ps(a, 0); }
  // a · 2^n of an integer n in [-126, 0].
  static VA_INLINE Vector times_power_of_two(Vector a, Vector n) { return _mm512_scalef_ps(a, n); }
  // a > 0 ? yes : no, and `yes` where a is NaN.
  static VA_INLINE Vector where_positive(Vector a, Vector yes, Vector no) {
    return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, zero(), _CMP_NLE_UQ), yes);
  }

  static VA_INLINE Vector load_bfloat16(const uint16_t* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  static VA_INLINE Vector load_float16(const uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  // The bits of each lane rounded to bfloat16, in the upper half.
  static VA_INLINE Vector rounded_to_bfloat16(Vector v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    // A NaN keeps its upper half and becomes quiet.
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(int(0xffff0000))));
  }
  static VA_INLINE Vector rounded_to_float16(Vector v) { return _mm512_cvtph_ps(_mm512_cvtps_ph(v, 0)); }
  // Two vectors as one of 16-bit numbers.
  static VA_INLINE Vector to_bfloat16(Vector low, Vector high) {
    return upper_halves(rounded_to_bfloat16(low), rounded_to_bfloat16(high));
  }
  static VA_INLINE Vector to_float16(Vector low, Vector high) {
    const __m512i both = _mm512_castsi256_si512(_mm512_cvtps_ph(low, 0));
    return _mm512_castsi512_ps(_mm512_inserti64x4(both, _mm512_cvtps_ph(high, 0), 1));
  }

  // Lane i of the result is the sum of the lanes of v[i].
  static VA_INLINE Vector lane_sums(const Vector (&v)[16]) {
    Vector w[4];
    VA_UNROLL
    for (int q = 0; q < 4; ++q) {
      const Vector ab = fold_quarters(v[q], v[4 + q]), cd = fold_quarters(v[8 + q], v[12 + q]);
      w[q] = fold_quarters(ab, cd);
    }
    const Vector low = add(_mm512_unpacklo_ps(w[0], w[1]), _mm512_unpackhi_ps(w[0], w[1]));
    const Vector high = add(_mm512_unpacklo_ps(w[2], w[3]), _mm512_unpackhi_ps(w[2], w[3]));
    return add(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xee));
  }

  // Rows become columns.
  static VA_INLINE void transpose(Vector (&v)[16]) {
    Vector t[16];
    VA_UNROLL
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    VA_UNROLL
    for (int i = 0; i < 16; i += 4) {
      v[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
      v[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      v[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      v[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    // Now quarter k of v[4i + j] holds column 4k + j of the rows 4i … 4i + 3.
    VA_UNROLL
    for (int j = 0; j < 4; ++j) {
      const Vector a = _mm512_shuffle_f32x4(v[j], v[4 + j], 0x88), b = _mm512_shuffle_f32x4(v[j], v[4 + j], 0xdd);
      const Vector c = _mm512_shuffle_f32x4(v[8 + j], v[12 + j], 0x88);
      const Vector d = _mm512_shuffle_f32x4(v[8 + j], v[12 + j], 0xdd);
      t[j] = _mm512_shuffle_f32x4(a, c, 0x88);
      t[4 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
      t[8 + j] = _mm512_shuffle_f32x4(a, c, 0xdd);
      t[12 + j] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
    VA_UNROLL
    for (int i = 0; i < 16; ++i) v[i] = t[i];
  }

  static VA_INLINE Vector upper_halves(Vector low, Vector high) {
    const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                         23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_castsi512_ps(_mm512_permutex2var_epi16(_mm512_castps_si512(low), odd, _mm512_castps_si512(high)));
  }

 private:
  // (a0+a1, a2+a3, b0+b1, b2+b3) of the quarters of a and b.
  static VA_INLINE Vector fold_quarters(Vector a, Vector b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
};

}  // namespace
}  // namespace vitadapter::cpu
