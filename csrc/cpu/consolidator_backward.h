// The backward pass of the consolidator op on vectors of floats; see consolidator_blocks.h.
//
// Weight gradients: rows are cut into chunks whose bounds depend on the shape, on which gradients are asked for and on
// whether there is drop-path; each chunk has its own sums, and the chunks are added in order. So the bits do not depend
// on the number of threads.
#pragma once

#include "consolidator_blocks.h"

namespace vitadapter::cpu {
namespace {

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

// How the rows are cut up: into a power of two of chunks, each of as many blocks as any other or of one more, so that
// they divide evenly among threads.
template <class E>
struct Chunks {
  int64_t rows, count = 1;

  Chunks(const ConsolidatorBackward& p, int64_t sums) : rows(p.rows) {
    const int64_t bytes = most(sums, 1) * int64_t(sizeof(float));
    while (2 * count <= kMostChunks && rows >= 4 * count * kBlockRows<E> && 2 * count * bytes <= kSumsBytes) {
      count *= 2;
    }
  }
  // A chunk's first row.
  int64_t begin(int64_t chunk) const {
    return least(rows, quotient_up(rows, kBlockRows<E>) * chunk / count * kBlockRows<E>);
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
  for_ranges(parallel_for, size / E::kLanes, quotient_up(kGrain, E::kLanes * chunks), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * E::kLanes; i < end * E::kLanes; i += E::kLanes) {
      typename E::Vector total = E::load(sums + i);
      for (int64_t chunk = 1; chunk < chunks; ++chunk) total = E::add(total, E::load(sums + chunk * size + i));
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
  const int64_t row_bytes = p.in * element_size(p.x_grad.dtype);
  const bool stream = p.x_grad.data && streams(p.x_grad.data, p.rows, row_bytes);
  if (p.x_grad.data) expect_writes(p.x_grad.data, p.rows * row_bytes);
  for_ranges(parallel_for, chunks.count, 1, [&](int64_t begin, int64_t end) {
    const auto room = laid_out<BackwardRoom<E>>(Slot::kThread, p);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* const sums = call.sums + chunk * layout.size;
      memset(sums, 0, layout.size * sizeof *sums);
      const int64_t stop = chunks.begin(chunk + 1);
      for (int64_t row = chunks.begin(chunk); row < stop; row += kBlockRows<E>) {
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

}  // namespace
}  // namespace vitadapter::cpu
