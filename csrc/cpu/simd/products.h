// The three products of a low-rank sandwich on a block of rows that is in the cache, and their register tiles.
//
//   project   C(rows, rank)  = A(rows, dim) · B      rank sums a row, each over dim
//   expand    out(rows, dim) = base + S(rows, rank) · B, written as it is made
//   reduce    C(rank, dim)  += Sᵀ · T(rows, dim)     a weight gradient
//
// One tile serves all of them: kRows broadcast units times kVectors vectors, so that a unit that is loaded is used
// kVectors times and a vector kRows times. A narrow projection (rank up to kNarrowRank) is the exception: with few
// sums a row the vectors run along dim, for A and B alike, and the lanes are added up at the end.
//
// Sums over more than kRunUnits start anew and are added to the result: one chain of float32 as long as dim would be
// less exact than the library's products, and the run's part of B stays in the first-level cache.
#pragma once

#include "rows.h"

namespace vitadapter::cpu {
namespace {

constexpr int64_t kRunUnits = 128;
constexpr int64_t kTileRows = 6;

// A matrix as a product's right side: panels of kTileVectors vectors side by side, the last one narrower; a panel is
// (units, vectors · kLanes), contiguous.
template <class E>
struct Panels {
  static constexpr int64_t kWidth = E::kTileVectors * E::kLanes;
  const Unit* data;
  int64_t units, columns;  // columns in whole vectors

  int64_t count() const { return quotient_up(columns, kWidth); }
  const Unit* panel(int64_t p) const { return data + p * kWidth * units; }
  int64_t vectors(int64_t p) const { return least(E::kTileVectors, columns / E::kLanes - p * E::kTileVectors); }
  static int64_t size(int64_t units, int64_t columns) { return units * multiple_of(E::kLanes, columns); }
};

// Vectors of units that lie ready, row by row.
template <class E>
struct UnitRows {
  static constexpr bool kAnyVectors = true;
  const Unit* data;
  int64_t stride;

  UnitRows from(int64_t u) const { return {data + u * stride, stride}; }

  template <int kVectors>
  VA_INLINE void load(int64_t u, typename E::Vector (&row)[kVectors]) const {
    VA_UNROLL
    for (int v = 0; v < kVectors; ++v) row[v] = E::load(data + u * stride + v * E::kLanes);
  }
};

// Vectors of units that go down the rows of a tensor: two rows interleaved for pairs.
template <class E>
struct InterleavedRows {
  static constexpr bool kAnyVectors = E::kPerUnit == 1;
  const typename E::Element* data;
  int64_t stride, rows;

  InterleavedRows from(int64_t u) const { return {data + u * E::kPerUnit * stride, stride, rows - u * E::kPerUnit}; }

  template <int kVectors>
  VA_INLINE void load(int64_t u, typename E::Vector (&row)[kVectors]) const {
    static_assert(kVectors % E::kPerUnit == 0, "a row brings kPerUnit vectors at a time");
    const typename E::Element* first = data + u * E::kPerUnit * stride;
    const typename E::Element* second = (u + 1) * E::kPerUnit <= rows ? first + stride : nullptr;
    VA_UNROLL
    for (int v = 0; v < kVectors; v += E::kPerUnit) {
      typename E::Vector units[E::kPerUnit];
      E::interleave(first + v * E::kLanes, second ? second + v * E::kLanes : nullptr, units);
      VA_UNROLL
      for (int part = 0; part < E::kPerUnit; ++part) row[v + part] = units[part];
    }
  }
};

// How the left side A lies: unit (i, u) at i·stride + u, or at u·stride + i, or that with a last row of ones.
enum class Left { kAlong, kAcross, kAcrossAndOnes };

// sum[i][v] += A[i][u] · B[u][v] over the units u.
template <class E, int kRows, int kVectors, Left kLeft = Left::kAlong, class RightRows>
VA_INLINE void multiply(const Unit* a, int64_t a_stride, RightRows b, int64_t units,
                        typename E::Vector (&sum)[kRows][kVectors]) {
  using Vector = typename E::Vector;
  for (int64_t u = 0; u < units; ++u) {
    Vector row[kVectors];
    b.load(u, row);
    VA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const bool ones = kLeft == Left::kAcrossAndOnes && i == kRows - 1;
      const Vector value =
          ones ? E::ones() : E::broadcast(kLeft == Left::kAlong ? a + i * a_stride + u : a + u * a_stride + i);
      VA_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[i][v] = E::mac(sum[i][v], value, row[v]);
    }
  }
}

template <class E, int kRows, int kVectors>
VA_INLINE void fill(const float* row, typename E::Vector (&sum)[kRows][kVectors]) {
  VA_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const typename E::Vector value = E::load(row + v * E::kLanes);
    VA_UNROLL
    for (int i = 0; i < kRows; ++i) sum[i][v] = value;
  }
}

template <class E, int kRows, int kVectors>
VA_INLINE void clear(typename E::Vector (&sum)[kRows][kVectors]) {
  VA_UNROLL
  for (int i = 0; i < kRows; ++i) {
    VA_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[i][v] = E::zero();
  }
}

// Stores the sums, or adds them to what is there.
template <class E, int kRows, int kVectors>
VA_INLINE void store_sums(const typename E::Vector (&sum)[kRows][kVectors], float* c, int64_t c_stride, bool add) {
  VA_UNROLL
  for (int i = 0; i < kRows; ++i) {
    VA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* to = c + i * c_stride + v * E::kLanes;
      E::store(to, add ? E::add(E::load(to), sum[i][v]) : sum[i][v]);
    }
  }
}

// Rows that the next product will read: while a product goes over its own rows, it fetches as much of these.
struct Ahead {
  const void* data;  // null: none
  int64_t row_bytes;
  int64_t unit_bytes;  // of as many elements as a unit has, in their own dtype

  // The units [begin, begin + count) of `rows` rows from `row` on. Addresses beyond the tensor do no harm.
  VA_INLINE void fetch(int64_t row, int64_t rows, int64_t begin, int64_t count) const {
    if (!data) return;
    for (int64_t i = row; i < row + rows; ++i) {
      const char* line = static_cast<const char*>(data) + i * row_bytes + begin * unit_bytes;
      for (int64_t offset = 0; offset < count * unit_bytes; offset += 64) __builtin_prefetch(line + offset, 0, 2);
    }
  }
};

// ---- project

// Starts from the bias, or where there is none, adds to C.
template <class E, int kRows, int kVectors, class RightRows>
void project_tile(const Unit* a, int64_t a_stride, RightRows b, int64_t units, const float* bias, float* c,
                  int64_t c_stride) {
  typename E::Vector sum[kRows][kVectors];
  bias ? fill<E>(bias, sum) : clear<E>(sum);
  multiply<E>(a, a_stride, b, units, sum);
  store_sums<E>(sum, c, c_stride, !bias);
}

template <class E, int kVectors, class RightRows>
void project_panel(int64_t rows, const Unit* a, int64_t a_stride, RightRows b, int64_t units, const float* bias,
                   float* c, int64_t c_stride, const Ahead& ahead) {
  for (int64_t u = 0; u < units; u += kRunUnits, bias = nullptr) {
    const int64_t run = least(kRunUnits, units - u);
    const RightRows b_run = b.from(u);
    for (int64_t i = 0; i < rows;) {
      const Unit* a_run = a + i * a_stride + u;
      float* c_row = c + i * c_stride;
      const int64_t left = rows - i;
      ahead.fetch(i, least(kTileRows, left), u, run);
      if (left >= kTileRows) {
        project_tile<E, kTileRows, kVectors>(a_run, a_stride, b_run, run, bias, c_row, c_stride);
        i += kTileRows;
      } else if (left >= 4) {
        project_tile<E, 4, kVectors>(a_run, a_stride, b_run, run, bias, c_row, c_stride);
        i += 4;
      } else if (left >= 2) {
        project_tile<E, 2, kVectors>(a_run, a_stride, b_run, run, bias, c_row, c_stride);
        i += 2;
      } else {
        project_tile<E, 1, kVectors>(a_run, a_stride, b_run, run, bias, c_row, c_stride);
        i += 1;
      }
    }
  }
}

// C(rows, columns) = bias + A · B for one panel of `vectors` vectors: any number, or even ones where B is interleaved.
template <class E, class RightRows>
void project_vectors(int64_t vectors, int64_t rows, const Unit* a, int64_t a_stride, RightRows b, int64_t units,
                     const float* bias, float* c, int64_t c_stride, const Ahead& ahead) {
  if constexpr (RightRows::kAnyVectors) {
    if (vectors == 1) return project_panel<E, 1>(rows, a, a_stride, b, units, bias, c, c_stride, ahead);
    if constexpr (E::kTileVectors > 2) {
      if (vectors == 3) return project_panel<E, 3>(rows, a, a_stride, b, units, bias, c, c_stride, ahead);
    }
  }
  if (vectors == 2) return project_panel<E, 2>(rows, a, a_stride, b, units, bias, c, c_stride, ahead);
  if constexpr (E::kTileVectors > 2) project_panel<E, 4>(rows, a, a_stride, b, units, bias, c, c_stride, ahead);
}

// C(rows, columns of B) = bias + A · B.
template <class E>
void project(int64_t rows, const Unit* a, int64_t a_stride, const Panels<E>& b, const float* bias, float* c,
             int64_t c_stride, Ahead ahead) {
  for (int64_t p = 0; p < b.count(); ++p, ahead.data = nullptr) {
    const UnitRows<E> panel{b.panel(p), b.vectors(p) * E::kLanes};
    project_vectors<E>(b.vectors(p), rows, a, a_stride, panel, b.units, bias + p * b.kWidth, c + p * b.kWidth, c_stride,
                       ahead);
  }
}

// C[i][j] = bias[j] + A[i] · B[j], both along their rows, whose lengths are whole vectors. Rows at and beyond `rows`
// are not there: the tile then reads its last row again.
template <class E, int kRows, int kRanks>
void dot_tile(int64_t rows, const Unit* a, int64_t a_stride, const Unit* b, int64_t b_stride, int64_t units,
              const float* bias, float* c, int64_t c_stride) {
  using Vector = typename E::Vector;
  Vector sum[kRows][kRanks];
  clear<E>(sum);
  const Unit* a_row[kRows];
  VA_UNROLL
  for (int i = 0; i < kRows; ++i) a_row[i] = a + least(i, rows - 1) * a_stride;
  for (int64_t u = 0; u < units; u += E::kLanes) {
    Vector value[kRows];
    VA_UNROLL
    for (int i = 0; i < kRows; ++i) value[i] = E::load(a_row[i] + u);
    VA_UNROLL
    for (int j = 0; j < kRanks; ++j) {
      const Vector weight = E::load(b + j * b_stride + u);
      VA_UNROLL
      for (int i = 0; i < kRows; ++i) sum[i][j] = E::mac(sum[i][j], value[i], weight);
    }
  }
  Vector flat[E::kLanes];
  VA_UNROLL
  for (int k = 0; k < E::kLanes; ++k) flat[k] = k < kRows * kRanks ? sum[k / kRanks % kRows][k % kRanks] : E::zero();
  float totals[E::kLanes];
  E::store(totals, E::add(E::lane_sums(flat), E::load(bias)));
  VA_UNROLL
  for (int i = 0; i < kRows; ++i) {
    if (i < rows) memcpy(c + i * c_stride, totals + i * kRanks, kRanks * sizeof(float));
  }
}

template <class E, int kRanks>
void dot_ranks(int64_t rows, const Unit* a, int64_t a_stride, const Unit* b, int64_t b_stride, int64_t units,
               const float* bias, float* c, int64_t c_stride, const Ahead& ahead) {
  constexpr int kRows = E::kLanes / kRanks < 4 ? E::kLanes / kRanks : 4;
  float tile_bias[E::kLanes] = {};
  for (int k = 0; k < kRows * kRanks; ++k) tile_bias[k] = bias[k % kRanks];
  for (int64_t i = 0; i < rows; i += kRows) {
    ahead.fetch(i, kRows, 0, units);
    dot_tile<E, kRows, kRanks>(rows - i, a + i * a_stride, a_stride, b, b_stride, units, tile_bias, c + i * c_stride,
                               c_stride);
  }
}

// C(rows, rank) = bias + A · Bᵀ for few ranks.
template <class E>
void project_narrow(int64_t rows, const Unit* a, int64_t a_stride, int64_t rank, const Unit* b, int64_t b_stride,
                    int64_t units, const float* bias, float* c, int64_t c_stride, Ahead ahead) {
  constexpr int64_t kMost = E::kLanes / 2;  // two rows at least
  const int64_t groups = quotient_up(rank, kMost);
  for (int64_t g = 0, j = 0; g < groups; ++g) {
    const int64_t ranks = quotient_up(rank - j, groups - g);
    const Unit* b_rows = b + j * b_stride;
    float* c_columns = c + j;
    switch (ranks) {
      case 1: dot_ranks<E, 1>(rows, a, a_stride, b_rows, b_stride, units, bias + j, c_columns, c_stride, ahead); break;
      case 2: dot_ranks<E, 2>(rows, a, a_stride, b_rows, b_stride, units, bias + j, c_columns, c_stride, ahead); break;
      case 3: dot_ranks<E, 3>(rows, a, a_stride, b_rows, b_stride, units, bias + j, c_columns, c_stride, ahead); break;
      case 4: dot_ranks<E, 4>(rows, a, a_stride, b_rows, b_stride, units, bias + j, c_columns, c_stride, ahead); break;
      default:
        if constexpr (kMost > 4) {
          switch (ranks) {
            case 5:
              dot_ranks<E, 5>(rows, a, a_stride, b_rows, b_stride, units, bias + j, c_columns, c_stride, ahead);
              break;
            case 6:
              dot_ranks<E, 6>(rows, a, a_stride, b_rows, b_stride, units, bias + j, c_columns, c_stride, ahead);
              break;
            case 7:
              dot_ranks<E, 7>(rows, a, a_stride, b_rows, b_stride, units, bias + j, c_columns, c_stride, ahead);
              break;
            default: dot_ranks<E, 8>(rows, a, a_stride, b_rows, b_stride, units, bias + j, c_columns, c_stride, ahead);
          }
        }
    }
    j += ranks;
    ahead.data = nullptr;
  }
}

// ---- expand

// out[i][d] = base[i][d] + column_factor[d] · row_factor[i] · mask[i][d] · (bias[d] + Σ S·B)
struct Expansion {
  int64_t dim;
  Operand base;  // data null: 0
  Result out;
  const float* bias;           // with room for whole panels
  const float* column_factor;  // likewise
  const float* row_factor;     // null: 1
  const float* mask;           // null: 1
  int64_t mask_stride;
  bool stream;  // plain rows past the caches; every row of out then begins at a whole cache line
};

// What most calls are: base and out of one dtype known to the compiler, no mask and no row factor, a whole panel.
template <class E, DType kDType>
struct PlainFinish {
  template <int kVectors>
  static VA_INLINE void row(const Expansion& e, int64_t row, int64_t column, typename E::Vector (&sum)[kVectors]) {
    const int64_t begin = row * e.dim + column;
    const Operand base{e.base.data, kDType};
    VA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const typename E::Vector factor = E::load(e.column_factor + column + v * E::kLanes);
      sum[v] = E::fma(sum[v], factor, load_vector<E>(base, begin + v * E::kLanes));
    }
    store_vectors<E>(Result{e.out.data, kDType}, begin, sum, e.stream);
  }
};

template <class E>
struct GeneralFinish {
  template <int kVectors>
  static void row(const Expansion& e, int64_t row, int64_t column, typename E::Vector (&sum)[kVectors]) {
    constexpr int64_t kWidth = kVectors * E::kLanes;
    const int64_t begin = row * e.dim + column, count = least(kWidth, e.dim - column);
    float base[kWidth] = {}, values[kWidth];
    if (e.base.data) read_floats<E>(at(e.base, begin), count, base);
    VA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int64_t offset = v * E::kLanes;
      if (e.mask) sum[v] = E::mul(sum[v], E::load(e.mask + row * e.mask_stride + column + offset));
      if (e.row_factor) sum[v] = E::mul(sum[v], E::set(e.row_factor[row]));
      E::store(values + offset, E::fma(sum[v], E::load(e.column_factor + column + offset), E::load(base + offset)));
    }
    write_floats<E>(values, count, at(e.out, begin));
  }
};

template <class E, int kRows, class Finish, class RightRows>
void expand_tile(const Expansion& e, const Unit* s, int64_t s_stride, RightRows b, int64_t units, int64_t row,
                 int64_t column) {
  constexpr int kVectors = E::kTileVectors;
  typename E::Vector sum[kRows][kVectors];
  fill<E>(e.bias + column, sum);
  multiply<E>(s, s_stride, b, least(kRunUnits, units), sum);
  for (int64_t u = kRunUnits; u < units; u += kRunUnits) {
    typename E::Vector run[kRows][kVectors];
    clear<E>(run);
    multiply<E>(s + u, s_stride, b.from(u), least(kRunUnits, units - u), run);
    VA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      VA_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[i][v] = E::add(sum[i][v], run[i][v]);
    }
  }
  VA_UNROLL
  for (int i = 0; i < kRows; ++i) Finish::row(e, row + i, column, sum[i]);
}

// Up to six rows of one panel; returns how many.
template <class E, class Finish, class RightRows>
int64_t expand_rows(const Expansion& e, int64_t rows, const Unit* s, int64_t s_stride, RightRows b, int64_t units,
                    int64_t row, int64_t column) {
  const Unit* s_row = s + row * s_stride;
  const int64_t left = rows - row;
  if (left >= kTileRows) return expand_tile<E, kTileRows, Finish>(e, s_row, s_stride, b, units, row, column), kTileRows;
  if (left >= 4) return expand_tile<E, 4, Finish>(e, s_row, s_stride, b, units, row, column), 4;
  if (left >= 2) return expand_tile<E, 2, Finish>(e, s_row, s_stride, b, units, row, column), 2;
  return expand_tile<E, 1, Finish>(e, s_row, s_stride, b, units, row, column), 1;
}

template <class E, class Finish>
void expand_with(int64_t rows, const Expansion& e, const Unit* s, int64_t s_stride, const Panels<E>& b,
                 const Ahead& ahead) {
  auto some_rows = [&](int64_t row, int64_t p) {
    ahead.fetch(row, least(kTileRows, rows - row), p * b.kWidth / E::kPerUnit, b.kWidth / E::kPerUnit);
    const UnitRows<E> panel{b.panel(p), b.kWidth};
    const int64_t column = p * b.kWidth;
    if (column + b.kWidth > e.dim) {
      return expand_rows<E, GeneralFinish<E>>(e, rows, s, s_stride, panel, b.units, row, column);
    }
    return expand_rows<E, Finish>(e, rows, s, s_stride, panel, b.units, row, column);
  };
  // What the inner loop goes over again and again is what fits the first-level cache: all of a narrow B, or the rows
  // of S.
  constexpr int64_t kNarrowBytes = 32 << 10;
  if (b.units * b.columns * int64_t(sizeof(Unit)) <= kNarrowBytes) {
    for (int64_t row = 0, done = 0; row < rows; row += done) {
      for (int64_t p = 0; p < b.count(); ++p) done = some_rows(row, p);
    }
  } else {
    for (int64_t p = 0; p < b.count(); ++p) {
      for (int64_t row = 0; row < rows;) row += some_rows(row, p);
    }
  }
}

// B's panels are all whole.
template <class E>
void expand(int64_t rows, const Expansion& e, const Unit* s, int64_t s_stride, const Panels<E>& b, const Ahead& ahead) {
  const bool plain = e.base.data && e.base.dtype == e.out.dtype && !e.mask && !e.row_factor;
  if (plain && e.out.dtype == DType::kFloat32) {
    return expand_with<E, PlainFinish<E, DType::kFloat32>>(rows, e, s, s_stride, b, ahead);
  }
  if (plain && e.out.dtype == DType::kBFloat16) {
    return expand_with<E, PlainFinish<E, DType::kBFloat16>>(rows, e, s, s_stride, b, ahead);
  }
  if constexpr (E::kPerUnit == 1) {
    if (plain) return expand_with<E, PlainFinish<E, DType::kFloat16>>(rows, e, s, s_stride, b, ahead);
  }
  expand_with<E, GeneralFinish<E>>(rows, e, s, s_stride, b, ahead);
}

// ---- reduce

template <class E, int kRanks, class RightRows>
void reduce_tile(const Unit* s, int64_t s_stride, bool ones, RightRows t, int64_t units, float* c, bool add) {
  constexpr int kVectors = E::kReduceVectors;
  typename E::Vector sum[kRanks][kVectors];
  clear<E>(sum);
  if (ones) {
    multiply<E, kRanks, kVectors, Left::kAcrossAndOnes>(s, s_stride, t, units, sum);
  } else {
    multiply<E, kRanks, kVectors, Left::kAcross>(s, s_stride, t, units, sum);
  }
  store_sums<E>(sum, c, kVectors * E::kLanes, add);
}

// C(ranks, strip) = Sᵀ · T, or added to it, for one strip of kReduceVectors vectors; C is contiguous. `ones` stands for
// a last column of ones in S, counted in `ranks`: its row of C is the sum of T's rows.
template <class E, class RightRows>
void reduce_strip(int64_t ranks, const Unit* s, int64_t s_stride, bool ones, RightRows t, int64_t units, float* c,
                  bool add) {
  constexpr int64_t kStrip = E::kReduceVectors * E::kLanes;
  const int64_t groups = quotient_up(ranks, E::kReduceRanks);
  for (int64_t g = 0, j = 0; g < groups; ++g) {
    const int64_t tile_ranks = quotient_up(ranks - j, groups - g);
    const bool last = ones && g == groups - 1;
    const Unit* s_group = s + j;
    float* c_group = c + j * kStrip;
    switch (tile_ranks) {
      case 1: reduce_tile<E, 1>(s_group, s_stride, last, t, units, c_group, add); break;
      case 2: reduce_tile<E, 2>(s_group, s_stride, last, t, units, c_group, add); break;
      case 3: reduce_tile<E, 3>(s_group, s_stride, last, t, units, c_group, add); break;
      case 4: reduce_tile<E, 4>(s_group, s_stride, last, t, units, c_group, add); break;
      case 5: reduce_tile<E, 5>(s_group, s_stride, last, t, units, c_group, add); break;
      case 6: reduce_tile<E, 6>(s_group, s_stride, last, t, units, c_group, add); break;
      default:
        if constexpr (E::kReduceRanks > 6) {
          switch (tile_ranks) {
            case 7: reduce_tile<E, 7>(s_group, s_stride, last, t, units, c_group, add); break;
            case 8: reduce_tile<E, 8>(s_group, s_stride, last, t, units, c_group, add); break;
            default: reduce_tile<E, 9>(s_group, s_stride, last, t, units, c_group, add);
          }
        }
    }
    j += tile_ranks;
  }
}

}  // namespace
}  // namespace vitadapter::cpu
