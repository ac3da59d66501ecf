// How does a warp multiply two panels of shared memory? Its accumulators always lie as mma leaves them: of each tile of
// 16 × 8, lane 4g + t holds the rows g and g + 8 and the columns 2t and 2t + 1. What differs is the arithmetic.
//
//   BFloat16, Float16   mma.m16n8k16; a left operand in float32 is rounded in registers
//   Tf32                mma.m16n8k8; a lane's 16 bytes serve two of them, in an order of k that both sides share
//   Float32             fused multiply-adds, each lane for its own outputs
#pragma once

#include "panel.cuh"

namespace vitadapter::cuda {

// An arithmetic, and how an operand of it is stored. pack(a, b): two elements of 2 bytes in a word.
struct BFloat16 {
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr int kBytes = 2;
  VA_DEVICE static uint32_t pack(float low, float high) { return pack_bfloat16(low, high); }
  VA_DEVICE static float unpack(uint16_t half) { return from_bfloat16(half); }
  VA_DEVICE static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) { mma_bfloat16(c, a, b); }
};
struct Float16 {
  static constexpr DType kDType = DType::kFloat16;
  static constexpr int kBytes = 2;
  VA_DEVICE static uint32_t pack(float low, float high) { return pack_float16(low, high); }
  VA_DEVICE static float unpack(uint16_t half) { return unpack_float16(half); }
  VA_DEVICE static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) { mma_float16(c, a, b); }
};
struct Float32 {
  static constexpr DType kDType = DType::kFloat32;
  static constexpr int kBytes = 4;
};
struct Tf32 : Float32 {};

template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;

// Four neighbouring elements at an address that is aligned to them.
template <typename Stored>
VA_DEVICE void load_quad(float (&to)[4], const void* from) {
  if constexpr (Stored::kBytes == 4) {
    const Words4 words = load16(from);
    for (int i = 0; i < 4; ++i) to[i] = float_of(words.word[i]);
  } else {
    const Words2 words = load8(from);
    for (int i = 0; i < 4; ++i) to[i] = Stored::unpack(uint16_t(words.word[i / 2] >> i % 2 * 16));
  }
}

// As an operand of `Math` is stored.
template <typename Math>
VA_DEVICE void store_quad(void* to, const float (&from)[4]) {
  if constexpr (Math::kBytes == 2) {
    store8(to, {{Math::pack(from[0], from[1]), Math::pack(from[2], from[3])}});
  } else {
    Words4 words;
    for (int i = 0; i < 4; ++i) words.word[i] = kSame<Math, Tf32> ? to_tf32(from[i]) : bits_of(from[i]);
    store16(to, words);
  }
}

// Where element (row, column) of a panel of `Stored` is; four from there lie side by side if column % 4 == 0.
template <typename Stored, int kRowBytes>
VA_DEVICE unsigned char* element(const Panel<kRowBytes>& panel, int row, int column) {
  const int offset = column * Stored::kBytes;
  return panel.unit(row, offset / 16) + offset % 16;
}

// c[m][n] += left · rightᵀ for kM × 16 rows of `left` from `left_row` on and kN × 8 rows of `right` from `right_row`
// on, over kDepth columns of both. `right` holds operands of Math; `left` elements of Left: Math's, or float32. Where
// Left is float32 and Math has 2 bytes, `right` has its columns in the order of quad_order().
template <typename Math, typename Left, int kDepth, int kM, int kN, int kLeftBytes, int kRightBytes>
VA_DEVICE void multiply(float (&c)[kM][kN][4], const Panel<kLeftBytes>& left, int left_row,
                        const Panel<kRightBytes>& right, int right_row) {
  const int lane = lane_index(), g = lane >> 2, t = lane & 3;
  if constexpr (Math::kBytes == 2) {
    static_assert(kN % 2 == 0);
    // Operands in float32 take so many registers that those of all steps at once would spill.
    constexpr int kUnrolled = kSame<Left, Math> ? kDepth / 16 : 2;
    VA_UNROLL_BY(kUnrolled)
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t a[kM][4];
      VA_UNROLL
      for (int m = 0; m < kM; ++m) {
        const int row = left_row + 16 * m;
        if constexpr (kSame<Left, Math>) {
          ldmatrix(a[m], left.unit(row + (lane & 15), 2 * k + (lane >> 4)));
        } else {
          VA_UNROLL
          for (int half = 0; half < 2; ++half) {
            float x[4];
            load_quad<Left>(x, left.unit(row + g + 8 * half, 4 * k + t));
            a[m][half] = Math::pack(x[0], x[1]);
            a[m][half + 2] = Math::pack(x[2], x[3]);
          }
        }
      }
      VA_UNROLL
      for (int n = 0; n < kN; n += 2) {
        uint32_t b[4];
        const int row = right_row + 8 * n + (lane & 7) + (lane >> 4) * 8;
        ldmatrix(b, right.unit(row, 2 * k + (lane >> 3 & 1)));
        VA_UNROLL
        for (int m = 0; m < kM; ++m) {
          Math::mma(c[m][n], a[m], b);
          Math::mma(c[m][n + 1], a[m], b + 2);
        }
      }
    }
  } else if constexpr (kSame<Math, Tf32>) {
    VA_UNROLL
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t a[kM][2][4];
      VA_UNROLL
      for (int m = 0; m < kM; ++m) {
        VA_UNROLL
        for (int half = 0; half < 2; ++half) {
          const Words4 x = load16(left.unit(left_row + 16 * m + g + 8 * half, 4 * k + t));
          VA_UNROLL
          for (int i = 0; i < 4; ++i) {
            a[m][i / 2][i % 2 * 2 + half] = kSame<Left, Tf32> ? x.word[i] : to_tf32(float_of(x.word[i]));
          }
        }
      }
      VA_UNROLL
      for (int n = 0; n < kN; ++n) {
        const Words4 b = load16(right.unit(right_row + 8 * n + g, 4 * k + t));
        VA_UNROLL
        for (int m = 0; m < kM; ++m) {
          mma_tf32(c[m][n], a[m][0], b.word);
          mma_tf32(c[m][n], a[m][1], b.word + 2);
        }
      }
    }
  } else {
    // These columns on their own, then added: a chain over thousands of columns would lose what a library's sums keep.
    float part[kM][kN][4] = {};
    for (int k = 0; k < kDepth; k += 4) {
      float a[kM][2][4];
      VA_UNROLL
      for (int m = 0; m < kM; ++m) {
        VA_UNROLL
        for (int half = 0; half < 2; ++half) {
          load_quad<Left>(a[m][half], element<Left>(left, left_row + 16 * m + g + 8 * half, k));
        }
      }
      VA_UNROLL
      for (int n = 0; n < 2 * kN; ++n) {
        float b[4];
        load_quad<Float32>(b, right.unit(right_row + n / 2 * 8 + 2 * t + n % 2, k / 4));
        VA_UNROLL
        for (int m = 0; m < kM; ++m) {
          VA_UNROLL
          for (int half = 0; half < 2; ++half) {
            float& sum = part[m][n / 2][2 * half + n % 2];
            VA_UNROLL
            for (int i = 0; i < 4; ++i) sum += a[m][half][i] * b[i];
          }
        }
      }
    }
    VA_UNROLL
    for (int m = 0; m < kM; ++m) {
      VA_UNROLL
      for (int n = 0; n < kN; ++n) {
        VA_UNROLL
        for (int i = 0; i < 4; ++i) c[m][n][i] += part[m][n][i];
      }
    }
  }
}

// What a lane holds of rows 8 · half + g: columns 4t to 4t + 3 of the 16 that `tile` and the next one are, in the order
// of quad_order().
template <int kTiles>
VA_DEVICE void take_quad(float (&to)[4], const float (&tiles)[kTiles][4], int tile, int half) {
  VA_UNROLL
  for (int i = 0; i < 4; ++i) to[i] = tiles[tile + i / 2][2 * half + i % 2];
}

}  // namespace vitadapter::cuda
