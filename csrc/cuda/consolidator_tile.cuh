// How do the consolidator's fast kernels hold rows and read weights? A tile of a few rows lies in shared memory as
// float32, rounded to what the products take, with four rows of a column side by side in a unit of 16 bytes: a thread
// that has loaded a weight multiplies four rows after one load from shared memory, whatever column the shuffle names.
#pragma once

#include <algorithm>
#include <type_traits>

#include "consolidator.h"
#include "weights.cuh"

namespace vitadapter::cuda {

// Rows of a unit.
constexpr int kFour = 4;
// Rows that are longer are left to the simple kernels; Divisor counts on it.
constexpr int64_t kMostColumns = 65'535;

// n / by without a division, of numbers up to kMostColumns: columns, and the numbers of a branch's blocks, of which
// each has sums in shared memory. The multiplier is 2^32 / by and a little more, too little to reach the next whole
// number.
struct Divisor {
  uint32_t multiplier = 0;  // 0 where by is 1

  Divisor() = default;
  explicit Divisor(int64_t by) : multiplier(by == 1 ? 0 : uint32_t((int64_t(1) << 32) / by + 1)) {}
  VA_DEVICE int divide(int n) const { return multiplier ? int(uint64_t(uint32_t(n)) * multiplier >> 32) : n; }
};

// How a branch's groups lie.
struct Grouping {
  int groups = 1, group_in = 1, group_out = 1;
  Divisor by_groups, by_group_in, by_group_out;
  Divisor by_blocks;  // of so many places, next to each other in a group

  Grouping() = default;
  Grouping(const ConsolidatorBranch& branch, int places)
      : groups(int(branch.groups)),
        group_in(int(branch.group_in)),
        group_out(int(branch.group_out)),
        by_groups(groups),
        by_group_in(group_in),
        by_group_out(group_out),
        by_blocks(group_in / places) {}
};

// The elements of x at neighbouring places, one after the other.
struct Sources {
  int source, step, in;

  VA_DEVICE Sources(int place, const Grouping& grouping, bool shuffle, int in)
      : source(place), step(shuffle ? grouping.group_in : 1), in(in) {
    if (!shuffle) return;
    const int column = grouping.by_groups.divide(place);
    source = (place - column * grouping.groups) * grouping.group_in + column;
  }
  // From the last row of the transposed x to the next column's first.
  VA_DEVICE int next() {
    const int now = source;
    source += step;
    if (source >= in) source -= in - 1;
    return now;
  }
};

// ---- elements side by side, at an address that is a multiple of what they take together

template <DType kStored>
struct Neighbours {
  static constexpr int kBytes = kStored == DType::kFloat32 ? 4 : 2;

  template <int kCount>
  VA_DEVICE static void load(float (&to)[kCount], const Operand& from, int64_t index) {
    const char* const at = static_cast<const char*>(from.data) + index * kBytes;
    constexpr int kWords = (kCount * kBytes + 3) / 4;
    const auto take = [&](const auto& words) {
      VA_UNROLL
      for (int i = 0; i < kCount; ++i) {
        const uint32_t word = words.word[i * kBytes / 4];
        to[i] = kBytes == 4 ? float_of(word) : value_of(i % 2 ? word >> 16 : word & 0xffff, kStored);
      }
    };
    struct Word {
      uint32_t word[1];
    };
    if constexpr (kCount * kBytes == 2) {
      take(Word{{*reinterpret_cast<const uint16_t*>(at)}});
    } else if constexpr (kWords == 1) {
      take(Word{{load4(at)}});
    } else if constexpr (kWords == 2) {
      take(load8(at));
    } else {
      take(load16(at));
    }
  }

  // To what products take; what is stored in 2 bytes is that already.
  template <int kCount>
  VA_DEVICE static void round(float (&values)[kCount], DType compute) {
    if (kBytes == 2 || compute == DType::kFloat32) return;
    if (compute == DType::kBFloat16) return round_in<BFloat16>(values);
    round_in<Float16>(values);
  }

 private:
  template <typename Math, int kCount>
  VA_DEVICE static void round_in(float (&values)[kCount]) {
    VA_UNROLL
    for (int i = 0; i < kCount; ++i) values[i] = Math::unpack(uint16_t(Math::pack(values[i], 0)));
  }
};

// Calls body(Neighbours of this dtype): the choice is made outside of the loops that load.
template <typename Body>
VA_DEVICE void with_dtype(DType stored, const Body& body) {
  if (stored == DType::kFloat32) return body(Neighbours<DType::kFloat32>{});
  if (stored == DType::kBFloat16) return body(Neighbours<DType::kBFloat16>{});
  body(Neighbours<DType::kFloat16>{});
}

// Two elements of a dtype of 2 bytes.
VA_DEVICE uint32_t to_halves(DType dtype, float low, float high) {
  return dtype == DType::kBFloat16 ? pack_bfloat16(low, high) : pack_float16(low, high);
}

template <int kCount>
VA_DEVICE void store_neighbours(const Result& to, int64_t index, const float (&values)[kCount]) {
  if constexpr (kCount == 1) {
    if (to.dtype == DType::kFloat32) {
      static_cast<float*>(to.data)[index] = values[0];
    } else {
      static_cast<uint16_t*>(to.data)[index] = uint16_t(to_halves(to.dtype, values[0], 0));
    }
  } else if (to.dtype == DType::kFloat32) {
    float* const at = static_cast<float*>(to.data) + index;
    if constexpr (kCount == 2) store8(at, {{bits_of(values[0]), bits_of(values[1])}});
    if constexpr (kCount == 4) store_quad<Float32>(at, values);
  } else {
    uint16_t* const at = static_cast<uint16_t*>(to.data) + index;
    const uint32_t first = to_halves(to.dtype, values[0], values[1]);
    if constexpr (kCount == 2) *reinterpret_cast<uint32_t*>(at) = first;
    if constexpr (kCount == 4) store8(at, {{first, to_halves(to.dtype, values[2], values[3])}});
  }
}

// ---- tiles

struct Unit {
  float row[kFour];
};
VA_DEVICE Unit load_unit(const void* from) {
  Unit unit;
  load_quad<Float32>(unit.row, from);
  return unit;
}
VA_DEVICE void store_unit(void* to, const Unit& unit) { store_quad<Float32>(to, unit.row); }

VA_HOST_DEVICE constexpr int64_t padded(int64_t columns) { return (columns + 7) / 8 * 8; }
VA_HOST_DEVICE constexpr int64_t tile_bytes(int64_t columns) { return padded(columns) * int64_t(sizeof(Unit)); }

// Rows of so many columns; the next four rows are one tile further. Eight units span all banks, and they are exchanged
// so that eight threads whose columns are a power of 2 apart, as their groups are, find theirs in different ones.
struct Tile {
  unsigned char* base;
  int columns;

  VA_DEVICE unsigned char* unit(int column, int rows = 0) const {
    return base + (rows * int(padded(columns)) + (column ^ ((column >> 3 ^ column >> 6) & 7))) * int(sizeof(Unit));
  }
};

// What drop-path makes of each row of a tile and branch.
template <int kRows>
struct Keeps {
  float* factors;  // (branches, kRows)

  VA_DEVICE void stage(const ConsolidatorProblem& p, int64_t first_row) const {
    for (int i = thread_index(); i < p.branches * kRows; i += thread_count()) {
      const int64_t row = first_row + i % kRows;
      factors[i] = row < p.rows ? p.keep<float>(row, i / kRows) : 0;
    }
  }
  VA_DEVICE Unit unit(int branch, int rows = 0) const { return load_unit(factors + branch * kRows + rows * kFour); }
};

// Columns that a thread moves at a time: four where nothing is odd.
VA_HOST_DEVICE constexpr int columns_of(int side) { return side == 1 ? 1 : 4; }

// Brings columns of a matrix (p.rows, width) into a tile, from this row and column on: kUnits times four rows, with
// zeros for those that are not there, a few neighbouring columns a thread. see(column of the tile, values) gets four
// rows of them before they are rounded.
template <int kUnits, int kColumns, typename See>
VA_DEVICE void stage(const ConsolidatorProblem& p, const Operand& from, int64_t width, int64_t first_row,
                     int first_column, const Tile& tile, const See& see) {
  const int pieces = tile.columns / kColumns;
  with_dtype(from.dtype, [&](auto neighbours) {
    for (int item = thread_index(); item < kUnits * pieces; item += thread_count()) {
      const int unit = kUnits > 1 && item >= pieces, column = (item - unit * pieces) * kColumns;
      float values[kFour][kColumns] = {};
      VA_UNROLL
      for (int r = 0; r < kFour; ++r) {
        const int64_t row = first_row + unit * kFour + r;
        if (row < p.rows) neighbours.load(values[r], from, row * width + first_column + column);
      }
      see(column, values);
      VA_UNROLL
      for (int r = 0; r < kFour; ++r) neighbours.round(values[r], p.compute);
      VA_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        store_unit(tile.unit(column + c, unit), {{values[0][c], values[1][c], values[2][c], values[3][c]}});
      }
    }
  });
}

// ---- launches

// Whether all that is there of these tensors can be read and written so many elements at a time.
template <typename Tensor>
bool begins_at(const Tensor& tensor, int64_t width, int count) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.data);
  return !address || (width % count == 0 && address % uintptr_t(count * element_size(tensor.dtype)) == 0);
}

// The fast kernels are for float32 and less, and for rows that an index of theirs can reach.
inline bool serves(const ConsolidatorProblem& p) {
  return p.rows > 0 && p.x.dtype != DType::kFloat64 && p.in <= kMostColumns && p.out <= kMostColumns &&
         device().capability >= 80;
}

// As many threads as share so many items evenly.
constexpr int kMostThreads = 384;
inline int threads_for(int64_t items) {
  const int64_t rounds = (items + kMostThreads - 1) / kMostThreads;
  return int(std::max<int64_t>(128, ((items + rounds - 1) / rounds + 31) / 32 * 32));
}

// Calls run(the number) of outputs, and of places, that a thread takes of a block of weights at a time: the largest
// that divides every branch's blocks. What is not `aligned`, and odd blocks, are taken element by element.
template <typename Run>
auto with_side(const ConsolidatorProblem& p, bool aligned, const Run& run) {
  const auto divides = [&](int side) {
    return aligned && std::all_of(p.branch, p.branch + p.branches, [&](const ConsolidatorBranch& branch) {
             return branch.group_out % side == 0 && begins_at(branch.weight, branch.group_in, side);
           });
  };
  if (divides(4)) return run(std::integral_constant<int, 4>{});
  if (divides(2)) return run(std::integral_constant<int, 2>{});
  return run(std::integral_constant<int, 1>{});
}

}  // namespace vitadapter::cuda
