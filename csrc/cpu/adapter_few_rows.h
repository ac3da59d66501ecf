// The adapter op on few rows and a wide hidden layer, where time goes into the weights and not into the rows: weights
// are used where they lie if their form allows it, and threads share out ranks and columns instead of rows.
//
// Traffic: each weight is read once in each direction (where a product needs its other orientation, by another order of
// the loops), each weight gradient is written once. Weights that are not in the engine's form are converted on the way.
#pragma once

#include "adapter_backward.h"
#include "adapter_forward.h"

namespace vitadapter::cpu {
namespace {

// With more rows, or more than so many for each rank, packing the weights and (backward) sums of their gradients a
// chunk are a small part of the time.
constexpr int64_t kFewRows = 48, kMostFewRows = 512;

inline bool has_few_rows(const AdapterForward& p) {
  return p.rank > kNarrowRank && p.rows <= most(kFewRows, least(p.rank, kMostFewRows));
}
inline bool has_few_rows(const AdapterBackward& p) {
  return p.rank > kNarrowRank && p.rows <= most(kFewRows, least(2 * p.rank, kMostFewRows));
}

// How many items, each of so many weights, are worth a thread.
inline int64_t weights_grain(int64_t weights_per_item) { return quotient_up(kPackingGrain, weights_per_item); }

// Rows [begin, begin + count) of a weight matrix along its depth, where they lie or converted into `room`.
template <class E>
Rows weight_rows(Operand w, DType compute, int64_t begin, int64_t count, int64_t depth, float* floats,
                 typename E::Element* room) {
  const int64_t padded = multiple_of(E::kLanes * E::kPerUnit, depth);
  if (is_element<E>(w.dtype, compute) && padded == depth) {
    return {static_cast<const Unit*>(at(w, begin * depth).data), depth / E::kPerUnit};
  }
  for (int64_t i = 0; i < count; ++i) {
    read_operand<E>(at(w, (begin + i) * depth), compute, depth, padded, floats, room + i * padded);
  }
  return {reinterpret_cast<const Unit*>(room), padded / E::kPerUnit};
}

// What a thread converts weights into, and the sums of one panel of columns.
template <class E>
struct FewRowsRoom {
  float *floats, *sums;
  typename E::Element* weights;

  FewRowsRoom(Pieces& pieces, const Sizes<E>& size, int64_t rows)
      : floats(pieces.take<float>(most(size.dim_padded, size.rank_padded))),
        sums(pieces.take<float>(rows * Panels<E>::kWidth)),
        weights(pieces.take<typename E::Element>(
            most(kRanksTogether * size.dim_padded, Panels<E>::kWidth * size.rank_padded))) {}

  static constexpr int64_t kRanksTogether = E::kLanes / 2;
};

template <class E>
struct FewRowsForward {
  ForwardBlock<E> block;
  typename E::Element* z;  // with rows of whole vectors
  float *down_bias, *up_bias, *scale;

  FewRowsForward(Pieces& pieces, const AdapterForward& p, const Sizes<E>& size)
      : block(pieces, p, size, p.rows),
        z(pieces.take<typename E::Element>(p.rows * size.rank_padded)),
        down_bias(pieces.take<float>(size.bias_size())),
        up_bias(pieces.take<float>(size.dim_panels + E::kLanes)),
        scale(pieces.take<float>(size.dim_panels)) {}
};

template <class E>
void forward_few_rows(const AdapterForward& p, ParallelFor parallel_for) {
  using Room = FewRowsRoom<E>;
  const Sizes<E> size(p);
  const auto all = laid_out<FewRowsForward<E>>(Slot::kCall, p, size);
  read_vector<E>(p.down_bias, p.rank, size.bias_size(), all.down_bias);
  read_vector<E>(p.up_bias, p.dim, size.dim_panels + E::kLanes, all.up_bias);
  read_scale<E>(p, size.dim_panels, all.scale);
  const Rows x = rows_of<E>(p.x, size, p.compute, 0, p.rows, all.block.floats, all.block.x);

  const int64_t groups = quotient_up(p.rank, Room::kRanksTogether);
  for_ranges(parallel_for, groups, weights_grain(Room::kRanksTogether * p.dim), [&](int64_t begin, int64_t end) {
    const auto room = laid_out<Room>(Slot::kThread, size, p.rows);
    for (int64_t j = begin * Room::kRanksTogether; j < least(end * Room::kRanksTogether, p.rank);
         j += Room::kRanksTogether) {
      const int64_t ranks = least(Room::kRanksTogether, p.rank - j);
      const Rows down = weight_rows<E>(p.down, p.compute, j, ranks, p.dim, room.floats, room.weights);
      project_narrow<E>(p.rows, x.units, x.stride, ranks, down.units, down.stride, size.dim_padded / E::kPerUnit,
                        all.down_bias + j, all.block.hidden + j, size.middle_stride, Ahead{});
    }
  });
  activate_rows<E>(p, size, 0, p.rows, all.block);
  for (int64_t i = 0; i < p.rows; ++i) {
    typename E::Element* row = all.z + i * size.rank_padded;
    memcpy(row, all.block.z + i * size.middle_stride, p.rank * sizeof *row);
    for (int64_t j = p.rank; j < size.rank_padded; ++j) row[j] = 0;
  }

  Expansion expansion{};
  expansion.dim = p.dim;
  expansion.base = p.residual;
  expansion.out = p.y;
  expansion.bias = all.up_bias;
  expansion.column_factor = all.scale;
  set_factors<E>(p, size, 0, p.rows, all.block, expansion);
  constexpr int64_t kWidth = Panels<E>::kWidth;
  const int64_t z_stride = size.rank_padded / E::kPerUnit;
  for_ranges(parallel_for, size.dim_panels / kWidth, weights_grain(kWidth * p.rank), [&](int64_t begin, int64_t end) {
    const auto room = laid_out<Room>(Slot::kThread, size, p.rows);
    for (int64_t column = begin * kWidth; column < end * kWidth; column += kWidth) {
      const int64_t columns = least(kWidth, p.dim - column);
      const Rows up = weight_rows<E>(p.up, p.compute, column, columns, p.rank, room.floats, room.weights);
      project_narrow<E>(p.rows, reinterpret_cast<const Unit*>(all.z), z_stride, columns, up.units, up.stride, z_stride,
                        all.up_bias + column, room.sums, kWidth, Ahead{});
      for (int64_t i = 0; i < p.rows; ++i) {
        typename E::Vector sum[E::kTileVectors];
        VA_UNROLL
        for (int v = 0; v < E::kTileVectors; ++v) sum[v] = E::load(room.sums + i * kWidth + v * E::kLanes);
        GeneralFinish<E>::row(expansion, i, column, sum);
      }
    }
  });
}

template <class E>
struct FewRowsBackward {
  BackwardBlock<E> block;
  typename E::Element* scaled;
  Unit *first, *second;
  float *scale, *zeros, *ones, *hidden_sums;
  double* scalar_grads;

  FewRowsBackward(Pieces& pieces, const AdapterBackward& p, const Sizes<E>& size, bool copy_up, bool copy_down)
      : block(pieces, p, size, p.rows),
        scaled(pieces.take<typename E::Element>(p.scale.data || p.scale_value != 1 ? p.rows * size.dim_padded : 0)),
        first(pieces.take<Unit>(copy_up ? size.first_size() : 0)),
        second(pieces.take<Unit>(copy_down ? Panels<E>::size(size.rank_units, size.dim_panels) : 0)),
        scale(pieces.take<float>(size.dim_panels)),
        zeros(pieces.take<float>(most(size.dim_panels, size.bias_size()))),
        ones(pieces.take<float>(size.dim_panels)),
        hidden_sums(pieces.take<float>(size.bias_size())),
        scalar_grads(pieces.take<double>(size.strips)) {}
};

// A strip's sums, and what reducing and finishing it need.
template <class E>
struct StripRoom {
  float* sums;
  Unit* strip;
  FinishingRoom<E> finishing;

  StripRoom(Pieces& pieces, const Sizes<E>& size, int64_t rows)
      : sums(pieces.take<float>((2 * size.rank + 1 + E::kLanes) * size.kStrip)),
        strip(pieces.take<Unit>(quotient_up(rows, E::kPerUnit) * size.kStrip)),
        finishing(pieces, size) {}
};

template <class E>
void backward_few_rows(const AdapterBackward& p, ParallelFor parallel_for) {
  constexpr int64_t kWidth = Panels<E>::kWidth;
  const Sizes<E> size(p);
  // A product goes through weights as they lie if their rows are whole vectors.
  const bool copy_up =
      p.needs_hidden_grad() && (!is_element<E>(p.up.dtype, p.compute) || size.rank != size.rank_padded);
  const bool copy_down = p.x_grad.data && (!is_element<E>(p.down.dtype, p.compute) || size.dim % kWidth != 0);
  const auto all = laid_out<FewRowsBackward<E>>(Slot::kCall, p, size, copy_up, copy_down);
  const float* scale = read_scale<E>(p, size.dim_panels, all.scale) ? all.scale : nullptr;
  read_vector<E>(Operand{}, 0, most(size.dim_panels, size.bias_size()), all.zeros);
  for (int64_t d = 0; d < size.dim_panels; ++d) all.ones[d] = 1;
  const BackwardBlock<E>& block = all.block;
  const Rows g = dropped_rows<E>(p, size, 0, p.rows, nullptr, block.floats, block.factors, block.g);

  if (p.needs_hidden_grad()) {
    const Rows scaled = scale ? dropped_rows<E>(p, size, 0, p.rows, scale, block.floats, block.factors, all.scaled) : g;
    const int64_t columns = multiple_of(E::kLanes, p.rank), panels = quotient_up(columns, kWidth);
    if (copy_up) pack_down<E>(p.up, p.compute, p.dim, p.rank, nullptr, all.first, columns, parallel_for);
    for_ranges(parallel_for, panels, weights_grain(kWidth * p.dim), [&](int64_t begin, int64_t end) {
      const Panels<E> packed{all.first, size.dim_units, columns};
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t column = panel * kWidth, vectors = packed.vectors(panel);
        auto project_onto = [&](auto up) {
          project_vectors<E>(vectors, p.rows, scaled.units, scaled.stride, up, size.dim_units, all.zeros,
                             block.gh + column, size.middle_stride, Ahead{});
        };
        if (copy_up) {
          project_onto(UnitRows<E>{packed.panel(panel), vectors * E::kLanes});
        } else {
          project_onto(InterleavedRows<E>{static_cast<const typename E::Element*>(p.up.data) + column, p.rank, p.dim});
        }
      }
    });
  }
  middle_gradients<E>(p, size, 0, p.rows, block);
  if (p.down_bias_grad.data) {
    memset(all.hidden_sums, 0, size.bias_size() * sizeof(float));
    add_rows<E>(size, p.rows, block.gh, all.hidden_sums);
    write_floats<E>(all.hidden_sums, p.rank, p.down_bias_grad);
  }

  if (p.x_grad.data) {
    Expansion expansion{};
    expansion.dim = p.dim;
    if (p.residual_is_x) expansion.base = p.grad;
    expansion.out = p.x_grad;
    expansion.bias = all.zeros;
    expansion.column_factor = all.ones;
    const Unit* gh = reinterpret_cast<const Unit*>(block.gh_along);
    const int64_t gh_stride = size.middle_stride / E::kPerUnit;
    const Panels<E> packed{all.second, size.rank_units, size.dim_panels};
    if (copy_down) pack_down<E>(p.down, p.compute, p.rank, p.dim, nullptr, all.second, size.dim_panels, parallel_for);
    for_ranges(parallel_for, packed.count(), weights_grain(kWidth * p.rank), [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t column = panel * kWidth;
        auto expand_by = [&](auto down) {
          for (int64_t row = 0; row < p.rows;) {
            row +=
                expand_rows<E, GeneralFinish<E>>(expansion, p.rows, gh, gh_stride, down, size.rank_units, row, column);
          }
        };
        if (copy_down) {
          expand_by(UnitRows<E>{packed.panel(panel), kWidth});
        } else {
          expand_by(InterleavedRows<E>{static_cast<const typename E::Element*>(p.down.data) + column, p.dim, p.rank});
        }
      }
    });
  }

  const SumRanks ranks(p);
  if (ranks.up + ranks.down == 0) return;
  const Rows x = ranks.down > 0 ? rows_of<E>(p.x, size, p.compute, 0, p.rows, block.floats, block.x) : g;
  for_ranges(parallel_for, size.strips, weights_grain(2 * size.kStrip * p.rank), [&](int64_t begin, int64_t end) {
    const auto room = laid_out<StripRoom<E>>(Slot::kThread, size, p.rows);
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t column = strip * size.kStrip;
      float *up = room.sums, *down = up + ranks.up * size.kStrip;
      if (ranks.up > 0) {
        reduce_rows<E>(size, p.rows, column, ranks.up, block.z_down, p.needs_grad_sum(), g, room.strip, up, false);
      }
      if (ranks.down > 0) {
        reduce_rows<E>(size, p.rows, column, ranks.down, block.gh_down, false, x, room.strip, down, false);
      }
      all.scalar_grads[strip] = finish_strip<E>(p, size, strip, up, down, scale, room.finishing);
    }
  });
  write_scalar_grad(p, size.strips, all.scalar_grads);
}

}  // namespace
}  // namespace vitadapter::cpu
