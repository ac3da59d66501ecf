// The backward pass of the adapter op on one engine, rows shared out among threads; see adapter_blocks.h.
#pragma once

#include "adapter_blocks.h"

namespace vitadapter::cpu {
namespace {

// The rows of each strip of sums: zᵀ·g' and, in the last, Σ g'; ghᵀ·x.
struct SumRanks {
  int64_t up, down;

  explicit SumRanks(const AdapterBackward& p)
      : up((p.needs_up_product() ? p.rank : 0) + p.needs_grad_sum()), down(p.down_grad.data ? p.rank : 0) {}
};

// What one chunk of rows adds to the gradients of the parameters, in strips of columns as `reduce` makes them.
struct ChunkSums {
  float *up, *down, *hidden;
};

template <class E>
struct BackwardWeights {
  Unit *first, *second;
  float *scale, *zeros, *ones, *sums;
  double* scalar_grads;
  SumRanks ranks;
  int64_t chunk_size;

  BackwardWeights(Pieces& pieces, const AdapterBackward& p, const Sizes<E>& size, const Cut& cut)
      : first(pieces.take<Unit>(p.needs_hidden_grad() ? size.first_size() : 0)),
        second(pieces.take<Unit>(p.x_grad.data ? Panels<E>::size(size.rank_units, size.dim_panels) : 0)),
        scale(pieces.take<float>(size.dim_panels)),
        zeros(pieces.take<float>(most(size.dim_panels, size.bias_size()))),
        ones(pieces.take<float>(size.dim_panels)),
        scalar_grads(pieces.take<double>(size.strips)),
        ranks(p),
        chunk_size((ranks.up + ranks.down) * size.strips * size.kStrip + size.bias_size()) {
    sums = pieces.take<float>(cut.chunks * chunk_size);
  }

  ChunkSums chunk(int64_t c, const Sizes<E>& size) const {
    float* own = sums + c * chunk_size;
    float* down = own + ranks.up * size.strips * size.kStrip;
    return {own, down, down + ranks.down * size.strips * size.kStrip};
  }
};

// scale ∘ up, (dim, rank), as the weights of the product with g: rows of its transpose where that is narrow.
template <class E>
void pack_first_backward(const AdapterBackward& p, const Sizes<E>& size, const float* scale, Unit* first,
                         ParallelFor parallel_for) {
  using Vector = typename E::Vector;
  if (!size.narrow) {
    pack_down<E>(p.up, p.compute, p.dim, p.rank, scale, first, multiple_of(E::kLanes, p.rank), parallel_for);
    return;
  }
  auto* to = reinterpret_cast<typename E::Element*>(first);
  for (int64_t d = 0; d < size.dim_padded; d += E::kLanes) {
    float rows[E::kLanes * kNarrowRank + E::kLanes], columns[kNarrowRank * E::kLanes];
    const int64_t count = most(0, least(E::kLanes, p.dim - d)) * p.rank;
    if (count > 0) read_floats<E>(at(p.up, d * p.rank), count, rows);
    for (int64_t i = count; i < E::kLanes * p.rank + E::kLanes; ++i) rows[i] = 0;
    transpose_rows<E>(reinterpret_cast<const Unit*>(rows), p.rank, p.rank, reinterpret_cast<Unit*>(columns), E::kLanes);
    for (int64_t j = 0; j < p.rank; ++j) {
      Vector v = rounded_operand<E>(E::load(columns + j * E::kLanes), p.compute);
      if (scale) v = E::mul(v, E::load(scale + d));
      E::store_elements(to + j * size.dim_padded + d, v);
    }
  }
}

// The middle of a block as floats, and as the operands made of them: gh along the ranks, gh and z down the rows. On
// floats they are the same.
template <class E>
struct BackwardBlock {
  typename E::Element *g, *x, *gh_along;
  Unit *gh_down, *z_down, *strip;
  float *floats, *factors, *gh, *z;

  BackwardBlock(Pieces& pieces, const AdapterBackward& p, const Sizes<E>& size, int64_t rows) {
    const bool g_ready = lies_ready<E>(p.grad, size, p.compute) && !p.dropout_out.active() && !p.drop_path.active();
    const bool x_ready = lies_ready<E>(p.x, size, p.compute) || !p.down_grad.data;
    g = pieces.take<typename E::Element>(g_ready ? 0 : rows * size.dim_padded);
    x = pieces.take<typename E::Element>(x_ready ? 0 : rows * size.dim_padded);
    gh = pieces.take<float>(size.middle_size(rows));
    z = pieces.take<float>(size.middle_size(rows));
    if constexpr (E::kPerUnit == 1) {
      gh_along = gh;
      gh_down = reinterpret_cast<Unit*>(gh);
      z_down = reinterpret_cast<Unit*>(z);
    } else {
      gh_along = pieces.take<typename E::Element>(size.middle_size(rows));
      gh_down = pieces.take<Unit>(size.middle_size(quotient_up(rows, E::kPerUnit)));
      z_down = pieces.take<Unit>(size.middle_size(quotient_up(rows, E::kPerUnit)));
    }
    strip = pieces.take<Unit>(quotient_up(rows, E::kPerUnit) * size.kStrip);
    floats = pieces.take<float>(size.dim_padded);
    factors = pieces.take<float>(most(size.dim_panels, size.middle_size(rows)));
  }
};

// From hidden and gz (in block.gh) to gh = gz ∘ dropout ∘ act'(hidden) and z = dropout ∘ act(hidden).
template <class E>
void middle_gradients(const AdapterBackward& p, const Sizes<E>& size, int64_t row, int64_t rows,
                      const BackwardBlock<E>& block) {
  using Vector = typename E::Vector;
  const float* kept = static_cast<const float*>(p.hidden) + row * size.rank;
  copy_rows(block.z, size.middle_stride, kept, size.rank, rows, size.rank);
  if (p.dropout.active()) middle_factors<E>(p.dropout, size, row, rows, block.factors);
  for (int64_t k = 0; k < rows * size.middle_stride; k += E::kLanes) {
    const ActivatedVector<E> act = activate_vector<E>(p.activation, E::load(block.z + k));
    Vector z = act.value, gh = E::mul(act.slope, E::load(block.gh + k));
    if (p.dropout.active()) {
      z = E::mul(z, E::load(block.factors + k));
      gh = E::mul(gh, E::load(block.factors + k));
    }
    E::store(block.z + k, z);
    E::store(block.gh + k, gh);
    if (E::kPerUnit == 2) E::store_elements(block.gh_along + k, gh);
  }
  if constexpr (E::kPerUnit == 2) {
    clear_gaps<E>(size, rows, block.gh_along);
    for (int64_t i = 0; i < rows; i += 2) {
      for (int64_t j = 0; j < size.rank; j += E::kLanes) {
        const int64_t first = i * size.middle_stride + j, second = first + size.middle_stride;
        const bool both = i + 1 < rows;
        const Vector gh[] = {E::load(block.gh + first), both ? E::load(block.gh + second) : E::zero()};
        const Vector z[] = {E::load(block.z + first), both ? E::load(block.z + second) : E::zero()};
        E::store(block.gh_down + i / 2 * size.middle_stride + j, E::units_down(gh));
        E::store(block.z_down + i / 2 * size.middle_stride + j, E::units_down(z));
      }
    }
  }
}

// Adds the rows of gh to `sums`, the block's own sum first: short sums keep float32's rounding small over many rows.
template <class E>
void add_rows(const Sizes<E>& size, int64_t rows, const float* gh, float* sums) {
  for (int64_t j = 0; j < size.rank; j += E::kLanes) {
    typename E::Vector sum = E::zero();
    for (int64_t i = 0; i < rows; ++i) sum = E::add(sum, E::load(gh + i * size.middle_stride + j));
    E::store(sums + j, E::add(E::load(sums + j), sum));
  }
}

// c = Sᵀ · T over a block's rows, or added to it, for the strip of T that begins at `column`. A strip that is used more
// than once is first copied together (and for pairs, two rows interleaved): its rows lie dim apart, which few caches'
// sets can hold.
template <class E>
void reduce_rows(const Sizes<E>& size, int64_t rows, int64_t column, int64_t ranks, const Unit* s, bool ones, Rows t,
                 Unit* strip, float* c, bool add) {
  using Vector = typename E::Vector;
  const int64_t units = quotient_up(rows, E::kPerUnit);
  const auto* columns = reinterpret_cast<const typename E::Element*>(t.units) + column;
  const InterleavedRows<E> strip_rows{columns, t.stride * E::kPerUnit, rows};
  const int64_t vectors = least(E::kReduceVectors, (size.dim_padded - column) / E::kLanes);
  if (vectors == E::kReduceVectors && ranks <= E::kReduceRanks) {
    return reduce_strip<E>(ranks, s, size.middle_stride, ones, strip_rows, units, c, add);
  }
  for (int64_t u = 0; u < units; ++u) {
    Unit* out = strip + u * size.kStrip;
    if (vectors == E::kReduceVectors) {
      Vector row[E::kReduceVectors];
      strip_rows.load(u, row);
      VA_UNROLL
      for (int v = 0; v < E::kReduceVectors; ++v) E::store(out + v * E::kLanes, row[v]);
    } else {  // the last, narrower strip
      for (int64_t v = 0; v < E::kReduceVectors; v += E::kPerUnit) {
        Vector row[E::kPerUnit];
        VA_UNROLL
        for (int part = 0; part < E::kPerUnit; ++part) row[part] = E::zero();
        if (v < vectors) InterleavedRows<E>{columns + v * E::kLanes, strip_rows.stride, rows}.load(u, row);
        VA_UNROLL
        for (int part = 0; part < E::kPerUnit; ++part) E::store(out + (v + part) * E::kLanes, row[part]);
      }
    }
  }
  reduce_strip<E>(ranks, s, size.middle_stride, ones, UnitRows<E>{strip, size.kStrip}, units, c, add);
}

template <class E>
void backward_chunk(const AdapterBackward& p, const Sizes<E>& size, const Cut& cut, int64_t chunk,
                    const BackwardWeights<E>& weights, Expansion expansion) {
  const auto block = laid_out<BackwardBlock<E>>(Slot::kThread, p, size, cut.block_rows);
  const ChunkSums sums = weights.chunk(chunk, size);
  memset(sums.hidden, 0, size.bias_size() * sizeof(float));
  const Panels<E> second{weights.second, size.rank_units, size.dim_panels};
  for (int64_t row = cut.begin(chunk); row < cut.begin(chunk + 1); row += cut.block_rows) {
    const int64_t rows = least(cut.block_rows, cut.begin(chunk + 1) - row);
    const bool add = row > cut.begin(chunk);
    const Rows g = dropped_rows<E>(p, size, row, rows, nullptr, block.floats, block.factors, block.g);
    const Ahead x_ahead = weights.ranks.down > 0 ? ahead_of<E>(p.x, size, row) : Ahead{};
    if (p.needs_hidden_grad()) {
      project_block<E>(size, rows, g.units, g.stride, weights.first, weights.zeros, block.gh, x_ahead);
    }
    middle_gradients<E>(p, size, row, rows, block);
    if (p.down_bias_grad.data) add_rows<E>(size, rows, block.gh, sums.hidden);
    if (p.x_grad.data) {
      if (p.residual_is_x) expansion.base = at(p.grad, row * size.dim);
      expansion.out = at(p.x_grad, row * size.dim);
      expand<E>(rows, expansion, reinterpret_cast<const Unit*>(block.gh_along), size.middle_stride / E::kPerUnit,
                second, ahead_of<E>(p.grad, size, row + rows));
    }
    const SumRanks ranks = weights.ranks;
    for (int64_t strip = 0; ranks.up > 0 && strip < size.strips; ++strip) {
      reduce_rows<E>(size, rows, strip * size.kStrip, ranks.up, block.z_down, p.needs_grad_sum(), g, block.strip,
                     sums.up + strip * ranks.up * size.kStrip, add);
    }
    if (ranks.down == 0) continue;
    const Rows x = rows_of<E>(p.x, size, p.compute, row, rows, block.floats, block.x);
    for (int64_t strip = 0; strip < size.strips; ++strip) {
      reduce_rows<E>(size, rows, strip * size.kStrip, ranks.down, block.gh_down, false, x, block.strip,
                     sums.down + strip * ranks.down * size.kStrip, add);
    }
  }
  if (expansion.stream) E::stream_fence();
}

// What finishing a strip needs room for: its part of (dim, rank) matrices, as they lie in memory.
template <class E>
struct FinishingRoom {
  float *product, *up;

  FinishingRoom(Pieces& pieces, const Sizes<E>& size)
      : product(pieces.take<float>(size.kStrip * size.rank)), up(pieces.take<float>(size.kStrip * size.rank)) {}
};

// Σ a·b, a rounded to the compute dtype.
template <class E>
double dot(const float* a, const float* b, int64_t count, DType compute) {
  typename E::Vector sum = E::zero();
  int64_t i = 0;
  for (; i + E::kLanes <= count; i += E::kLanes) {
    typename E::Vector v = E::load(a + i);
    if (compute == DType::kBFloat16) v = E::rounded_to_bfloat16(v);
    if (compute == DType::kFloat16) v = E::rounded_to_float16(v);
    sum = E::fma(v, E::load(b + i), sum);
  }
  float lanes[E::kLanes];
  E::store(lanes, sum);
  double total = 0;
  for (int lane = 0; lane < E::kLanes; ++lane) total += lanes[lane];
  for (; i < count; ++i) total += double(rounded(a[i], compute)) * b[i];
  return total;
}

// Writes one strip's part of the gradients from its sums; returns its part of a scalar scale's gradient. `scale` is
// null where it is 1.
template <class E>
double finish_strip(const AdapterBackward& p, const Sizes<E>& size, int64_t strip, const float* up_total,
                    const float* down_total, const float* scale, const FinishingRoom<E>& room) {
  const int64_t column = strip * size.kStrip, columns = least(size.kStrip, size.dim - column);
  for (int64_t j = 0; p.down_grad.data && j < size.rank; ++j) {
    write_floats<E>(down_total + j * size.kStrip, columns, at(p.down_grad, j * size.dim + column));
  }
  if (p.needs_up_product()) {
    for (int64_t j = 0; j < size.rank; j += E::kLanes) {
      transpose_rows<E>(reinterpret_cast<const Unit*>(up_total + j * size.kStrip), size.kStrip, size.kStrip,
                        reinterpret_cast<Unit*>(room.product + j), size.rank, size.rank - j);
    }
  }
  const float* grad_sums = up_total + (p.needs_up_product() ? size.rank * size.kStrip : 0);
  double scalar_grad = 0;
  if (p.scale_grad.data) read_floats<E>(at(p.up, column * size.rank), columns * size.rank, room.up);
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t d = column + i;
    float* product = room.product + i * size.rank;
    if (p.scale_grad.data) {
      double grad = p.up_bias.data ? double(load<float>(p.up_bias, d)) * grad_sums[i] : 0;
      grad += dot<E>(room.up + i * size.rank, product, size.rank, p.compute);
      if (p.scale_is_channel) store(p.scale_grad, d, grad);
      scalar_grad += grad;
    }
    if (p.up_bias_grad.data) store(p.up_bias_grad, d, (scale ? scale[d] : 1.0f) * grad_sums[i]);
    for (int64_t j = 0; scale && p.up_grad.data && j < size.rank; ++j) product[j] *= scale[d];
  }
  if (p.up_grad.data) write_floats<E>(room.product, columns * size.rank, at(p.up_grad, column * size.rank));
  return scalar_grad;
}

inline void write_scalar_grad(const AdapterBackward& p, int64_t strips, const double* parts) {
  if (!p.scale_grad.data || p.scale_is_channel) return;
  double sum = 0;
  for (int64_t strip = 0; strip < strips; ++strip) sum += parts[strip];
  store(p.scale_grad, 0, sum);
}

// Adds the chunks' sums of one strip up, in order, into the first chunk's; returns where they are.
template <class E>
ChunkSums sum_chunks(const Sizes<E>& size, const Cut& cut, const BackwardWeights<E>& weights, int64_t strip) {
  auto add = [](float* total, const float* part, int64_t count) {
    for (int64_t i = 0; i < count; i += E::kLanes) E::store(total + i, E::add(E::load(total + i), E::load(part + i)));
  };
  const int64_t up_count = weights.ranks.up * size.kStrip, down_count = weights.ranks.down * size.kStrip;
  ChunkSums total = weights.chunk(0, size);
  total.up += strip * up_count;
  total.down += strip * down_count;
  for (int64_t c = 1; c < cut.chunks; ++c) {
    const ChunkSums chunk = weights.chunk(c, size);
    add(total.up, chunk.up + strip * up_count, up_count);
    add(total.down, chunk.down + strip * down_count, down_count);
  }
  return total;
}

template <class E>
void backward_blocks(const AdapterBackward& p, ParallelFor parallel_for) {
  const Sizes<E> size(p);
  const int64_t sums_bytes = 2 * (p.rank + 1) * size.strips * size.kStrip * int64_t(sizeof(float));
  const Cut cut = cut_rows(p.rows, p.dim, p.rank, 3 * p.dim * int64_t(sizeof(typename E::Element)), kSummingRows,
                           most(1, least(kMostChunks, kSumsBytes / sums_bytes)));
  const auto weights = laid_out<BackwardWeights<E>>(Slot::kCall, p, size, cut);
  const float* scale = read_scale<E>(p, size.dim_panels, weights.scale) ? weights.scale : nullptr;
  read_vector<E>(Operand{}, 0, most(size.dim_panels, size.bias_size()), weights.zeros);
  for (int64_t d = 0; d < size.dim_panels; ++d) weights.ones[d] = 1;
  if (p.needs_hidden_grad()) {
    pack_first_backward<E>(p, size, scale, weights.first, parallel_for);
    if (p.x_grad.data) {
      pack_down<E>(p.down, p.compute, p.rank, p.dim, nullptr, weights.second, size.dim_panels, parallel_for);
    }
  }
  Expansion expansion{};
  expansion.dim = p.dim;
  expansion.bias = weights.zeros;
  expansion.column_factor = weights.ones;
  expansion.stream = p.x_grad.data && should_stream<E>(p.x_grad, p.rows, p.dim);
  if (p.x_grad.data) expect_writes(p.x_grad.data, p.rows * p.dim * element_size(p.x_grad.dtype));
  for_ranges(parallel_for, cut.chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) backward_chunk<E>(p, size, cut, chunk, weights, expansion);
  });

  const int64_t grain = quotient_up(kFinishWork, (p.rank + 1) * size.kStrip * cut.chunks);
  for_ranges(parallel_for, size.strips, grain, [&](int64_t begin, int64_t end) {
    const auto room = laid_out<FinishingRoom<E>>(Slot::kThread, size);
    for (int64_t strip = begin; strip < end; ++strip) {
      const ChunkSums total = sum_chunks<E>(size, cut, weights, strip);
      weights.scalar_grads[strip] = finish_strip<E>(p, size, strip, total.up, total.down, scale, room);
    }
  });
  write_scalar_grad(p, size.strips, weights.scalar_grads);
  if (p.down_bias_grad.data) {
    float* total = weights.chunk(0, size).hidden;
    for (int64_t c = 1; c < cut.chunks; ++c) {
      const float* hidden = weights.chunk(c, size).hidden;
      for (int64_t j = 0; j < p.rank; ++j) total[j] += hidden[j];
    }
    write_floats<E>(total, p.rank, p.down_bias_grad);
  }
}

}  // namespace
}  // namespace vitadapter::cpu
