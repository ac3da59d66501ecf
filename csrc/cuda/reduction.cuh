// How is leftᵀ · right summed over many rows, where `left` is skinny: (rows, up to 256 ranks), and `right` is wide?
// Weight gradients are such products. For sm_80 and newer.
//
// The idea. The rows are cut into slices and the columns of `right` into tiles; a block takes one tile of one slice for
// all ranks, so that `right`, which is nearly all of the traffic, is read once, and `left`, which every tile reads, is
// found in the L2 cache: the tiles of a slice stand side by side in the order of work. The sums of each slice go to
// memory, and who needs the product adds the slices in their order. What is a slice, and in which order its rows are
// added, hangs on the shape alone: the same bits on every run and with any number of blocks.
//
// A slice is worked through in steps of kStepRows rows. While one step is multiplied out of shared memory the next is
// on its way from memory into registers; there it may be changed (masks, an activation: the Operands' part), summed by
// columns, and rounded to what the product takes, on its way to the other of two places in shared memory. One barrier a
// step. Rows are the depth of the product and lie in the panels as they lie in memory, so fragments are transposed on
// loading: by ldmatrix for 2 bytes, and lane by lane for 4.
#pragma once

#include <algorithm>
#include <type_traits>

#include "weights.cuh"

namespace vitadapter::cuda {

// The row stride of a matrix (rows, rank) that is kept for a reduction: in whole vectors of Math's operands.
template <typename Math>
VA_HOST_DEVICE constexpr int64_t padded_rank(int64_t rank) {
  constexpr int64_t kVector = 16 / Math::kBytes;
  return (rank + kVector - 1) / kVector * kVector;
}

template <typename Math, int kRanks>
struct ReductionShape {
  static constexpr bool kNarrow = kRanks == 16, kWide = kRanks > 64;
  static constexpr int kThreads = 256;
  // Where accumulators, which Float32 has twice, leave room for one block only.
  static constexpr int kMinBlocks = kWide || (kSame<Math, Float32> && !kNarrow) ? 1 : 2;
  static constexpr int kColumns = kNarrow ? 256 : kWide && Math::kBytes == 4 ? 64 : 128;  // of a tile
  static constexpr int kStepRows = (kNarrow || kWide ? 64 : 128) / Math::kBytes;
  static constexpr int kRankWarps = kNarrow ? 1 : kWide ? 4 : 2, kColumnWarps = kThreads / 32 / kRankWarps;
  static constexpr int kM = kColumns / 16 / kColumnWarps, kN = kRanks / 8 / kRankWarps;  // mma tiles of a warp
};

// ---- from global to shared memory

// One side of a product.
struct ReductionSide {
  Operand data;    // (rows, columns)
  int stride = 0;  // elements from one row to the next
  int columns = 0;
  bool aligned = false;   // whether rows begin at multiples of 16 bytes, or of 8 where 2 bytes become 4
  float* sums = nullptr;  // (slices, columns), the columns' sums; null where nobody asks
};

// One thread's part of a step of kStepRows rows of kColumns columns. kOwn: the elements are stored as Math's operands
// are.
template <typename Math, int kColumns, int kStepRows, int kThreads, bool kOwn>
struct ReductionStream {
  static constexpr int kPiece = 16 / Math::kBytes, kUnits = kColumns / kPiece, kPieces = kUnits * kStepRows;
  static constexpr int kPerThread = std::max(1, kPieces / kThreads);
  static constexpr int kStride = kThreads / kUnits;  // rows from a thread's piece to its next
  static constexpr int kGroups = std::min(kStride, kStepRows);
  static constexpr int kBytes = 16 * kPieces;
  static constexpr int kRowBytes = std::min(128, kColumns* Math::kBytes);
  using Place = Panel<kRowBytes>;

  static constexpr int kWords = kOwn ? 4 : kPiece;

  // Of this thread's first piece in a step; unsigned division, which is a shift.
  const int row = int(unsigned(thread_index()) / kUnits), unit = int(unsigned(thread_index()) % kUnits);
  // Elements as they are stored; one in a word if they are float32, or were loaded one by one and there is room.
  uint32_t bits[kPerThread][kWords];

  VA_DEVICE bool has_pieces() const { return kPieces >= kThreads || thread_index() < kPieces; }

  // Zeros stand for what is beyond the last row or column.
  VA_DEVICE void fetch(const ReductionSide& side, int64_t rows, int64_t first_row, int first_column) {
    const int column = first_column + unit * kPiece, inside = side.columns - column;
    const int64_t valid_rows = has_pieces() ? rows - first_row - row : 0;
    const int64_t next = int64_t(kStride) * side.stride * element_bytes(side);
    const char* const from =
        static_cast<const char*>(side.data.data) + ((first_row + row) * side.stride + column) * element_bytes(side);
    // A loop for each way to load: within one, the compiler would let them wait for each other.
    const auto each = [&](const auto& load) {
      VA_UNROLL
      for (int i = 0; i < kPerThread; ++i) load(bits[i], from + i * next, i * kStride < valid_rows ? inside : 0);
    };
    if (side.aligned && is_wide(side)) {
      each([](auto& to, const char* at, int valid) {
        VA_UNROLL
        for (int e = 0; e < kPiece; e += 4) take(&to[e], e < valid ? load16(at + 4 * e) : Words4{});
      });
    } else if (side.aligned) {
      each([](auto& to, const char* at, int valid) {
        if constexpr (kPiece == 8) {
          take(to, valid > 0 ? load16(at) : Words4{});
        } else {
          take(to, valid > 0 ? load8(at) : Words2{});
        }
      });
    } else if constexpr (kWords == kPiece) {
      each([&](auto& to, const char* at, int valid) {
        VA_UNROLL
        for (int e = 0; e < kPiece; ++e) to[e] = e < valid ? load_bits({at, side.data.dtype}, e) : 0;
      });
    } else {
      // Without room for an element a word, each piece waits for its loads.
      each([&](auto& to, const char* at, int valid) {
        uint32_t elements[kPiece];
        VA_UNROLL
        for (int e = 0; e < kPiece; ++e) elements[e] = e < valid ? load_bits({at, Math::kDType}, e) : 0;
        VA_UNROLL
        for (int i = 0; i < 4; ++i) to[i] = elements[2 * i % kPiece] | elements[(2 * i + 1) % kPiece] << 16;
      });
    }
  }

  // Puts what was fetched last into its place, and if `adds`, into the sums. change(quad, row of the step, column)
  // replaces a quad.
  template <typename Change>
  VA_DEVICE void store(const ReductionSide& side, unsigned char* place, int first_column, bool adds,
                       float (&sums)[kPiece], bool changes, const Change& change) {
    if (!has_pieces()) return;
    const Place panel{place, kStepRows};
    const auto at = [&](int i) {
      return kStride % 8 ? panel.unit(row + i * kStride, unit) : panel.unit(row, unit) + i * kStride * kRowBytes;
    };
    if (Math::kBytes == 2 && !changes && is_packed(side)) {
      VA_UNROLL
      for (int i = 0; i < kPerThread; ++i) {
        store16(at(i), {{bits[i][0], bits[i][1], bits[i][2], bits[i][3]}});
      }
      if (!adds) return;
      VA_UNROLL
      for (int i = 0; i < kPerThread; ++i) {
        VA_UNROLL
        for (int e = 0; e < kPiece; ++e) sums[e] += low_half(bits[i][e / 2] >> e % 2 * 16, side);
      }
      return;
    }
    VA_UNROLL
    for (int i = 0; i < kPerThread; ++i) {
      const int step_row = row + i * kStride;
      float quads[kPiece / 4][4];
      VA_UNROLL
      for (int e = 0; e < kPiece; ++e) quads[e / 4][e % 4] = value(side, bits[i], e);
      VA_UNROLL
      for (int q = 0; q < kPiece / 4 && changes; ++q) {
        change(quads[q], step_row, first_column + unit * kPiece + 4 * q);
      }
      VA_UNROLL
      for (int e = 0; e < kPiece && adds; ++e) sums[e] += quads[e / 4][e % 4];
      VA_UNROLL
      for (int q = 0; q < kPiece / 4; ++q) {
        store_quad<Math>(at(i) + q * 4 * Math::kBytes, quads[q]);
      }
    }
  }

  // The columns' sums over all threads, through shared memory that nobody else uses.
  VA_DEVICE void finish_sums(const ReductionSide& side, const float (&sums)[kPiece], unsigned char* shared,
                             int64_t slice, int first_column) const {
    static_assert(kThreads * kPiece * 4 <= 8 << 10);
    float* const threads = reinterpret_cast<float*>(shared);
    VA_UNROLL
    for (int e = 0; e < kPiece; ++e) threads[thread_index() * kPiece + e] = sums[e];
    sync_threads();
    const int column = first_column + thread_index();
    if (thread_index() < kColumns && column < side.columns) {
      float sum = 0;
      for (int group = 0; group < kGroups; ++group) sum += threads[group * kColumns + thread_index()];
      side.sums[slice * side.columns + column] = sum;
    }
    // Before the next step is stored there.
    sync_threads();
  }

 private:
  VA_DEVICE static bool is_wide(const ReductionSide& side) {
    return kOwn ? Math::kBytes == 4 : side.data.dtype == DType::kFloat32;
  }
  VA_DEVICE static int element_bytes(const ReductionSide& side) { return is_wide(side) ? 4 : 2; }
  // Whether two elements share a word.
  VA_DEVICE static bool is_packed(const ReductionSide& side) {
    return !is_wide(side) && (kWords < kPiece || side.aligned);
  }

  template <typename Words>
  VA_DEVICE static void take(uint32_t* to, const Words& words) {
    VA_UNROLL
    for (int i = 0; i < int(sizeof(Words) / 4); ++i) to[i] = words.word[i];
  }

  VA_DEVICE static float value(const ReductionSide& side, const uint32_t (&piece)[kWords], int e) {
    if (is_wide(side)) return float_of(piece[e % kWords]);
    return low_half(is_packed(side) ? piece[e / 2] >> e % 2 * 16 : piece[e % kWords], side);
  }
  VA_DEVICE static float low_half(uint32_t word, const ReductionSide& side) {
    // What is not float32 is Math's own dtype if that has 2 bytes: no other mixes with it.
    if constexpr (Math::kBytes == 2) return Math::unpack(uint16_t(word));
    return value_of(word & 0xffffu, side.data.dtype);
  }
};

// ---- the product

// Which column of the 32 that two tiles have, from first_column on, and which rank of 16, is a lane's first in c[m][n]?
// The second rank is the next one; the second column, in c[m][n][2] and [3], is kSecondColumn further.
template <typename Math>
struct ReductionOrder {
  // As a lane loads them: by ldmatrix, two neighbours at a time, or quads.
  static constexpr int kSecondColumn = Math::kBytes == 2 ? 8 : 1;
  VA_DEVICE static int column(int m) {
    const int g = lane_index() >> 2;
    if constexpr (Math::kBytes == 2) return 16 * m + g;
    return kSame<Math, Tf32> ? 16 * m + 2 * g : m / 2 * 32 + 4 * g + m % 2 * 2;
  }
  VA_DEVICE static int rank(int n) {
    const int t = lane_index() & 3;
    return kSame<Math, Float32> ? n / 2 * 16 + 4 * t + n % 2 * 2 : 8 * n + 2 * t;
  }
};

// c[m][n] += rightᵀ · left for kM × 16 columns of `right` from first_column on and kN × 8 of `left` from first_rank on,
// over kRows rows of both.
template <typename Math, int kRows, int kM, int kN, int kRightBytes, int kLeftBytes>
VA_DEVICE void multiply_transposed(float (&c)[kM][kN][4], const Panel<kRightBytes>& right, int first_column,
                                   const Panel<kLeftBytes>& left, int first_rank) {
  const int lane = lane_index(), g = lane >> 2, t = lane & 3;
  static_assert(kM % 2 == 0 && kN % 2 == 0);
  // Addresses once, as eight rows further units are exchanged in the same way.
  if constexpr (Math::kBytes == 2) {
    const unsigned char *right_at[kM], *left_at[kN / 2];
    VA_UNROLL
    for (int m = 0; m < kM; ++m) {
      right_at[m] = right.unit((lane & 7) + (lane >> 4) * 8, first_column / 8 + 2 * m + (lane >> 3 & 1));
    }
    VA_UNROLL
    for (int n = 0; n < kN / 2; ++n) left_at[n] = left.unit(lane & 15, first_rank / 8 + 2 * n + (lane >> 4));
    VA_UNROLL
    for (int row = 0; row < kRows; row += 16) {
      uint32_t a[kM][4];
      VA_UNROLL
      for (int m = 0; m < kM; ++m) ldmatrix_trans(a[m], right_at[m] + row * kRightBytes);
      VA_UNROLL
      for (int n = 0; n < kN; n += 2) {
        uint32_t b[4];
        ldmatrix_trans(b, left_at[n / 2] + row * kLeftBytes);
        VA_UNROLL
        for (int m = 0; m < kM; ++m) {
          Math::mma(c[m][n], a[m], b);
          Math::mma(c[m][n + 1], a[m], b + 2);
        }
      }
    }
  } else if constexpr (kSame<Math, Tf32>) {
    const unsigned char *right_at[kM][2], *left_at[kN][2];
    VA_UNROLL
    for (int half = 0; half < 2; ++half) {
      VA_UNROLL
      for (int m = 0; m < kM; ++m) {
        right_at[m][half] = element<Tf32>(right, t + 4 * half, first_column + 16 * m + 2 * g);
      }
      VA_UNROLL
      for (int n = 0; n < kN; ++n) left_at[n][half] = element<Tf32>(left, t + 4 * half, first_rank + 8 * n + g);
    }
    VA_UNROLL
    for (int row = 0; row < kRows; row += 8) {
      uint32_t a[kM][4], b[kN][2];
      VA_UNROLL
      for (int half = 0; half < 2; ++half) {
        VA_UNROLL
        for (int m = 0; m < kM; ++m) {
          const Words2 x = load8(right_at[m][half] + row * kRightBytes);
          a[m][2 * half] = x.word[0];
          a[m][2 * half + 1] = x.word[1];
        }
        VA_UNROLL
        for (int n = 0; n < kN; ++n) b[n][half] = load4(left_at[n][half] + row * kLeftBytes);
      }
      VA_UNROLL
      for (int n = 0; n < kN; ++n) {
        VA_UNROLL
        for (int m = 0; m < kM; ++m) mma_tf32(c[m][n], a[m], b[n]);
      }
    }
  } else {
    // These rows on their own, then added: a chain over thousands of rows would lose what a library's sums keep.
    float part[kM][kN][4] = {};
    VA_ROLL
    for (int eight = 0; eight < kRows; eight += 8) {
      VA_UNROLL
      for (int row = 0; row < 8; ++row) {
        float a[2 * kM], b[2 * kN], quad[4];
        VA_UNROLL
        for (int i = 0; i < 2 * kM; ++i) {
          if (i % 4 == 0) {
            load_quad<Float32>(quad, right.unit(row, first_column / 4 + 2 * i + g) + eight * kRightBytes);
          }
          a[i] = quad[i % 4];
        }
        VA_UNROLL
        for (int i = 0; i < 2 * kN; ++i) {
          if (i % 4 == 0) load_quad<Float32>(quad, left.unit(row, first_rank / 4 + i + t) + eight * kLeftBytes);
          b[i] = quad[i % 4];
        }
        VA_UNROLL
        for (int j = 0; j < 2 * kN; ++j) {
          VA_UNROLL
          for (int i = 0; i < 2 * kM; ++i) part[i / 2][j / 2][i % 2 * 2 + j % 2] += a[i] * b[j];
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

// ---- the kernel

struct ReductionProduct {
  ReductionSide left;   // of ranks, stored as Math's operands are; not read where nobody asks for what it gives
  ReductionSide right;  // the same of any dtype that mixes with Math
  int tiles = 0;        // of columns; 0: there is nothing to do
  // Null where only sums are asked for, and those of one side at most. Of each slice (right columns, padded_rank()), or
  // by_rank (ranks, columns in whole sectors of 32 bytes).
  float* product = nullptr;
  bool by_rank = false;

  VA_HOST_DEVICE static int64_t padded_columns(int64_t columns) { return (columns + 7) / 8 * 8; }
  // Elements of one slice of the product.
  template <typename Math>
  VA_HOST_DEVICE static int64_t size(int64_t ranks, int64_t columns, bool by_rank) {
    return by_rank ? ranks * padded_columns(columns) : columns * padded_rank<Math>(ranks);
  }
};

// Up to two products over the same rows. Operands says what happens to their elements on the way:
//
//   static constexpr bool kChangesLeft;            // whether change_left() is there
//   uint64_t seed() const;                         // of the step, where it is changed
//   bool changes_left(int product) const;          // or right: whether there is anything to do
//   bool has_row_factors(int product) const;       // whether each row of `right` has a factor that is worth keeping
//   float row_factor(uint64_t seed, int64_t row) const;
//   void change_left(float (&quad)[4], uint64_t seed, int64_t row, int rank) const;
//   void change_right(float (&quad)[4], uint64_t seed, float row_factor, int64_t row, int column) const;
//
// Zeros must stay zeros: they stand for what is not there. kOwnRight: whether `right` of both products is stored as
// Math's operands are; float32 in place of 2 bytes takes so many registers that it has a kernel of its own.
template <typename Math, bool kOwnRight, int kRanks, typename Operands>
struct ReductionKernel {
  using S = ReductionShape<Math, kRanks>;
  using Left = ReductionStream<Math, kRanks, S::kStepRows, S::kThreads, true>;
  using Right = ReductionStream<Math, S::kColumns, S::kStepRows, S::kThreads, kOwnRight>;
  static constexpr int kMaxThreads = S::kThreads, kMinBlocks = S::kMinBlocks;
  static constexpr bool kNeedsSm80 = true;
  static constexpr int kPlaceBytes = Right::kBytes + Left::kBytes;
  static constexpr int kFactorBytes = 2 * S::kStepRows * int(sizeof(float));
  static constexpr int kSharedBytes = 2 * kPlaceBytes + kFactorBytes;

  ReductionProduct products[2];
  Operands operands;
  int64_t rows, slice_rows;  // the latter in whole steps
  int slices;
  int* zeroed;  // set to 0, for a kernel to come; or null

  VA_DEVICE void operator()() const { Worker{*this}.run(); }

  // One thread at work.
  struct Worker {
    const ReductionKernel& k;
    unsigned char* const places = dynamic_shared();
    float* const factors = reinterpret_cast<float*>(places + 2 * kPlaceBytes);  // of two steps' rows
    const unsigned warp = unsigned(warp_index());
    const int first_column = int(warp / S::kRankWarps) * S::kM * 16;  // of this warp, in its tile
    const int first_rank = int(warp % S::kRankWarps) * S::kN * 8;
    Left left = {};
    Right right = {};

    VA_DEVICE void run() {
      if (k.zeroed && block_index() == 0 && thread_index() == 0) *k.zeroed = 0;
      const int tiles = k.products[0].tiles, of_slice = tiles + k.products[1].tiles;
      for (int item = int(block_index()); item < of_slice * k.slices; item += int(block_count())) {
        const int slice = item / of_slice, tile = item - slice * of_slice, index = tile >= tiles;
        reduce(index, slice, index ? tile - tiles : tile);
      }
    }

    VA_DEVICE void reduce(int index, int slice, int tile) {
      const ReductionProduct& product = k.products[index];
      const int column = tile * S::kColumns;
      const int64_t begin = int64_t(slice) * k.slice_rows;
      const int64_t slice_rows = k.rows - begin < k.slice_rows ? k.rows - begin : k.slice_rows;
      const int steps = int((slice_rows + S::kStepRows - 1) / S::kStepRows);
      const bool has_factors = k.operands.has_row_factors(index);
      float c[S::kM][S::kN][4] = {};
      float sums[Right::kPiece] = {};  // of this thread's rows so far, by column
      const auto fetch = [&](int step) {
        const int64_t row = begin + int64_t(step) * S::kStepRows;
        if (reads_left(product, tile)) left.fetch(product.left, k.rows, row, 0);
        if (reads_right(product)) right.fetch(product.right, k.rows, row, column);
      };
      const auto store = [&](int step) {
        const bool changes = k.operands.changes_right(index);
        const uint64_t seed = changes || Operands::kChangesLeft ? k.operands.seed() : 0;
        const int64_t row = begin + int64_t(step) * S::kStepRows;
        unsigned char* const place = places + step % 2 * kPlaceBytes;
        const float* const row_factors = factors + step % 2 * S::kStepRows;
        if (reads_left(product, tile)) {
          const bool changes_left = Operands::kChangesLeft && k.operands.changes_left(index);
          left.store(product.left, place + Right::kBytes, 0, adds_left(product, tile), sums, changes_left,
                     [&](float (&quad)[4], int step_row, int at) {
                       if constexpr (Operands::kChangesLeft) k.operands.change_left(quad, seed, row + step_row, at);
                     });
        }
        if (reads_right(product)) {
          right.store(product.right, place, column, product.right.sums, sums, changes,
                      [&](float (&quad)[4], int step_row, int at) {
                        const float factor = has_factors ? row_factors[step_row] : 1.0f;
                        k.operands.change_right(quad, seed, factor, row + step_row, at);
                      });
        }
      };
      if (has_factors) {
        find_factors(begin, 0);
        sync_threads();
      }
      // Step -1 only brings step 0.
      for (int step = -1; step < steps; ++step) {
        const bool more = step + 1 < steps;
        if (more) fetch(step + 1);
        // Warps whose ranks nobody asks for have nothing to multiply.
        if (step >= 0 && product.product && first_rank < product.left.columns) {
          unsigned char* const place = places + step % 2 * kPlaceBytes;
          multiply_transposed<Math, S::kStepRows>(c, typename Right::Place{place, S::kStepRows}, first_column,
                                                  typename Left::Place{place + Right::kBytes, S::kStepRows},
                                                  first_rank);
        }
        if (more) store(step + 1);
        if (more && has_factors) find_factors(begin + int64_t(step + 2) * S::kStepRows, (step + 2) % 2);
        sync_threads();
      }
      if (product.right.sums) right.finish_sums(product.right, sums, places, slice, column);
      if (adds_left(product, tile)) left.finish_sums(product.left, sums, places, slice, 0);
      if (product.product) store_product(product, c, slice, column + first_column);
    }

    VA_DEVICE static bool reads_right(const ReductionProduct& product) { return product.product || product.right.sums; }
    // Every tile has the same ones.
    VA_DEVICE static bool adds_left(const ReductionProduct& product, int tile) {
      return product.left.sums && tile == 0;
    }
    VA_DEVICE static bool reads_left(const ReductionProduct& product, int tile) {
      return product.product || adds_left(product, tile);
    }

    // A row's factor is found once, and not by each thread that has a part of the row.
    VA_DEVICE void find_factors(int64_t first_row, int place) const {
      if (thread_index() >= S::kStepRows) return;
      factors[place * S::kStepRows + thread_index()] =
          k.operands.row_factor(k.operands.seed(), first_row + thread_index());
    }

    VA_DEVICE void store_product(const ReductionProduct& product, const float (&c)[S::kM][S::kN][4], int64_t slice,
                                 int column) const {
      const int ranks = product.left.columns, columns = product.right.columns;
      const int padded_ranks = int(padded_rank<Math>(ranks));
      const int64_t padded_columns = ReductionProduct::padded_columns(columns);
      float* const to = product.product + slice * ReductionProduct::size<Math>(ranks, columns, product.by_rank);
      VA_UNROLL
      for (int m = 0; m < S::kM; ++m) {
        VA_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int its_column = column + ReductionOrder<Math>::column(m) + half * ReductionOrder<Math>::kSecondColumn;
          VA_UNROLL
          for (int n = 0; n < S::kN; ++n) {
            const int rank = first_rank + ReductionOrder<Math>::rank(n);
            const float* const pair = &c[m][n][2 * half];
            if (!product.by_rank) {
              if (its_column >= columns || rank >= padded_ranks) continue;
              store8(to + int64_t(its_column) * padded_ranks + rank, {{bits_of(pair[0]), bits_of(pair[1])}});
            } else if (its_column < padded_columns) {
              if (rank < ranks) to[rank * padded_columns + its_column] = pair[0];
              if (rank + 1 < ranks) to[(rank + 1) * padded_columns + its_column] = pair[1];
            }
          }
        }
      }
    }
  };
};

// ---- on the host

// Calls body(the ranks of a kernel that serves `rank`).
template <typename Body>
auto for_rank(int64_t rank, const Body& body) {
  if (rank <= 16) return body(std::integral_constant<int, 16>());
  if (rank <= 64) return body(std::integral_constant<int, 64>());
  return body(std::integral_constant<int, 256>());
}

struct ReductionSlices {
  int count = 0;
  int64_t rows = 0;  // of each but the last
};

// How are the rows cut into slices, by the shape alone? Into so many that all multiprocessors of a large GPU are busy
// (two blocks on each of 132, where two fit), of 128 rows or more, and in `most_bytes` altogether if that holds one.
// tiles, bytes: of a slice. asked: a number to take instead, as near as whole steps come to it; 0: open. No slices
// where those have no room.
template <typename Math, int kRanks>
ReductionSlices cut_into_slices(int64_t rows, int64_t tiles, int64_t bytes, int64_t most_bytes, int64_t asked) {
  using S = ReductionShape<Math, kRanks>;
  const int64_t steps = (rows + S::kStepRows - 1) / S::kStepRows, most = std::max<int64_t>(1, most_bytes / bytes);
  const int64_t open = std::max<int64_t>(1, std::min({132 * S::kMinBlocks / tiles, rows / 128, most}));
  const int64_t count = std::min(asked ? asked : open, steps);
  if (count > most) return {};
  const int64_t slice_rows = (steps + count - 1) / count * S::kStepRows;
  return {int((rows + slice_rows - 1) / slice_rows), slice_rows};
}

template <typename Kernel>
void launch_reduction(Stream stream, const Kernel& kernel) {
  const int64_t items = int64_t(kernel.products[0].tiles + kernel.products[1].tiles) * kernel.slices;
  const int64_t resident = resident_blocks<Kernel>(Kernel::kMaxThreads, Kernel::kSharedBytes);
  launch(stream, std::min(items, resident * device().multiprocessors), Kernel::kMaxThreads, Kernel::kSharedBytes,
         kernel);
}

}  // namespace vitadapter::cuda
