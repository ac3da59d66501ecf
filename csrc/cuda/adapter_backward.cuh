// The adapter's input gradient in one kernel; the mathematics is in ../common/adapter.h, the way it goes in
// sandwich.cuh: it is the forward pass with the weights in each other's place, and another middle.
//
// Beside gx it writes what the weights' gradients are made of, in the form that adapter_reduction.cuh reads: gh and,
// for operands of 2 bytes, z, one after the other in workspace. What nobody asks for is not done: without gx the second
// pass, without all that needs gh the first one too.
//
// The traffic, in device memory: g once, gx once, the saved hidden layer once (rank floats a row), gh and z once. At
// N = 12,608, D = 768, rank 64 in bfloat16 that is 38.7 + 3.2 + 3.2 MB, 10.5 µs at 4.3 TB/s.
//
// Not yet run on a GPU.
#pragma once

#include "activation.cuh"
#include "adapter.h"
#include "sandwich.cuh"

namespace vitadapter::cuda {

// The first weight is up (dim, rank), times the scale of each row; the second down (rank, dim). g comes in quads, as
// dropout_out is drawn for four columns at a time.
template <typename Math, typename X, int kRanks>
using AdapterBackwardForm = SandwichForm<Math, X, kRanks, true, false, true, true>;

// X: how g is stored.
template <typename Math, typename X, int kRanks>
struct AdapterBackwardKernel {
  using Form = AdapterBackwardForm<Math, X, kRanks>;
  using S = Shape<Math, kRanks>;
  static constexpr int kMaxThreads = S::kMaxThreads, kMinBlocks = 1;
  static constexpr bool kNeedsSm80 = true;

  Sandwich job;
  AdapterBackward p;
  float scale_value;
  bool hidden_aligned;  // rows begin at multiples of four floats
  // (rows, padded_rank) as operands of Math, with zeros in the padding; null: not asked for.
  void *hidden_grad, *z;
  int padded_rank;

  VA_DEVICE void operator()() const { Worker(*this).run(); }

  struct Worker : SandwichWorker<Form, Worker> {
    using Base = SandwichWorker<Form, Worker>;
    using Hidden = typename Base::Hidden;
    using Product = typename Base::Product;
    using Base::g, Base::t, Base::thread, Base::warp_row;

    const AdapterBackwardKernel& k;
    const AdapterBackward& p;
    uint64_t seed = 0;  // of both kinds of dropout

    VA_DEVICE explicit Worker(const AdapterBackwardKernel& kernel) : Base(kernel.job), k(kernel), p(kernel.p) {
      if (p.dropout.active() || p.dropout_out.active()) seed = uint64_t(*p.dropout.seed);
      this->stream.scale = {p.scale, p.scale_is_channel, k.scale_value};
    }

    // ---- the first product, g' · (scale ∘ up)

    VA_DEVICE void begin_tile(int64_t tile) {
      const int64_t first_row = tile * this->plan.tile_rows;
      prefetch_hidden(first_row);
      // drop_path alone is left to the middle. With dropout_out it is part of what g is multiplied by before it is
      // rounded.
      if (!p.dropout_out.active() || !p.drop_path.active()) return;
      if (thread < this->plan.tile_rows) this->row_factors[thread] = p.sample_factor<float>(first_row + thread);
      sync_threads();
    }

    // The middle would wait for the tile's hidden layer: meanwhile it comes to the L2 cache.
    VA_DEVICE void prefetch_hidden(int64_t first_row) const {
      const int64_t left = p.rows - first_row, rows = left < this->plan.tile_rows ? left : this->plan.tile_rows;
      const char* const from = static_cast<const char*>(p.hidden) + first_row * p.rank * 4;
      for (int64_t i = 128 * thread; i < rows * p.rank * 4; i += 128 * thread_count()) prefetch(from + i);
    }

    struct DroppedLeft : Base::Left {
      static constexpr bool kRolled = true;
      const Worker& worker;
      int64_t first_row;
      int first_column;

      VA_DEVICE void load(float (&to)[4], int row, int column) const {
        Base::Left::load(to, row, column);
        const float sample = worker.p.drop_path.active() ? worker.row_factors[worker.warp_row + row] : 1.0f;
        float factors[4] = {sample, sample, sample, sample};
        drop_out(factors, worker.p.dropout_out, worker.seed, first_row + row, first_column + column);
        VA_UNROLL
        for (int i = 0; i < 4; ++i) to[i] *= factors[i];
      }
    };

    template <typename Right>
    VA_DEVICE void multiply_first(Hidden& hidden, const Right& right, int chunk, int64_t first_row) {
      const typename Base::Left left{this->place(this->reading), warp_row};
      if (p.dropout_out.active()) {
        multiply<Math, S::kChunk>(hidden, DroppedLeft{left, *this, first_row, chunk * S::kChunk}, right);
      } else {
        multiply<Math, S::kChunk>(hidden, left, right);
      }
    }

    // ---- the middle

    // gh = drop_path ∘ that ∘ dropout ∘ act'(hidden), into shared memory; gh and z to where they are asked for.
    VA_DEVICE void middle(Hidden& grads, int block, int64_t first_row) {
      float hidden[S::kRowTiles][S::kRankTiles][4];
      load_hidden(hidden, block, first_row);
      const auto at = [](Hidden& values, int i) -> float& {
        return values[i / 4 / S::kRankTiles][i / 4 % S::kRankTiles][i % 4];
      };
      differentiate_all<S::kRowTiles * S::kRankTiles * 4>(
          p.activation, [&](int i) -> float& { return at(hidden, i); }, [&](int i) -> float& { return at(grads, i); });
      const Panel<S::kRankBytes> to = this->middle_panel(block);
      this->for_each_quad(block, [&](int m, int tile, int half, int column, int rank) {
        const int tile_row = 16 * m + 8 * half + g;
        const int64_t row = first_row + tile_row;
        float grad[4], z[4], factors[4] = {1.0f, 1.0f, 1.0f, 1.0f};
        take_quad(grad, grads[m], tile, half);
        take_quad(z, hidden[m], tile, half);
        drop_out(factors, p.dropout, seed, row, rank);
        const float sample = p.dropout_out.active() ? 1.0f : p.sample_factor<float>(row);
        // Ranks that are not there must be 0, whatever g holds.
        VA_UNROLL
        for (int i = 0; i < 4; ++i) {
          grad[i] = rank + i < p.rank ? sample * factors[i] * grad[i] : 0.0f;
          z[i] = rank + i < p.rank ? factors[i] * z[i] : 0.0f;
        }
        store_quad<Math>(element<Math>(to, warp_row + tile_row, column), grad);
        if (row >= p.rows || rank >= k.padded_rank) return;
        keep(k.hidden_grad, row, rank, grad);
        keep(k.z, row, rank, z);
      });
    }

    // What is not there is 0.
    VA_DEVICE void load_hidden(Hidden& to, int block, int64_t first_row) const {
      this->for_each_quad(block, [&](int m, int tile, int half, int, int rank) {
        const int64_t row = first_row + 16 * m + 8 * half + g;
        const int inside = row < p.rows ? int(p.rank) - rank : 0;
        const float* const from = static_cast<const float*>(p.hidden) + row * p.rank + rank;
        float quad[4] = {};
        if (k.hidden_aligned) {
          if (inside > 0) load_quad<Float32>(quad, from);
        } else {
          VA_UNROLL
          for (int i = 0; i < 4; ++i) quad[i] = i < inside ? from[i] : 0.0f;
        }
        VA_UNROLL
        for (int i = 0; i < 4; ++i) to[m][tile + i / 2][2 * half + i % 2] = quad[i];
      });
    }

    // For the reduction, which sums biases in float32 where it may: TF32 is rounded later.
    VA_DEVICE void keep(void* matrix, int64_t row, int rank, const float (&quad)[4]) const {
      using Kept = std::conditional_t<kSame<Math, Tf32>, Float32, Math>;
      if (!matrix) return;
      store_quad<Kept>(static_cast<char*>(matrix) + (row * k.padded_rank + rank) * Kept::kBytes, quad);
    }

    // ---- the end: gx = gh · down, and g where x is the residual

    VA_DEVICE void finish(Product& product, int chunk, unsigned char*, int64_t first_row) {
      // gx has x's dtype: g's, or a smaller one.
      if (p.x_grad.dtype == X::kDType) return this->template write<X>(product, chunk, first_row);
      if constexpr (kSame<X, Float32> && !kSame<Math, Float16> && !kSame<Math, Tf32>) {
        if (p.x_grad.dtype == DType::kBFloat16) return this->template write<BFloat16>(product, chunk, first_row);
      }
      if constexpr (kSame<X, Float32> && !kSame<Math, BFloat16> && !kSame<Math, Tf32>) {
        this->template write<Float16>(product, chunk, first_row);
      }
    }
  };
};

}  // namespace vitadapter::cuda
