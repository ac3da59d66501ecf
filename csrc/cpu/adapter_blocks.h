// The adapter op on one engine (simd/unit.h): a block of rows is read once, goes through all its products while it is
// in the cache, and is written once.
//
// Traffic: forward reads x and writes y (2 streams of rows·dim elements, 3 with a separate residual); backward reads g
// and x and writes gx (3 streams). The hidden layer, rank floats a row, is written once and read once. Weights are
// packed once a call into the panels that the products go through.
//
// An operand of a product that is already in the engine's form is used where it lies; any other (another dtype, a dim
// that is not a whole number of vectors, a gradient under dropout) is converted block by block into the cache.
//
// Weight gradients: rows are cut into chunks whose bounds depend on the shape only; each chunk has its own sums, and
// the chunks are added in order. So the bits do not depend on the number of threads.
#pragma once

#include "adapter.h"
#include "simd/activation.h"
#include "simd/packing.h"

namespace vitadapter::cpu {
namespace {

// Up to this rank the first product runs along dim (project_narrow) and weights need no transposition.
constexpr int64_t kNarrowRank = 16;

// The rows of a block are read and written while they lie in the second-level cache beside the packed weights.
constexpr int64_t kBlockBytes = 576 << 10, kMostBlockRows = 192;
// A chunk is worth a thread's while from this many multiplications on; rows count as some even at rank 1. In the
// backward pass it also pays for its own sums: adding them up costs as much as about 15 rows.
constexpr int64_t kChunkWork = 1 << 20, kRowWork = 8, kLeastRows = 48, kSummingRows = 384;
// Adding chunks' sums up is worth another thread from this many numbers on.
constexpr int64_t kFinishWork = 1 << 15;

// How the rows are cut up: `chunks` chunks of chunk_rows (the last may have less), each in blocks of block_rows.
struct Cut {
  int64_t rows, chunks, chunk_rows, block_rows;

  int64_t begin(int64_t chunk) const { return least(rows, chunk * chunk_rows); }
};

// A power of two of chunks, so that they divide evenly among threads.
inline Cut cut_rows(int64_t rows, int64_t dim, int64_t rank, int64_t row_bytes, int64_t least_rows,
                    int64_t most_chunks) {
  const int64_t worthwhile = kChunkWork / (dim * (rank + kRowWork));
  int64_t chunks = 1;
  // The first threads win more than their sums cost, the later ones less.
  while (2 * chunks <= most_chunks && rows >= 2 * chunks * most(worthwhile, least(chunks * kLeastRows, least_rows))) {
    chunks *= 2;
  }
  const int64_t chunk_rows = multiple_of(kTileRows, quotient_up(rows, chunks));
  const int64_t most_rows = most(kTileRows, least(kMostBlockRows, kBlockBytes / row_bytes));
  const int64_t blocks = quotient_up(chunk_rows, most_rows);
  return {rows, quotient_up(rows, chunk_rows), chunk_rows, multiple_of(kTileRows, quotient_up(chunk_rows, blocks))};
}

// The sizes of one problem on one engine.
template <class E>
struct Sizes {
  static constexpr int64_t kStep = E::kLanes * E::kPerUnit;  // elements in a vector
  static constexpr int64_t kStrip = E::kReduceVectors * E::kLanes;
  int64_t dim, rank;
  int64_t dim_padded, rank_padded;  // in whole vectors of elements
  int64_t dim_panels;               // in whole panels
  int64_t dim_units, rank_units;
  int64_t strips;
  // The hidden layer of a block: `rank` floats a row where that serves all products, so that the activation goes over
  // them without gaps; else whole vectors.
  int64_t middle_stride;
  bool narrow;

  explicit Sizes(const AdapterProblem& p)
      : dim(p.dim),
        rank(p.rank),
        dim_padded(multiple_of(kStep, dim)),
        rank_padded(multiple_of(kStep, rank)),
        dim_panels(multiple_of(Panels<E>::kWidth, dim)),
        dim_units(quotient_up(dim, E::kPerUnit)),
        rank_units(quotient_up(rank, E::kPerUnit)),
        strips(quotient_up(dim, kStrip)),
        middle_stride(rank <= kNarrowRank || rank % E::kLanes == 0 ? multiple_of(E::kPerUnit, rank) : rank_padded),
        narrow(rank <= kNarrowRank) {}

  // The hidden layer of so many rows, with room for reading and writing whole vectors anywhere in it.
  int64_t middle_size(int64_t rows) const { return rows * middle_stride + kStep; }
  int64_t bias_size() const { return rank_padded + kStep; }

  // Room for the first product's weights, in units.
  int64_t first_size() const {
    return narrow ? rank * dim_padded / E::kPerUnit : Panels<E>::size(dim_units, multiple_of(E::kLanes, rank));
  }
};

// The first product's weights, (dim → rank): rows of `rank` along dim where it is narrow, else panels.
template <class E>
void project_block(const Sizes<E>& size, int64_t rows, const Unit* a, int64_t a_stride, const Unit* weights,
                   const float* bias, float* sums, const Ahead& ahead) {
  if (size.narrow) {
    const int64_t units = size.dim_padded / E::kPerUnit;
    project_narrow<E>(rows, a, a_stride, size.rank, weights, units, units, bias, sums, size.middle_stride, ahead);
  } else {
    const Panels<E> panels{weights, size.dim_units, multiple_of(E::kLanes, size.rank)};
    project<E>(rows, a, a_stride, panels, bias, sums, size.middle_stride, ahead);
  }
}

// A vector with zeros up to whole panels, and everywhere where the operand is absent.
template <class E>
void read_vector(Operand operand, int64_t count, int64_t padded, float* to) {
  if (!operand.data) count = 0;
  if (count > 0) read_floats<E>(operand, count, to);
  for (int64_t i = count; i < padded; ++i) to[i] = 0;
}

// The scale of each column; whether it is anything but 1 everywhere.
template <class E>
bool read_scale(const AdapterProblem& p, int64_t padded, float* to) {
  if (p.scale_is_channel) {
    read_vector<E>(p.scale, p.dim, padded, to);
    return true;
  }
  const float value = p.scale_at<float>(0);
  for (int64_t i = 0; i < padded; ++i) to[i] = i < p.dim ? value : 0;
  return value != 1;
}

// ---- blocks of rows

// A block of rows as an operand: where it lies, or converted into `room`.
struct Rows {
  const Unit* units;
  int64_t stride;  // in units
};

template <class E>
bool lies_ready(Operand from, const Sizes<E>& size, DType compute) {
  return is_element<E>(from.dtype, compute) && size.dim == size.dim_padded;
}

template <class E>
Rows rows_of(Operand from, const Sizes<E>& size, DType compute, int64_t row, int64_t rows, float* floats,
             typename E::Element* room) {
  if (lies_ready<E>(from, size, compute)) {
    return {static_cast<const Unit*>(at(from, row * size.dim).data), size.dim / E::kPerUnit};
  }
  for (int64_t i = 0; i < rows; ++i) {
    read_operand<E>(at(from, (row + i) * size.dim), compute, size.dim, size.dim_padded, floats,
                    room + i * size.dim_padded);
  }
  return {reinterpret_cast<const Unit*>(room), size.dim_padded / E::kPerUnit};
}

// What a product fetches ahead: the rows of `from`, from `row` on.
template <class E>
Ahead ahead_of(Operand from, const Sizes<E>& size, int64_t row) {
  const int64_t bytes = element_size(from.dtype);
  return {at(from, row * size.dim).data, size.dim * bytes, E::kPerUnit * bytes};
}

// g' = drop_path ∘ dropout_out ∘ g as an operand, times the scale of each column where that is given. Pairs round the
// product, floats g only: a small scale must not take float16 gradients below its range.
template <class E>
Rows dropped_rows(const AdapterBackward& p, const Sizes<E>& size, int64_t row, int64_t rows, const float* scale,
                  float* floats, float* factors, typename E::Element* room) {
  if (!p.dropout_out.active() && !p.drop_path.active() && !scale) {
    return rows_of<E>(p.grad, size, p.compute, row, rows, floats, room);
  }
  for (int64_t i = 0; i < rows; ++i) {
    read_floats<E>(at(p.grad, (row + i) * size.dim), size.dim, floats);
    const float keep = p.sample_factor<float>(row + i);
    for (int64_t d = size.dim; d < size.dim_padded; ++d) floats[d] = 0;
    for (int64_t d = 0; d < size.dim_padded; d += E::kLanes) {
      E::store(floats + d, E::mul(rounded_operand<E>(E::load(floats + d), p.compute), E::set(keep)));
    }
    if (p.dropout_out.active()) {
      dropout_factors(p.dropout_out, row + i, size.dim, factors);
      for (int64_t d = 0; d < size.dim; ++d) floats[d] *= factors[d];
    }
    for (int64_t d = 0; scale && d < size.dim; ++d) floats[d] *= scale[d];
    factored_to_elements<E>(floats, p.compute, size.dim, size.dim_padded, room + i * size.dim_padded);
  }
  return {reinterpret_cast<const Unit*>(room), size.dim_padded / E::kPerUnit};
}

// The dropout factors of a block's hidden layer.
template <class E>
void middle_factors(const Dropout& dropout, const Sizes<E>& size, int64_t row, int64_t rows, float* factors) {
  for (int64_t i = 0; i < rows; ++i) {
    dropout_factors(dropout, row + i, size.rank, factors + i * size.middle_stride);
  }
}

// An odd rank leaves half of the last unit of each row unused.
template <class E>
void clear_gaps(const Sizes<E>& size, int64_t rows, typename E::Element* middle) {
  if (size.rank % E::kPerUnit == 0) return;
  for (int64_t i = 0; i < rows; ++i) middle[i * size.middle_stride + size.rank] = 0;
}

// Rows of `count` floats from one stride to another.
inline void copy_rows(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows,
                      int64_t count) {
  if (to_stride == count && from_stride == count) {
    count *= rows;
    rows = 1;
  }
  for (int64_t i = 0; i < rows; ++i) memcpy(to + i * to_stride, from + i * from_stride, count * sizeof(float));
}

// Whether to write past the caches (memory.h): a panel at a time, so those are whole cache lines too.
template <class E>
bool should_stream(Result out, int64_t rows, int64_t dim) {
  const int64_t size = element_size(out.dtype);
  return Panels<E>::kWidth * size % 64 == 0 && streams(out.data, rows, dim * size);
}

}  // namespace
}  // namespace vitadapter::cpu
