// How do weights come into shared memory? Chunk by chunk, through registers, where they are rounded to what the
// products take: fetch() starts to load a chunk and store() puts it in its place, and what stands between the two hides
// the wait for the L2 cache.
#pragma once

#include "products.cuh"

namespace vitadapter::cuda {

// What the rows of a weight may be loaded by.
enum class Alignment : int { kElement, kPair, kVector };

// An element as it is stored, and its value.
VA_DEVICE uint32_t load_bits(const Operand& from, int64_t index) {
  return from.dtype == DType::kFloat32 ? static_cast<const uint32_t*>(from.data)[index]
                                       : static_cast<const uint16_t*>(from.data)[index];
}
VA_DEVICE float value_of(uint32_t bits, DType dtype) {
  if (dtype == DType::kFloat32) return float_of(bits);
  return dtype == DType::kBFloat16 ? BFloat16::unpack(uint16_t(bits)) : Float16::unpack(uint16_t(bits));
}

// One thread's part in the two passes of a kernel of Shape S. The first pass takes chunks of (ranks, columns) of a
// weight (rank, dim), the second of (columns, ranks) of one (dim, rank); a chunk's rows lie in shared memory in the
// order of quad_order(). kInQuads: in the first pass, its columns too.
template <typename S, typename Math, bool kInQuads>
struct WeightStream {
  const char* data;
  DType dtype;
  Alignment alignment;
  bool second;
  int rows, columns;
  // Of this thread's first piece: in a chunk, and in memory for the first chunk.
  int row, unit, index;
  int unit_bits;                                    // units in a row of a chunk, as a power of 2
  uint32_t pieces[S::kPiecesPerThread][S::kPiece];  // elements as they are stored

  // Turns to the weight (weight_rows, weight_columns) of a pass, row-major in memory.
  VA_DEVICE void begin(bool is_second, const Operand& weight, Alignment its_alignment, int weight_rows,
                       int weight_columns) {
    data = static_cast<const char*>(weight.data);
    dtype = weight.dtype;
    alignment = its_alignment;
    second = is_second;
    rows = weight_rows;
    columns = weight_columns;
    unit_bits = second ? log2_of(S::kSecondUnits) : log2_of(S::kFirstUnits);
    row = thread_index() >> unit_bits;
    unit = thread_index() & ((1 << unit_bits) - 1);
    index = quad_order(row) * columns + unit * S::kPiece;
  }

  // By vectors, or by pairs of elements where rows do not begin at vectors. Odd rows have neither: store() takes them
  // from memory itself, and its warps wait.
  VA_DEVICE void fetch(int chunk, int block) {
    const int column = first_column(chunk, block), inside = columns - unit * S::kPiece - column;
    const int first = index + first_row(chunk, block) * columns + column;
    // What is in a row beyond the last is beyond the end.
    const int stride = (thread_count() >> unit_bits) * columns, end = rows * columns;
    VA_UNROLL
    for (int i = 0; i < S::kPiecesPerThread; ++i) {
      if (alignment == Alignment::kElement || thread_index() + i * thread_count() >= S::kPieces) break;
      const int valid = first + i * stride < end ? inside : 0;
      const char* const from = at(first + i * stride);
      if (alignment == Alignment::kVector) {
        if (wide()) {
          VA_UNROLL
          for (int e = 0; e < S::kPiece; e += 4) take(&pieces[i][e], e < valid ? load16(from + 4 * e) : Words4{});
        } else if constexpr (S::kPiece == 8) {
          take(pieces[i], valid > 0 ? load16(from) : Words4{});
        } else {
          take(pieces[i], valid > 0 ? load8(from) : Words2{});
        }
      } else {
        // Two loops and not one with both, which the compiler would let wait for its own loads.
        if (wide()) {
          VA_UNROLL
          for (int e = 0; e < S::kPiece; e += 2) take(&pieces[i][e], e < valid ? load8(from + 4 * e) : Words2{});
        } else {
          VA_UNROLL
          for (int e = 0; e < S::kPiece; e += 2) {
            pieces[i][e / 2] = e < valid ? *reinterpret_cast<const uint32_t*>(from + 2 * e) : 0;
          }
        }
      }
    }
  }

  // Puts the chunk that was fetched last into the place for it.
  VA_DEVICE void store(unsigned char* place, int chunk, int block) const {
    const Panel<128> panel{place, S::kBlock};
    const bool in_quads = kInQuads && !second;
    // Units in pairs share their columns there.
    unsigned char* const low = in_quads ? panel.unit(row, unit & ~1) + unit % 2 * 8
                               : second ? Panel<S::kRankBytes>{place, S::kChunk}.unit(row, unit)
                                        : panel.unit(row, unit);
    unsigned char* const high = panel.unit(row, unit | 1) + unit % 2 * 8;
    const auto store_at = [&](int skipped, const uint32_t (&piece)[S::kPiece]) {
      // A thread's next piece is a whole number of eight rows further, where units are exchanged in the same way.
      if (in_quads) {
        store_piece<true>(low + 16 * skipped, high + 16 * skipped, piece);
      } else {
        store_piece<false>(low + 16 * skipped, nullptr, piece);
      }
    };
    if (alignment != Alignment::kElement) {
      VA_UNROLL
      for (int i = 0; i < S::kPiecesPerThread; ++i) {
        if (thread_index() + i * thread_count() >= S::kPieces) break;
        store_at(i * thread_count(), pieces[i]);
      }
      return;
    }
    const int column = first_column(chunk, block) + unit * S::kPiece;
    VA_ROLL
    for (int skipped = 0; thread_index() + skipped < S::kPieces; skipped += thread_count()) {
      const int weight_row = first_row(chunk, block) + quad_order(row + (skipped >> unit_bits));
      const int valid = weight_row < rows ? columns - column : 0;
      const Operand from{at(valid > 0 ? weight_row * columns + column : 0), dtype};
      // All loads before the first use of one.
      uint32_t elements[S::kPiece], piece[S::kPiece];
      VA_UNROLL
      for (int e = 0; e < S::kPiece; ++e) elements[e] = e < valid ? load_bits(from, e) : 0;
      VA_UNROLL
      for (int e = 0; e < S::kPiece; ++e) {
        const int pair = 2 * e % S::kPiece;
        piece[e] = wide() ? elements[e] : elements[pair] | elements[pair + 1] << 16;
      }
      store_at(skipped, piece);
    }
  }

 private:
  VA_DEVICE static constexpr int log2_of(int power) { return power == 1 ? 0 : 1 + log2_of(power / 2); }

  VA_DEVICE bool wide() const { return dtype == DType::kFloat32; }
  VA_DEVICE const char* at(int element) const { return data + int64_t(element) * (wide() ? 4 : 2); }
  // Where a chunk begins.
  VA_DEVICE int first_row(int chunk, int block) const { return second ? chunk * S::kChunk : block * S::kBlock; }
  VA_DEVICE int first_column(int chunk, int block) const { return second ? block * S::kBlock : chunk * S::kChunk; }

  template <typename Words>
  VA_DEVICE static void take(uint32_t* to, const Words& words) {
    VA_UNROLL
    for (int i = 0; i < int(sizeof(Words) / 4); ++i) to[i] = words.word[i];
  }

  template <bool kPieceInQuads>
  VA_DEVICE void store_piece(unsigned char* low, unsigned char* high, const uint32_t (&from)[S::kPiece]) const {
    if constexpr (Math::kBytes == 4) {
      float values[4];
      VA_UNROLL
      for (int i = 0; i < 4; ++i) {
        values[i] = value_of(wide() ? from[i] : from[i / 2] >> i % 2 * 16 & 0xffffu, dtype);
      }
      store_quad<Math>(low, values);
    } else {
      // What is not float32 is Math's own dtype: no other mixes with it.
      uint32_t pairs[4];
      VA_UNROLL
      for (int i = 0; i < 4; ++i) {
        pairs[i] = wide() ? Math::pack(float_of(from[2 * i]), float_of(from[2 * i + 1])) : from[i];
      }
      if constexpr (kPieceInQuads) {
        store8(low, {{pairs[0], pairs[2]}});
        store8(high, {{pairs[1], pairs[3]}});
      } else {
        store16(low, {{pairs[0], pairs[1], pairs[2], pairs[3]}});
      }
    }
  }
};

}  // namespace vitadapter::cuda
