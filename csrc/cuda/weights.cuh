// How do weights come into shared memory? Chunk by chunk, through registers, where they are rounded to what the
// products take: fetch() starts to load a chunk and store() puts it in its place, and what stands between the two hides
// the wait for the L2 cache.
#pragma once

#include "products.cuh"

namespace vitadapter::cuda {

// What the rows of a weight may be loaded by.
enum class Alignment : int { kElement, kPair, kVector };

// How a weight lies in memory: (dim, rank), (rank, dim), or either, which is said at run time.
enum class Layout : int { kByDim, kByRank, kEither };

// Calls body<whether it is by dim>().
template <Layout kLayout, typename Body>
VA_DEVICE auto with_layout(bool by_dim, const Body& body) {
  if constexpr (kLayout == Layout::kEither) {
    return by_dim ? body.template operator()<true>() : body.template operator()<false>();
  } else {
    return body.template operator()<kLayout == Layout::kByDim>();
  }
}

// An element as it is stored, and its value.
VA_DEVICE uint32_t load_bits(const Operand& from, int64_t index) {
  return from.dtype == DType::kFloat32 ? static_cast<const uint32_t*>(from.data)[index]
                                       : static_cast<const uint16_t*>(from.data)[index];
}
VA_DEVICE float value_of(uint32_t bits, DType dtype) {
  if (dtype == DType::kFloat32) return float_of(bits);
  return dtype == DType::kBFloat16 ? BFloat16::unpack(uint16_t(bits)) : Float16::unpack(uint16_t(bits));
}

// One thread's part in the two passes of a kernel of Shape S. By its Layout, which Form says for either pass, a weight
// comes in chunks of (columns, ranks) or of (ranks, columns); their panels have them in WeightOrder. Where Form says
// so, the first weight is multiplied by a scale of its rows.
template <typename S, typename Math, typename Form>
struct WeightStream {
  const char* data;
  DType dtype;
  Alignment alignment;
  bool second, lies_by_dim;
  int rows, columns;
  // Of this thread's first piece: in a chunk, and in memory for the first chunk.
  int row, unit, index;
  int unit_bits;                                    // units in a row of a chunk, as a power of 2
  uint32_t pieces[S::kPiecesPerThread][S::kPiece];  // elements as they are stored
  Operand scale;                                    // (rows) of the first weight; null: none
  uint32_t scale_bits[S::kPiecesPerThread];         // of each piece's row

  // Turns to the weight of a pass, row-major in memory.
  VA_DEVICE void begin(bool is_second, const Operand& weight, Alignment its_alignment, int dim, int rank,
                       bool is_by_dim) {
    data = static_cast<const char*>(weight.data);
    dtype = weight.dtype;
    alignment = its_alignment;
    second = is_second;
    lies_by_dim = is_by_dim;
    rows = by_dim() ? dim : rank;
    columns = by_dim() ? rank : dim;
    unit_bits = by_dim() ? log2_of(S::kRankUnits) : log2_of(S::kColumnUnits);
    row = thread_index() >> unit_bits;
    unit = thread_index() & ((1 << unit_bits) - 1);
    index = row_at(row) * columns + unit * S::kPiece;
  }

  // By vectors, or by pairs of elements where rows do not begin at vectors. Odd rows have neither: store() takes them
  // from memory itself, and its warps wait.
  VA_DEVICE void fetch(int chunk, int block) {
    const int column = first_column(chunk, block), inside = columns - unit * S::kPiece - column;
    const int first = index + first_row(chunk, block) * columns + column;
    // What is in a row beyond the last is beyond the end.
    const int stride = skipped_rows(1) * columns, end = rows * columns;
    VA_UNROLL
    for (int i = 0; i < S::kPiecesPerThread; ++i) {
      if (alignment == Alignment::kElement || thread_index() + i * thread_count() >= S::kPieces) break;
      if (has_scales()) scale_bits[i] = load_scale(first_row(chunk, block) + row_at(row) + skipped_rows(i));
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
    const Panel<S::kRankBytes> of_dim{place, S::kChunk};
    const Panel<128> of_ranks{place, S::kBlock};
    const auto at_unit = [&](int index) { return by_dim() ? of_dim.unit(row, index) : of_ranks.unit(row, index); };
    // In quads, 16 columns share their units: of each quad, the first pair goes to the first half of them.
    constexpr int kUnits = 16 / S::kPiece;
    const bool in_quads = with_order([](auto order) { return order.kColumnsInQuads; });
    const int shared = unit - unit % kUnits + unit % kUnits / 2, half = unit % 2 * 8;
    unsigned char* const low = in_quads ? at_unit(shared) + half : at_unit(unit);
    unsigned char* const high = at_unit(shared + kUnits / 2) + half;
    const auto store_at = [&](int skipped, const uint32_t (&piece)[S::kPiece], uint32_t bits) {
      // A thread's next piece is a whole number of eight rows further, where units are exchanged in the same way.
      if (in_quads) {
        store_piece<true>(low + 16 * skipped, high + 16 * skipped, piece, bits);
      } else {
        store_piece<false>(low + 16 * skipped, nullptr, piece, bits);
      }
    };
    if (alignment != Alignment::kElement) {
      VA_UNROLL
      for (int i = 0; i < S::kPiecesPerThread; ++i) {
        if (thread_index() + i * thread_count() >= S::kPieces) break;
        store_at(i * thread_count(), pieces[i], has_scales() ? scale_bits[i] : 0);
      }
      return;
    }
    const int column = first_column(chunk, block) + unit * S::kPiece;
    VA_ROLL
    for (int skipped = 0; thread_index() + skipped < S::kPieces; skipped += thread_count()) {
      const int weight_row = first_row(chunk, block) + row_at(row + (skipped >> unit_bits));
      const int valid = weight_row < rows ? columns - column : 0;
      const Operand from{at(valid > 0 ? weight_row * columns + column : 0), dtype};
      // All loads before the first use of one.
      const uint32_t bits = has_scales() ? load_scale(weight_row) : 0;
      uint32_t elements[S::kPiece], piece[S::kPiece];
      VA_UNROLL
      for (int e = 0; e < S::kPiece; ++e) elements[e] = e < valid ? load_bits(from, e) : 0;
      VA_UNROLL
      for (int e = 0; e < S::kPiece; ++e) {
        const int pair = 2 * e % S::kPiece;
        piece[e] = wide() ? elements[e] : elements[pair] | elements[pair + 1] << 16;
      }
      store_at(skipped, piece, bits);
    }
  }

 private:
  VA_DEVICE static constexpr int log2_of(int power) { return power == 1 ? 0 : 1 + log2_of(power / 2); }

  // The depth of the first product is the dim, that of the second the ranks.
  template <typename Body>
  VA_DEVICE auto with_order(const Body& body) const {
    const auto first = [&]<bool kByDim>() { return body(WeightOrder<Math, kByDim, Form::kFirstInQuads>()); };
    const auto second_one = [&]<bool kByDim>() { return body(WeightOrder<Math, !kByDim, false>()); };
    return second ? with_layout<Form::kSecond>(lies_by_dim, second_one) : with_layout<Form::kFirst>(lies_by_dim, first);
  }
  VA_DEVICE int row_at(int place) const {
    return with_order([&](auto order) { return order.row_at(place); });
  }
  VA_DEVICE bool by_dim() const {
    const auto same = [&]<bool kByDim>() { return kByDim; };
    return second ? with_layout<Form::kSecond>(lies_by_dim, same) : with_layout<Form::kFirst>(lies_by_dim, same);
  }
  // From a thread's first piece to the one with number i: the same in any order, as they are multiples of 16.
  VA_DEVICE int skipped_rows(int i) const { return i * (thread_count() >> unit_bits); }

  VA_DEVICE bool has_scales() const { return Form::kScalesFirst && !second && scale.data; }
  VA_DEVICE uint32_t load_scale(int scaled_row) const { return scaled_row < rows ? load_bits(scale, scaled_row) : 0; }

  VA_DEVICE bool wide() const { return dtype == DType::kFloat32; }
  VA_DEVICE const char* at(int element) const { return data + int64_t(element) * (wide() ? 4 : 2); }
  // Where a chunk begins.
  VA_DEVICE int first_row(int chunk, int block) const { return by_dim() ? chunk * S::kChunk : block * S::kBlock; }
  VA_DEVICE int first_column(int chunk, int block) const { return by_dim() ? block * S::kBlock : chunk * S::kChunk; }

  template <typename Words>
  VA_DEVICE static void take(uint32_t* to, const Words& words) {
    VA_UNROLL
    for (int i = 0; i < int(sizeof(Words) / 4); ++i) to[i] = words.word[i];
  }

  template <bool kPieceInQuads>
  VA_DEVICE void store_piece(unsigned char* low, unsigned char* high, const uint32_t (&from)[S::kPiece],
                             uint32_t bits) const {
    const float factor = has_scales() ? value_of(bits, scale.dtype) : 1.0f;
    uint32_t words[4];
    if constexpr (Math::kBytes == 4) {
      VA_UNROLL
      for (int i = 0; i < 4; ++i) {
        float value = value_of(wide() ? from[i] : from[i / 2] >> i % 2 * 16 & 0xffffu, dtype);
        if (has_scales()) value *= factor;
        words[i] = kSame<Math, Tf32> ? to_tf32(value) : bits_of(value);
      }
    } else {
      VA_UNROLL
      for (int i = 0; i < 4; ++i) {
        // What is not float32 is Math's own dtype: no other mixes with it.
        words[i] = from[i];
        if (!wide() && !has_scales()) continue;
        float a = wide() ? float_of(from[2 * i]) : Math::unpack(uint16_t(from[i]));
        float b = wide() ? float_of(from[2 * i + 1]) : Math::unpack(uint16_t(from[i] >> 16));
        if (has_scales()) a *= factor, b *= factor;
        words[i] = Math::pack(a, b);
      }
    }
    if constexpr (!kPieceInQuads) {
      store16(low, {{words[0], words[1], words[2], words[3]}});
    } else if constexpr (Math::kBytes == 4) {
      store8(low, {{words[0], words[1]}});
      store8(high, {{words[2], words[3]}});
    } else {
      store8(low, {{words[0], words[2]}});
      store8(high, {{words[1], words[3]}});
    }
  }
};

}  // namespace vitadapter::cuda
