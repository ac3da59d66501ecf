// The forward pass of the adapter op on one engine, rows shared out among threads; see adapter_blocks.h.
#pragma once

#include "adapter_blocks.h"

namespace vitadapter::cpu {
namespace {

template <class E>
struct ForwardWeights {
  Unit *first, *second;
  float *down_bias, *up_bias, *scale, *floats;

  ForwardWeights(Pieces& pieces, const Sizes<E>& size)
      : first(pieces.take<Unit>(size.first_size())),
        second(pieces.take<Unit>(Panels<E>::size(size.rank_units, size.dim_panels))),
        down_bias(pieces.take<float>(size.bias_size())),
        up_bias(pieces.take<float>(size.dim_panels)),
        scale(pieces.take<float>(size.dim_panels)),
        floats(pieces.take<float>(size.dim_padded)) {}
};

template <class E>
struct ForwardBlock {
  typename E::Element *x, *z;
  float *floats, *hidden, *factors, *mask, *keep;

  ForwardBlock(Pieces& pieces, const AdapterForward& p, const Sizes<E>& size, int64_t rows)
      : x(pieces.take<typename E::Element>(lies_ready<E>(p.x, size, p.compute) ? 0 : rows * size.dim_padded)),
        z(pieces.take<typename E::Element>(size.middle_size(rows))),
        floats(pieces.take<float>(size.dim_padded)),
        hidden(pieces.take<float>(size.middle_size(rows))),
        factors(pieces.take<float>(p.dropout.active() ? size.middle_size(rows) : 0)),
        mask(pieces.take<float>(p.dropout_out.active() ? rows * size.dim_panels : 0)),
        keep(pieces.take<float>(rows)) {}
};

// z = dropout ∘ act(hidden) as an operand; hidden is kept where it is asked for.
template <class E>
void activate_rows(const AdapterForward& p, const Sizes<E>& size, int64_t row, int64_t rows,
                   const ForwardBlock<E>& block) {
  using Vector = typename E::Vector;
  if (p.dropout.active()) middle_factors<E>(p.dropout, size, row, rows, block.factors);
  for (int64_t k = 0; k < rows * size.middle_stride; k += E::kLanes) {
    Vector value = activate_vector<E>(p.activation, E::load(block.hidden + k)).value;
    if (p.dropout.active()) value = E::mul(value, E::load(block.factors + k));
    E::store_elements(block.z + k, value);
  }
  clear_gaps<E>(size, rows, block.z);
  if (!p.hidden) return;
  float* kept = static_cast<float*>(p.hidden) + row * size.rank;
  copy_rows(kept, size.rank, block.hidden, size.middle_stride, rows, size.rank);
}

// What drop-path and dropout of the output multiply these rows with.
template <class E>
void set_factors(const AdapterForward& p, const Sizes<E>& size, int64_t row, int64_t rows, const ForwardBlock<E>& block,
                 Expansion& expansion) {
  if (p.drop_path.active()) {
    for (int64_t i = 0; i < rows; ++i) block.keep[i] = p.sample_factor<float>(row + i);
    expansion.row_factor = block.keep;
  }
  if (p.dropout_out.active()) {
    for (int64_t i = 0; i < rows; ++i) {
      dropout_factors(p.dropout_out, row + i, size.dim, block.mask + i * size.dim_panels);
    }
    expansion.mask = block.mask;
    expansion.mask_stride = size.dim_panels;
  }
}

template <class E>
void forward_chunk(const AdapterForward& p, const Sizes<E>& size, const Cut& cut, int64_t chunk,
                   const ForwardWeights<E>& weights, Expansion expansion) {
  const auto block = laid_out<ForwardBlock<E>>(Slot::kThread, p, size, cut.block_rows);
  const Panels<E> second{weights.second, size.rank_units, size.dim_panels};
  for (int64_t row = cut.begin(chunk); row < cut.begin(chunk + 1); row += cut.block_rows) {
    const int64_t rows = least(cut.block_rows, cut.begin(chunk + 1) - row);
    const Rows x = rows_of<E>(p.x, size, p.compute, row, rows, block.floats, block.x);
    project_block<E>(size, rows, x.units, x.stride, weights.first, weights.down_bias, block.hidden, Ahead{});
    activate_rows<E>(p, size, row, rows, block);
    set_factors<E>(p, size, row, rows, block, expansion);
    expansion.base = at(p.residual, row * size.dim);
    expansion.out = at(p.y, row * size.dim);
    expand<E>(rows, expansion, reinterpret_cast<const Unit*>(block.z), size.middle_stride / E::kPerUnit, second,
              ahead_of<E>(p.x, size, row + rows));
  }
  if (expansion.stream) E::stream_fence();
}

template <class E>
void forward_blocks(const AdapterForward& p, ParallelFor parallel_for) {
  const Sizes<E> size(p);
  const Cut cut =
      cut_rows(p.rows, p.dim, p.rank, 2 * p.dim * int64_t(sizeof(typename E::Element)), kLeastRows, kMostChunks);
  const auto weights = laid_out<ForwardWeights<E>>(Slot::kCall, size);
  if (size.narrow) {
    for (int64_t j = 0; j < p.rank; ++j) {
      read_operand<E>(at(p.down, j * p.dim), p.compute, p.dim, size.dim_padded, weights.floats,
                      reinterpret_cast<typename E::Element*>(weights.first) + j * size.dim_padded);
    }
  } else {
    pack_across<E>(p.down, p.compute, p.rank, p.dim, weights.first, multiple_of(E::kLanes, p.rank), parallel_for);
  }
  pack_across<E>(p.up, p.compute, p.dim, p.rank, weights.second, size.dim_panels, parallel_for);
  read_vector<E>(p.down_bias, p.rank, size.bias_size(), weights.down_bias);
  read_vector<E>(p.up_bias, p.dim, size.dim_panels, weights.up_bias);
  read_scale<E>(p, size.dim_panels, weights.scale);
  Expansion expansion{};
  expansion.dim = p.dim;
  expansion.bias = weights.up_bias;
  expansion.column_factor = weights.scale;
  expansion.stream = should_stream<E>(p.y, p.rows, p.dim);
  expect_writes(p.y.data, p.rows * p.dim * element_size(p.y.dtype));
  for_ranges(parallel_for, cut.chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) forward_chunk<E>(p, size, cut, chunk, weights, expansion);
  });
}

}  // namespace
}  // namespace vitadapter::cpu
