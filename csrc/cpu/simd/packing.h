// How do weights become the right side of a product? Copied once a call into the panels that `project` and `expand` go
// through (products.h), in the compute dtype; large matrices by all threads.
#pragma once

#include "../memory.h"
#include "../parallel.h"
#include "products.h"

namespace vitadapter::cpu {
namespace {

// Elements whose packing is worth a thread.
constexpr int64_t kPackingGrain = 1 << 15;

// One row of a weight matrix as an operand, times `factor` where there is one (pairs round the product, floats the
// weight).
template <class E>
void read_weights(Operand from, DType compute, const float* factor, int64_t count, int64_t padded, float* floats,
                  typename E::Element* to) {
  if (!factor) return read_operand<E>(from, compute, count, padded, floats, to);
  read_floats<E>(from, count, floats);
  for (int64_t i = count; i < padded; ++i) floats[i] = 0;
  for (int64_t i = 0; i < padded; i += E::kLanes) {
    E::store(floats + i, E::mul(rounded_operand<E>(E::load(floats + i), compute), E::set(*factor)));
  }
  factored_to_elements<E>(floats, compute, count, padded, to);
}

template <class E>
struct PackingRoom {
  float* floats;
  typename E::Element* rows;
  int64_t stride;

  PackingRoom(Pieces& pieces, int64_t longest)
      : floats(pieces.take<float>(E::kLanes * longest)),
        rows(pieces.take<typename E::Element>(E::kLanes * longest)),
        stride(longest) {}
};

// Panels of W (depth, columns), units going down its depth; row d times row_factors[d] where there are factors.
template <class E>
void pack_down(Operand w, DType compute, int64_t depth, int64_t columns, const float* row_factors, Unit* to,
               int64_t panel_columns, ParallelFor parallel_for) {
  using Vector = typename E::Vector;
  constexpr int64_t kStep = E::kLanes * E::kPerUnit;
  const Panels<E> panels{to, quotient_up(depth, E::kPerUnit), panel_columns};
  const int64_t padded = multiple_of(kStep, columns);
  for_ranges(parallel_for, panels.units, quotient_up(kPackingGrain, columns + 1), [&](int64_t begin, int64_t end) {
    const auto room = laid_out<PackingRoom<E>>(Slot::kThread, padded);
    for (int64_t u = begin; u < end; ++u) {
      const typename E::Element *first = room.rows, *second = nullptr;
      for (int64_t d = u * E::kPerUnit; d < least((u + 1) * E::kPerUnit, depth); ++d) {
        typename E::Element* row = room.rows + (d - u * E::kPerUnit) * room.stride;
        read_weights<E>(at(w, d * columns), compute, row_factors ? row_factors + d : nullptr, columns, padded,
                        room.floats, row);
        if (d > u * E::kPerUnit) second = row;
      }
      for (int64_t column = 0; column < panel_columns; column += kStep) {
        Vector units[E::kPerUnit];
        if (column < padded) {
          E::interleave(first + column, second ? second + column : nullptr, units);
        } else {
          VA_UNROLL
          for (int v = 0; v < E::kPerUnit; ++v) units[v] = E::zero();
        }
        const int64_t p = column / panels.kWidth, width = panels.vectors(p) * E::kLanes;
        Unit* out = to + p * panels.kWidth * panels.units + u * width + column % panels.kWidth;
        VA_UNROLL
        for (int v = 0; v < E::kPerUnit; ++v) {
          if (column + v * E::kLanes < panel_columns) E::store(out + v * E::kLanes, units[v]);
        }
      }
    }
  });
}

// Panels of Wᵀ for W (columns, depth), units going along its rows.
template <class E>
void pack_across(Operand w, DType compute, int64_t columns, int64_t depth, Unit* to, int64_t panel_columns,
                 ParallelFor parallel_for) {
  constexpr int64_t kStep = E::kLanes * E::kPerUnit;
  const Panels<E> panels{to, quotient_up(depth, E::kPerUnit), panel_columns};
  const int64_t padded = multiple_of(kStep, depth);
  const bool ready = is_element<E>(w.dtype, compute) && depth % E::kPerUnit == 0;
  const int64_t grain = quotient_up(kPackingGrain, (depth + 1) * E::kLanes);
  for_ranges(parallel_for, panel_columns / E::kLanes, grain, [&](int64_t begin, int64_t end) {
    const auto room = laid_out<PackingRoom<E>>(Slot::kThread, padded);
    for (int64_t column = begin * E::kLanes; column < end * E::kLanes; column += E::kLanes) {
      const typename E::Element* rows = room.rows;
      int64_t stride = room.stride;
      // Whole vectors are read, so the last rows are copied.
      if (ready && (column + E::kLanes - 1) * depth + padded <= columns * depth) {
        rows = static_cast<const typename E::Element*>(at(w, column * depth).data);
        stride = depth;
      } else if (depth % E::kPerUnit == 0) {
        const int64_t count = most(0, least(E::kLanes, columns - column)) * depth;
        read_operand<E>(at(w, least(column, columns) * depth), compute, count, E::kLanes * padded, room.floats,
                        room.rows);
        stride = depth;
      } else {
        for (int64_t i = 0; i < E::kLanes; ++i) {
          typename E::Element* row = room.rows + i * room.stride;
          if (column + i < columns) {
            read_operand<E>(at(w, (column + i) * depth), compute, depth, padded, room.floats, row);
          } else {
            memset(row, 0, padded * sizeof *row);
          }
        }
      }
      const int64_t p = column / panels.kWidth, width = panels.vectors(p) * E::kLanes;
      Unit* out = to + p * panels.kWidth * panels.units + column % panels.kWidth;
      transpose_rows<E>(reinterpret_cast<const Unit*>(rows), stride / E::kPerUnit, panels.units, out, width);
    }
  });
}

}  // namespace
}  // namespace vitadapter::cpu
