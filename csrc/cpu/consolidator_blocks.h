// The consolidator op on vectors of floats: a block of rows is read once, turned so that a vector holds a column of it,
// and from there everything is a scalar weight times a vector; what comes out is turned back and written once.
//
// Traffic: forward reads x and base and writes y; backward reads g and x (and what gx is added to) and writes gx.
// Turned blocks stay in the second-level cache: at 768 inputs and 3,072 outputs 400 KB for g.
//
// Why turned: at 384 groups a block of weights is 2 × 2 to 8 × 2, and neither its inputs (which the shuffle scatters)
// nor its outputs fill a vector. Rows always do, the shuffle costs nothing, and drop-path is a vector too.
#pragma once

#include "consolidator.h"
#include "memory.h"
#include "simd/rows.h"

namespace vitadapter::cpu {
namespace {

// Vectors that the rows of a block fill.
constexpr int64_t kBlockVectors = 2;
// Outputs that are turned back and written together: runs of 1 KB a row, for the processor fetches ahead along a row.
constexpr int64_t kPanel = 256;
// Terms that are added up in one chain of float32: longer ones would be less exact than a library's products.
constexpr int64_t kRun = 128;
// Elements that are worth a thread.
constexpr int64_t kGrain = 1 << 14;

template <class E>
constexpr int64_t kBlockRows = kBlockVectors * E::kLanes;

// A turned block: column c of its kBlockRows rows at columns + c · kBlockRows.

template <class E>
void turn_in(Operand from, DType compute, int64_t width, int64_t rows, float* columns) {
  using Vector = typename E::Vector;
  if (from.dtype == compute) compute = DType::kFloat32;  // nothing is to be rounded
  Vector v[E::kLanes];
  for (int64_t row = 0; row < kBlockRows<E>; row += E::kLanes) {
    for (int64_t column = 0; column < width; column += E::kLanes) {
      const int64_t count = least(E::kLanes, width - column);
      VA_UNROLL
      for (int i = 0; i < E::kLanes; ++i) {
        const int64_t at = (row + i) * width + column;
        if (row + i >= rows) {
          v[i] = E::zero();
        } else if (count == E::kLanes) {
          v[i] = rounded_operand<E>(load_vector<E>(from, at), compute);
        } else {
          float part[E::kLanes] = {};
          for (int64_t c = 0; c < count; ++c) part[c] = load<float>(from, at + c);
          v[i] = rounded_operand<E>(E::load(part), compute);
        }
      }
      E::transpose(v);
      VA_UNROLL
      for (int i = 0; i < E::kLanes; ++i) E::store(columns + (column + i) * kBlockRows<E> + row, v[i]);
    }
  }
}

// Room for the columns that turn_in writes: whole vectors of them.
template <class E>
int64_t turned_size(int64_t width) {
  return multiple_of(E::kLanes, width) * kBlockRows<E>;
}

// out = base + a turned block's columns, `count` of at most kPanel; `lying` is room for kBlockRows rows of kPanel. The
// operands begin at the block's first row and the first of these columns.
template <class E>
void turn_out(const float* columns, int64_t count, int64_t rows, int64_t width, Operand base, Result out, bool stream,
              float* lying) {
  using Vector = typename E::Vector;
  for (int64_t row = 0; row < rows; row += E::kLanes) {
    for (int64_t column = 0; column < count; column += E::kLanes) {
      Vector v[E::kLanes];
      VA_UNROLL
      for (int i = 0; i < E::kLanes; ++i) v[i] = E::load(columns + (column + i) * kBlockRows<E> + row);
      E::transpose(v);
      VA_UNROLL
      for (int i = 0; i < E::kLanes; ++i) E::store(lying + (row + i) * kPanel + column, v[i]);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    const float* const from = lying + row * kPanel;
    int64_t column = 0;
    for (; column + 2 * E::kLanes <= count; column += 2 * E::kLanes) {
      const int64_t at = row * width + column;
      Vector two[] = {E::load(from + column), E::load(from + column + E::kLanes)};
      if (base.data) {
        two[0] = E::add(load_vector<E>(base, at), two[0]);
        two[1] = E::add(load_vector<E>(base, at + E::kLanes), two[1]);
      }
      store_vectors<E>(out, at, two, stream);
    }
    for (; column < count; ++column) {
      const int64_t at = row * width + column;
      store(out, at, (base.data ? load<float>(base, at) : 0.0f) + from[column]);
    }
  }
}

// The branches as they are worked with: weights as operands, and where the column of a place begins in a turned block.
template <class E>
struct Branches {
  float* weight[kMaxBranches];
  int32_t* column[kMaxBranches];

  template <typename Problem>
  Branches(Pieces& pieces, const Problem& p) {
    for (int i = 0; i < p.branches; ++i) {
      weight[i] = pieces.take<float>(p.out * p.branch[i].group_in);
      column[i] = pieces.take<int32_t>(p.in);
    }
  }

  template <typename Problem>
  void read(const Problem& p, DType compute, int64_t step) const {
    for (int i = 0; i < p.branches; ++i) {
      const ConsolidatorBranch& b = p.branch[i];
      const int64_t weights = p.out * b.group_in;
      read_floats<E>(b.weight, weights, weight[i]);
      if (compute != DType::kFloat32 && compute != b.weight.dtype) {
        for (int64_t k = 0; k < weights; ++k) weight[i][k] = rounded(weight[i][k], compute);
      }
      // b.source() divides; this walks.
      int64_t source = 0, wrap = 0;
      for (int64_t place = 0; place < p.in; ++place) {
        column[i][place] = int32_t(source * step);
        if (!p.shuffle) {
          ++source;
        } else if (source += b.group_in; source >= p.in) {
          source = ++wrap;
        }
      }
    }
  }
};

// keep_i of a block's rows, for each branch; null where nothing is dropped.
template <class E>
void read_keep(const ConsolidatorProblem& p, int64_t first, int64_t rows, float* keep) {
  if (!p.drop_path.active()) return;
  for (int i = 0; i < p.branches; ++i) {
    for (int64_t row = 0; row < kBlockRows<E>; ++row) {
      keep[i * kBlockRows<E> + row] = row < rows ? p.keep<float>(first + row, i) : 0;
    }
  }
}

// `to` (one column each) = or += keep ∘ (start + Σ_d from[d] · weights[d]) for kColumns columns at once: all read the
// same columns of the turned block, which `column` names, or one after the other from the first where it is null.
// weight(d, c) is at weights + d · down + c · across.
template <class E, int kColumns>
VA_INLINE void add_products(int64_t depth, const float* from, const int32_t* column, const float* weights, int64_t down,
                            int64_t across, const float* start, const float* keep, bool first,
                            float* const (&to)[kColumns]) {
  using Vector = typename E::Vector;
  Vector total[kColumns][kBlockVectors];
  VA_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    VA_UNROLL
    for (int v = 0; v < kBlockVectors; ++v) total[c][v] = start ? E::set(start[c]) : E::zero();
  }
  for (int64_t run = 0; run < depth; run += kRun) {
    Vector sum[kColumns][kBlockVectors];
    VA_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      VA_UNROLL
      for (int v = 0; v < kBlockVectors; ++v) sum[c][v] = run == 0 ? total[c][v] : E::zero();
    }
    for (int64_t d = run; d < least(run + kRun, depth); ++d) {
      const float* const source = from + (column ? column[d] : d * kBlockRows<E>);
      Vector value[kBlockVectors];
      VA_UNROLL
      for (int v = 0; v < kBlockVectors; ++v) value[v] = E::load(source + v * E::kLanes);
      VA_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        const Vector weight = E::set(weights[d * down + c * across]);
        VA_UNROLL
        for (int v = 0; v < kBlockVectors; ++v) sum[c][v] = E::fma(value[v], weight, sum[c][v]);
      }
    }
    VA_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      VA_UNROLL
      for (int v = 0; v < kBlockVectors; ++v) total[c][v] = run == 0 ? sum[c][v] : E::add(total[c][v], sum[c][v]);
    }
  }
  VA_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    VA_UNROLL
    for (int v = 0; v < kBlockVectors; ++v) {
      float* const out = to[c] + v * E::kLanes;
      Vector result = total[c][v];
      if (keep) result = E::mul(result, E::load(keep + v * E::kLanes));
      E::store(out, first ? result : E::add(E::load(out), result));
    }
  }
}

template <int kCount>
struct Together {
  static constexpr int kColumns = kCount;
};

// body(first, Together<n>) for [begin, end) in fours, then twos and ones.
template <typename Body>
VA_INLINE void in_fours(int64_t begin, int64_t end, const Body& body) {
  for (; begin + 4 <= end; begin += 4) body(begin, Together<4>());
  for (; begin + 2 <= end; begin += 2) body(begin, Together<2>());
  if (begin < end) body(begin, Together<1>());
}

}  // namespace
}  // namespace vitadapter::cpu
