// The consolidator op on vectors of floats: a block of rows is read once, turned so that a vector holds a column of it,
// and from there everything is a scalar weight times a vector; what comes out is turned back and written once.
//
// Traffic: forward reads x and base and writes y; backward reads g and x (and what gx is added to) and writes gx.
// Turned blocks stay in the second-level cache: at 768 inputs and 3,072 outputs 400 KB for g.
//
// Why turned: at 384 groups a block of weights is 2 × 2 to 8 × 2, and neither its inputs (which the shuffle scatters)
// nor its outputs fill a vector. Rows always do, the shuffle costs nothing, and drop-path is a vector too.
//
// Weight gradients: rows are cut into chunks whose bounds depend on the shape only; each chunk has its own sums, and
// the chunks are added in order. So the bits do not depend on the number of threads.
#pragma once

#include "consolidator.h"
#include "memory.h"
#include "simd/rows.h"

namespace vitadapter::cpu {
namespace {

// Vectors that the rows of a block fill.
constexpr int64_t kBlockVectors = 2;
// Outputs that are turned back and written together.
constexpr int64_t kPanel = 64;
// Terms that are added up in one chain of float32: longer ones would be less exact than a library's products.
constexpr int64_t kRun = 128;
// Elements that are worth a thread.
constexpr int64_t kConsolidatorGrain = 1 << 14;
// All chunks' sums together.
constexpr int64_t kConsolidatorSumsBytes = 16 << 20, kConsolidatorChunks = 64;

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

// Whether to write past the caches (memory.h), which wants whole cache lines.
inline bool streams(Result out, int64_t rows, int64_t width) {
  const int64_t row_bytes = width * element_size(out.dtype);
  return row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(out.data) % 64 == 0 && rows * row_bytes > stream_bytes();
}

// The branches as they are worked with: weights as operands, and where the column of a place begins in a turned block.
template <class E>
struct Branches {
  float *weight[kMaxBranches], *bias[kMaxBranches];
  int32_t* column[kMaxBranches];

  template <typename Problem>
  Branches(Pieces& pieces, const Problem& p) {
    for (int i = 0; i < p.branches; ++i) {
      weight[i] = pieces.take<float>(p.out * p.branch[i].group_in);
      bias[i] = pieces.take<float>(p.out);
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
      if (b.bias.data) read_floats<E>(b.bias, p.out, bias[i]);
      for (int64_t k = 0; !b.bias.data && k < p.out; ++k) bias[i][k] = 0;
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

// ---- forward

template <class E>
struct ForwardRoom {
  float *x, *panel, *lying, *keep;

  ForwardRoom(Pieces& pieces, const ConsolidatorForward& p)
      : x(pieces.take<float>(turned_size<E>(p.in))),
        panel(pieces.take<float>(kPanel * kBlockRows<E>)),
        lying(pieces.take<float>(kBlockRows<E> * kPanel)),
        keep(pieces.take<float>(p.branches * kBlockRows<E>)) {}
};

// Outputs [begin, end) of a branch in a panel that begins at output `origin`.
template <class E>
void add_outputs(const ConsolidatorBranch& b, const float* weight, const float* bias, const int32_t* column,
                 const float* keep, bool first, int64_t begin, int64_t end, int64_t origin, const float* x,
                 float* panel) {
  for (int64_t group = begin / b.group_out; begin < end; ++group) {
    const int64_t stop = least((group + 1) * b.group_out, end);
    in_fours(begin, stop, [&](int64_t output, auto together) {
      constexpr int kColumns = decltype(together)::kColumns;
      float* to[kColumns];
      for (int c = 0; c < kColumns; ++c) to[c] = panel + (output - origin + c) * kBlockRows<E>;
      add_products<E, kColumns>(b.group_in, x, column + group * b.group_in, weight + output * b.group_in, 1, b.group_in,
                                bias + output, keep, first, to);
    });
    begin = stop;
  }
}

template <class E>
void consolidator_forward(const ConsolidatorForward& p, ParallelFor parallel_for) {
  const auto branches = laid_out<Branches<E>>(Slot::kCall, p);
  branches.read(p, p.compute, kBlockRows<E>);
  const bool stream = streams(p.y, p.rows, p.out);
  expect_writes(p.y.data, p.rows * p.out * element_size(p.y.dtype));
  const int64_t grain = quotient_up(kConsolidatorGrain, kBlockRows<E> * (p.in + p.out));
  for_ranges(parallel_for, quotient_up(p.rows, kBlockRows<E>), grain, [&](int64_t begin, int64_t end) {
    const auto room = laid_out<ForwardRoom<E>>(Slot::kThread, p);
    for (int64_t row = begin * kBlockRows<E>; row < least(end * kBlockRows<E>, p.rows); row += kBlockRows<E>) {
      const int64_t rows = least(kBlockRows<E>, p.rows - row);
      turn_in<E>(at(p.x, row * p.in), p.compute, p.in, rows, room.x);
      read_keep<E>(p, row, rows, room.keep);
      for (int64_t output = 0; output < p.out; output += kPanel) {
        const int64_t stop = least(output + kPanel, p.out);
        for (int i = 0; i < p.branches; ++i) {
          const float* const keep = p.drop_path.active() ? room.keep + i * kBlockRows<E> : nullptr;
          add_outputs<E>(p.branch[i], branches.weight[i], branches.bias[i], branches.column[i], keep, i == 0, output,
                         stop, output, room.x, room.panel);
        }
        const int64_t begins = row * p.out + output;
        turn_out<E>(room.panel, stop - output, rows, p.out, at(p.base, begins), at(p.y, begins), stream, room.lying);
      }
    }
    if (stream) E::stream_fence();
  });
}

// ---- backward

// Where the sums of a chunk stand, in floats; those of a vector each are written whole. Without drop-path every bias
// has Σ g for its gradient.
template <class E>
struct SumsLayout {
  int64_t weight[kMaxBranches], bias[kMaxBranches], grad, size = 0;
  bool needs_weight[kMaxBranches], needs_bias[kMaxBranches], needs_grad;

  explicit SumsLayout(const ConsolidatorBackward& p) : needs_grad(p.grad_sum.data) {
    const auto place = [&](bool needed, int64_t count) {
      const int64_t begin = size;
      if (needed) size += multiple_of(E::kLanes, count);
      return begin;
    };
    for (int i = 0; i < p.branches; ++i) {
      needs_weight[i] = p.weight_grad[i].data;
      needs_bias[i] = p.bias_grad[i].data && p.drop_path.active();
      needs_grad |= p.bias_grad[i].data && !p.drop_path.active();
      weight[i] = place(needs_weight[i], p.out * p.branch[i].group_in);
      bias[i] = place(needs_bias[i], p.out);
    }
    grad = place(needs_grad, p.out);
  }
};

// How the rows are cut up.
template <class E>
struct Chunks {
  int64_t count = 1, rows;

  Chunks(const ConsolidatorBackward& p, int64_t sums) {
    const int64_t bytes = most(sums, 1) * int64_t(sizeof(float));
    while (2 * count <= kConsolidatorChunks && p.rows >= 4 * count * kBlockRows<E> &&
           2 * count * bytes <= kConsolidatorSumsBytes) {
      count *= 2;
    }
    rows = multiple_of(kBlockRows<E>, quotient_up(p.rows, count));
    count = quotient_up(p.rows, rows);
  }
};

// A block of weights so small that vectors of sums are filled from several: each entry's two columns come from tables.
inline bool is_small(const ConsolidatorBranch& b) { return b.group_in < 4 || b.group_out < 4; }

template <class E>
struct BackwardCall {
  Branches<E> branches;
  int32_t *output[kMaxBranches], *input[kMaxBranches];  // where the columns of an entry begin, in g and in x
  float* sums;

  BackwardCall(Pieces& pieces, const ConsolidatorBackward& p, const SumsLayout<E>& layout, int64_t chunks)
      : branches(pieces, p) {
    for (int i = 0; i < p.branches; ++i) {
      const bool tables = layout.needs_weight[i] && is_small(p.branch[i]);
      const int64_t entries = tables ? multiple_of(E::kLanes, p.out * p.branch[i].group_in) : 0;
      output[i] = pieces.take<int32_t>(entries);
      input[i] = pieces.take<int32_t>(entries);
    }
    sums = pieces.take<float>(chunks * layout.size);
  }

  void fill_tables(const ConsolidatorBackward& p, const SumsLayout<E>& layout) const {
    for (int i = 0; i < p.branches; ++i) {
      const ConsolidatorBranch& b = p.branch[i];
      if (!layout.needs_weight[i] || !is_small(b)) continue;
      int64_t entry = 0;
      for (int64_t group = 0; group < b.groups; ++group) {
        for (int64_t o = group * b.group_out; o < (group + 1) * b.group_out; ++o) {
          for (int64_t s = 0; s < b.group_in; ++s, ++entry) {
            output[i][entry] = int32_t(o * kBlockRows<E>);
            input[i][entry] = branches.column[i][group * b.group_in + s];
          }
        }
      }
      for (; entry % E::kLanes; ++entry) output[i][entry] = input[i][entry] = 0;
    }
  }
};

template <class E>
struct BackwardRoom {
  float *x, *g, *x_grad, *lying, *keep;

  BackwardRoom(Pieces& pieces, const ConsolidatorBackward& p)
      : x(pieces.take<float>(turned_size<E>(p.in))),
        g(pieces.take<float>(turned_size<E>(p.out))),
        x_grad(pieces.take<float>(p.x_grad.data ? turned_size<E>(p.in) : 0)),
        lying(pieces.take<float>(p.x_grad.data ? kBlockRows<E> * kPanel : 0)),
        keep(pieces.take<float>(p.branches * kBlockRows<E>)) {}
};

template <class E>
void add_inputs(const ConsolidatorBranch& b, const float* weight, const int32_t* column, const float* keep, bool first,
                const float* g, float* x_grad) {
  for (int64_t group = 0; group < b.groups; ++group) {
    const int64_t output = group * b.group_out;
    const int32_t* const columns = column + group * b.group_in;
    in_fours(0, b.group_in, [&](int64_t input, auto together) {
      constexpr int kColumns = decltype(together)::kColumns;
      float* to[kColumns];
      for (int c = 0; c < kColumns; ++c) to[c] = x_grad + columns[input + c];
      add_products<E, kColumns>(b.group_out, g + output * kBlockRows<E>, nullptr, weight + output * b.group_in + input,
                                b.group_in, 1, nullptr, keep, first, to);
    });
  }
}

// g · x of a block's rows, kept ones if that is given; lanes are still apart.
template <class E>
VA_INLINE typename E::Vector products(const float* g, const float* x, const float* keep) {
  typename E::Vector sum = E::zero();
  VA_UNROLL
  for (int v = 0; v < kBlockVectors; ++v) {
    typename E::Vector value = E::load(g + v * E::kLanes);
    if (keep) value = E::mul(value, E::load(keep + v * E::kLanes));
    sum = x ? E::fma(value, E::load(x + v * E::kLanes), sum) : E::add(sum, value);
  }
  return sum;
}

template <class E>
VA_INLINE void add_to(float* sums, typename E::Vector values) {
  E::store(sums, E::add(E::load(sums), values));
}

template <class E>
void add_small_blocks(int64_t entries, const int32_t* output, const int32_t* input, const float* g, const float* x,
                      const float* keep, float* sums) {
  for (int64_t entry = 0; entry < entries; entry += E::kLanes) {
    typename E::Vector v[E::kLanes];
    VA_UNROLL
    for (int i = 0; i < E::kLanes; ++i) v[i] = products<E>(g + output[entry + i], x + input[entry + i], keep);
    add_to<E>(sums + entry, E::lane_sums(v));
  }
}

// Tiles of four outputs by as many inputs as fill a vector of sums.
template <class E>
void add_blocks(const ConsolidatorBranch& b, const int32_t* column, const float* g, const float* x, const float* keep,
                float* sums) {
  constexpr int kOutputs = 4, kInputs = E::kLanes / kOutputs;
  for (int64_t group = 0; group < b.groups; ++group) {
    const int32_t* const columns = column + group * b.group_in;
    for (int64_t t = 0; t < b.group_out; t += kOutputs) {
      const int64_t output = group * b.group_out + t, outputs = least(kOutputs, b.group_out - t);
      for (int64_t s = 0; s < b.group_in; s += kInputs) {
        const int64_t inputs = least(kInputs, b.group_in - s);
        typename E::Vector v[E::kLanes];
        VA_UNROLL
        for (int i = 0; i < E::kLanes; ++i) {
          v[i] = products<E>(g + (output + least(i / kInputs, outputs - 1)) * kBlockRows<E>,
                             x + columns[s + least(i % kInputs, inputs - 1)], keep);
        }
        float tile[E::kLanes];
        E::store(tile, E::lane_sums(v));
        for (int64_t i = 0; i < outputs; ++i) {
          for (int64_t j = 0; j < inputs; ++j) sums[(output + i) * b.group_in + s + j] += tile[i * kInputs + j];
        }
      }
    }
  }
}

template <class E>
void add_columns(int64_t count, const float* g, const float* keep, float* sums) {
  for (int64_t column = 0; column < count; column += E::kLanes) {
    typename E::Vector v[E::kLanes];
    VA_UNROLL
    for (int i = 0; i < E::kLanes; ++i) v[i] = products<E>(g + (column + i) * kBlockRows<E>, nullptr, keep);
    add_to<E>(sums + column, E::lane_sums(v));
  }
}

template <class E>
void backward_block(const ConsolidatorBackward& p, const SumsLayout<E>& layout, const BackwardCall<E>& call,
                    int64_t row, int64_t rows, const BackwardRoom<E>& room, bool stream, float* sums) {
  bool needs_x = false;
  for (int i = 0; i < p.branches; ++i) needs_x |= layout.needs_weight[i];
  turn_in<E>(at(p.grad, row * p.out), p.compute, p.out, rows, room.g);
  if (needs_x) turn_in<E>(at(p.x, row * p.in), p.compute, p.in, rows, room.x);
  read_keep<E>(p, row, rows, room.keep);
  for (int i = 0; i < p.branches; ++i) {
    const ConsolidatorBranch& b = p.branch[i];
    const float* const keep = p.drop_path.active() ? room.keep + i * kBlockRows<E> : nullptr;
    const int32_t* const column = call.branches.column[i];
    if (p.x_grad.data) add_inputs<E>(b, call.branches.weight[i], column, keep, i == 0, room.g, room.x_grad);
    if (layout.needs_weight[i] && is_small(b)) {
      add_small_blocks<E>(p.out * b.group_in, call.output[i], call.input[i], room.g, room.x, keep,
                          sums + layout.weight[i]);
    } else if (layout.needs_weight[i]) {
      add_blocks<E>(b, column, room.g, room.x, keep, sums + layout.weight[i]);
    }
    if (layout.needs_bias[i]) add_columns<E>(p.out, room.g, keep, sums + layout.bias[i]);
  }
  if (layout.needs_grad) add_columns<E>(p.out, room.g, nullptr, sums + layout.grad);
  for (int64_t column = 0; p.x_grad.data && column < p.in; column += kPanel) {
    const int64_t begins = row * p.in + column;
    turn_out<E>(room.x_grad + column * kBlockRows<E>, least(kPanel, p.in - column), rows, p.in,
                at(p.x_grad_base, begins), at(p.x_grad, begins), stream, room.lying);
  }
}

// Adds the chunks' sums up, into the first one's.
template <class E>
void add_chunks(float* sums, int64_t size, int64_t chunks, ParallelFor parallel_for) {
  for_ranges(parallel_for, size / E::kLanes, quotient_up(kConsolidatorGrain, E::kLanes * chunks),
             [&](int64_t begin, int64_t end) {
               for (int64_t i = begin * E::kLanes; i < end * E::kLanes; i += E::kLanes) {
                 typename E::Vector total = E::load(sums + i);
                 for (int64_t chunk = 1; chunk < chunks; ++chunk)
                   total = E::add(total, E::load(sums + chunk * size + i));
                 E::store(sums + i, total);
               }
             });
}

template <class E>
void consolidator_backward(const ConsolidatorBackward& p, ParallelFor parallel_for) {
  const SumsLayout<E> layout(p);
  const Chunks<E> chunks(p, layout.size);
  const auto call = laid_out<BackwardCall<E>>(Slot::kCall, p, layout, chunks.count);
  call.branches.read(p, p.compute, kBlockRows<E>);
  call.fill_tables(p, layout);
  const bool stream = p.x_grad.data && streams(p.x_grad, p.rows, p.in);
  if (p.x_grad.data) expect_writes(p.x_grad.data, p.rows * p.in * element_size(p.x_grad.dtype));
  for_ranges(parallel_for, chunks.count, 1, [&](int64_t begin, int64_t end) {
    const auto room = laid_out<BackwardRoom<E>>(Slot::kThread, p);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* const sums = call.sums + chunk * layout.size;
      memset(sums, 0, layout.size * sizeof *sums);
      const int64_t stop = least((chunk + 1) * chunks.rows, p.rows);
      for (int64_t row = chunk * chunks.rows; row < stop; row += kBlockRows<E>) {
        backward_block<E>(p, layout, call, row, least(kBlockRows<E>, stop - row), room, stream, sums);
      }
    }
    if (stream) E::stream_fence();
  });
  add_chunks<E>(call.sums, layout.size, chunks.count, parallel_for);
  for (int i = 0; i < p.branches; ++i) {
    if (layout.needs_weight[i]) {
      write_floats<E>(call.sums + layout.weight[i], p.out * p.branch[i].group_in, p.weight_grad[i]);
    }
    const int64_t bias = layout.needs_bias[i] ? layout.bias[i] : layout.grad;
    if (p.bias_grad[i].data) write_floats<E>(call.sums + bias, p.out, p.bias_grad[i]);
  }
  if (p.grad_sum.data) write_floats<E>(call.sums + layout.grad, p.out, p.grad_sum);
}

// ---- the weight with the branches in it

template <class E>
struct WeightRoom {
  float* row;
  WeightRoom(Pieces& pieces, int64_t in) : row(pieces.take<float>(in)) {}
};

template <class E>
void consolidator_weight(const ConsolidatorWeight& p, ParallelFor parallel_for) {
  const auto branches = laid_out<Branches<E>>(Slot::kCall, p);
  branches.read(p, DType::kFloat32, 1);
  for_ranges(parallel_for, p.out, quotient_up(kConsolidatorGrain, p.in), [&](int64_t begin, int64_t end) {
    const auto room = laid_out<WeightRoom<E>>(Slot::kThread, p.in);
    for (int64_t output = begin; output < end; ++output) {
      read_floats<E>(at(p.weight, output * p.in), p.in, room.row);
      for (int i = 0; i < p.branches; ++i) {
        const int64_t group_in = p.branch[i].group_in;
        const int32_t* const source = branches.column[i] + output / p.branch[i].group_out * group_in;
        const float* const weight = branches.weight[i] + output * group_in;
        for (int64_t s = 0; s < group_in; ++s) room.row[source[s]] += weight[s];
      }
      write_floats<E>(room.row, p.in, at(p.result, output * p.in));
    }
  });
}

}  // namespace
}  // namespace vitadapter::cpu
