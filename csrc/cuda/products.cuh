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

// ---- operands in panels

// The left operand: `Stored` elements from `row` on. kInQuads: a lane loads four neighbours of a row at a time, as it
// must where they are rounded on the way; the right operand then has its depth in the order that this gives.
template <typename Stored, bool kInQuads, int kRowBytes>
struct LeftPanel {
  using Element = Stored;
  static constexpr bool kQuads = kInQuads;
  Panel<kRowBytes> panel;
  int row;

  VA_DEVICE void load(float (&to)[4], int m_row, int column) const {
    load_quad<Stored>(to, element<Stored>(panel, row + m_row, column));
  }
};

// The right operand where the panel's rows are its columns (kRows false), from column `first` on, or its rows.
template <bool kRows, int kRowBytes>
struct RightPanel {
  static constexpr bool kByRows = kRows;
  Panel<kRowBytes> panel;
  int first;
};

// In which order does a panel of weights hold what its rows and columns are, so that multiply() finds it? By what `k`
// of a product they are: its depth, or its columns.
template <typename Math, bool kByRows, bool kDepthInQuads>
struct WeightOrder {
  static constexpr bool kTransposes = kByRows && kSame<Math, Tf32>;

  // The weight's row at this place of the panel.
  VA_DEVICE static int row_at(int place) {
    if constexpr (kTransposes) return (place & ~15) + (place & 3) * 4 + (place >> 2 & 3);
    if constexpr (kByRows && (Math::kBytes == 4 || !kDepthInQuads)) return place;
    return quad_order(place);
  }
  // Whether columns stand in the order of quad_order(), too.
  static constexpr bool kColumnsInQuads = kByRows ? !kSame<Math, Float32> : Math::kBytes == 2 && kDepthInQuads;
};

// ---- the product

// What a lane gives to an mma of 2-byte elements: rows g and g + 8 of `left` from m_row on, 16 columns from `depth` on.
template <typename Math, typename Left>
VA_DEVICE void left_fragment(uint32_t (&a)[4], const Left& left, int m_row, int depth) {
  const int lane = lane_index(), g = lane >> 2, t = lane & 3;
  if constexpr (!Left::kQuads) {
    ldmatrix(a, left.panel.unit(left.row + m_row + (lane & 15), depth / 8 + (lane >> 4)));
  } else {
    VA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = m_row + g + 8 * half, column = depth + 4 * t;
      if constexpr (kSame<typename Left::Element, Math>) {
        const Words2 words = load8(element<Math>(left.panel, left.row + row, column));
        a[half] = words.word[0];
        a[half + 2] = words.word[1];
      } else {
        float x[4];
        left.load(x, row, column);
        a[half] = Math::pack(x[0], x[1]);
        a[half + 2] = Math::pack(x[2], x[3]);
      }
    }
  }
}

// And of two tiles of `right` side by side, from column n on.
template <typename Right>
VA_DEVICE void right_fragments(uint32_t (&b)[4], const Right& right, int n, int depth) {
  const int lane = lane_index(), column = right.first + n;
  if constexpr (Right::kByRows) {
    ldmatrix_trans(b, right.panel.unit(depth + (lane & 15), column / 8 + (lane >> 4)));
  } else {
    ldmatrix(b, right.panel.unit(column + (lane & 7) + (lane >> 4) * 8, depth / 8 + (lane >> 3 & 1)));
  }
}

// c[m][n] += left · right for kM × 16 rows and kN × 8 columns, over kDepth columns of `left`. `right` holds operands of
// Math in the WeightOrder that goes with both panels; then c has its columns in the order of quad_order().
template <typename Math, int kDepth, int kM, int kN, typename Left, typename Right>
VA_DEVICE void multiply(float (&c)[kM][kN][4], const Left& left, const Right& right) {
  const int lane = lane_index(), g = lane >> 2, t = lane & 3;
  constexpr bool kIsOperand = kSame<typename Left::Element, Math>;
  static_assert(kN % 2 == 0);
  if constexpr (Math::kBytes == 2) {
    // Operands in float32 take so many registers that those of all steps at once would spill.
    constexpr int kUnrolled = kIsOperand ? kDepth / 16 : 2;
    VA_UNROLL_BY(kUnrolled)
    for (int depth = 0; depth < kDepth; depth += 16) {
      uint32_t a[kM][4];
      VA_UNROLL
      for (int m = 0; m < kM; ++m) left_fragment<Math>(a[m], left, 16 * m, depth);
      VA_UNROLL
      for (int n = 0; n < kN; n += 2) {
        uint32_t b[4];
        right_fragments(b, right, 8 * n, depth);
        VA_UNROLL
        for (int m = 0; m < kM; ++m) {
          Math::mma(c[m][n], a[m], b);
          Math::mma(c[m][n + 1], a[m], b + 2);
        }
      }
    }
  } else if constexpr (kSame<Math, Tf32>) {
    VA_UNROLL
    for (int depth = 0; depth < kDepth; depth += 16) {
      // Of 16 columns, an mma takes 4t and 4t + 1 of each lane and the next one 4t + 2 and 4t + 3.
      uint32_t a[kM][2][4];
      VA_UNROLL
      for (int m = 0; m < kM; ++m) {
        VA_UNROLL
        for (int half = 0; half < 2; ++half) {
          float x[4];
          left.load(x, 16 * m + g + 8 * half, depth + 4 * t);
          VA_UNROLL
          for (int i = 0; i < 4; ++i) a[m][i / 2][i % 2 * 2 + half] = kIsOperand ? bits_of(x[i]) : to_tf32(x[i]);
        }
      }
      VA_UNROLL
      for (int n = 0; n < kN; ++n) {
        Words4 b;
        if constexpr (Right::kByRows) {
          VA_UNROLL
          for (int i = 0; i < 4; ++i) {
            b.word[i] = load4(element<Tf32>(right.panel, depth + 4 * i + t, right.first + 8 * n + g));
          }
        } else {
          b = load16(right.panel.unit(right.first + 8 * n + g, depth / 4 + t));
        }
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
    for (int depth = 0; depth < kDepth; depth += 4) {
      float a[kM][2][4];
      VA_UNROLL
      for (int m = 0; m < kM; ++m) {
        VA_UNROLL
        for (int half = 0; half < 2; ++half) left.load(a[m][half], 16 * m + g + 8 * half, depth);
      }
      const auto add = [&](int n, int i, int k, float b) {
        VA_UNROLL
        for (int m = 0; m < kM; ++m) {
          VA_UNROLL
          for (int half = 0; half < 2; ++half) part[m][n][2 * half + i] += a[m][half][k] * b;
        }
      };
      if constexpr (Right::kByRows) {
        VA_UNROLL
        for (int n = 0; n < kN; n += 2) {
          VA_UNROLL
          for (int k = 0; k < 4; ++k) {
            float b[4];
            load_quad<Float32>(b, element<Float32>(right.panel, depth + k, right.first + 8 * n + 4 * t));
            VA_UNROLL
            for (int i = 0; i < 4; ++i) add(n + i / 2, i % 2, k, b[i]);
          }
        }
      } else {
        VA_UNROLL
        for (int n = 0; n < 2 * kN; ++n) {
          float b[4];
          load_quad<Float32>(b, right.panel.unit(right.first + n / 2 * 8 + 2 * t + n % 2, depth / 4));
          VA_UNROLL
          for (int k = 0; k < 4; ++k) add(n / 2, n % 2, k, b[k]);
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
