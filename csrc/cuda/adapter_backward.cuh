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

// The first weight is up (dim, rank), the second down (rank, dim). A channel's scale is part of up; in float16, where
// their product may be too small for any number, of g, which has the size that a loss scale gives it. A scale of all
// channels waits for the middle. g comes in quads, as dropout_out is drawn for four columns at a time.
template <typename Math, typename X, int kRanks>
using AdapterBackwardForm =
    SandwichForm<Math, X, kRanks, Layout::kByDim, Layout::kByRank, true, !kSame<Math, Float16>, true>;

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

  VA_HOST_DEVICE static bool scales_grad(const AdapterBackward& p) {
    return kSame<Math, Float16> && p.scale.data && p.scale_is_channel;
  }
  // Whether g is not multiplied as it is.
  VA_HOST_DEVICE static bool changes_grad(const AdapterBackward& p) { return p.dropout_out.active() || scales_grad(p); }

  struct Worker : SandwichWorker<Form, Worker> {
    using Base = SandwichWorker<Form, Worker>;
    using Hidden = typename Base::Hidden;
    using Product = typename Base::Product;
    using Base::g, Base::t, Base::thread, Base::warp_row;

    const AdapterBackwardKernel& k;
    const AdapterBackward& p;
    uint64_t seed = 0;      // of both kinds of dropout
    int factors_place = 0;  // of this tile's

    VA_DEVICE explicit Worker(const AdapterBackwardKernel& kernel) : Base(kernel.job), k(kernel), p(kernel.p) {
      if (p.dropout.active() || p.dropout_out.active()) seed = uint64_t(*p.dropout.seed);
      if (p.scale_is_channel && !scales_grad(p)) this->stream.scale = p.scale;
    }

    // ---- the first product, g' · (scale ∘ up)

    VA_DEVICE void begin_tile(int64_t tile) {
      const int64_t first_row = tile * this->plan.tile_rows;
      prefetch_hidden(first_row);
      factors_place ^= this->plan.tile_rows;
      if (!p.drop_path.active()) return;
      if (thread < this->plan.tile_rows) row_factors()[thread] = p.sample_factor<float>(first_row + thread);
      if (this->job.changes_x) sync_threads();
    }

    // The middle of one warp may still read a tile's factors when another warp begins the next tile.
    VA_DEVICE float* row_factors() const { return this->row_factors_of_two_tiles + factors_place; }

    // The middle would wait for the tile's hidden layer: meanwhile it comes to the L2 cache.
    VA_DEVICE void prefetch_hidden(int64_t first_row) const {
      const int64_t left = p.rows - first_row, rows = left < this->plan.tile_rows ? left : this->plan.tile_rows;
      const char* const from = static_cast<const char*>(p.hidden) + first_row * p.rank * 4;
      for (int64_t i = 128 * thread; i < rows * p.rank * 4; i += 128 * thread_count()) prefetch(from + i);
    }

    // dropout_out is drawn once for all ranks. drop_path goes along: g is rounded after all of its factors, or none.
    VA_DEVICE void begin_chunk(int chunk, int64_t warp_first_row) {
      const int64_t first_row = warp_first_row - warp_row;
      this->change_chunk([&](float (&quad)[4], int row, int column) {
        const int whole_column = chunk * S::kChunk + column;
        const float sample = p.drop_path.active() ? row_factors()[row] : 1.0f;
        float factors[4] = {sample, sample, sample, sample};
        drop_out(factors, p.dropout_out, seed, first_row + row, whole_column);
        VA_UNROLL
        for (int e = 0; e < 4; ++e) {
          if (scales_grad(p) && whole_column + e < p.dim) factors[e] *= load<float>(p.scale, whole_column + e);
          quad[e] *= factors[e];
        }
      });
    }

    // ---- the middle

    // gh = scale ∘ drop_path ∘ that ∘ dropout ∘ act'(hidden), into shared memory; gh and z to where they are asked for.
    VA_DEVICE void middle(Hidden& grads, int block, int64_t first_row) {
      float hidden[S::kRowTiles][S::kRankTiles][4];
      load_all_hidden(hidden, block, first_row);
      const float scale = p.scale_is_channel ? 1.0f : p.scale.data ? load<float>(p.scale, 0) : k.scale_value;
      const bool has_factors = p.drop_path.active() && this->job.x.data && !this->job.changes_x;
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
        const float sample = has_factors ? scale * row_factors()[warp_row + tile_row] : scale;
        // Ranks that are not there must be 0, whatever g holds.
        VA_UNROLL
        for (int i = 0; i < 4; ++i) {
          grad[i] = rank + i < p.rank ? sample * factors[i] * grad[i] : 0.0f;
          z[i] = rank + i < p.rank ? factors[i] * z[i] : 0.0f;
        }
        store_quad<Math>(element<Math>(to, warp_row + tile_row, column), grad);
        if (row >= p.rows || rank >= k.padded_rank) return;
        this->keep(k.hidden_grad, k.padded_rank, row, rank, grad);
        this->keep(k.z, k.padded_rank, row, rank, z);
      });
    }

    // What is not there is 0.
    VA_DEVICE void load_all_hidden(Hidden& to, int block, int64_t first_row) const {
      this->for_each_quad(block, [&](int m, int tile, int half, int, int rank) {
        const int64_t row = first_row + 16 * m + 8 * half + g;
        float quad[4];
        this->load_hidden(quad, p.hidden, k.hidden_aligned, row, rank);
        VA_UNROLL
        for (int i = 0; i < 4; ++i) to[m][tile + i / 2][2 * half + i % 2] = quad[i];
      });
    }

    // ---- the end: gx = gh · down, and g where x is the residual

    VA_DEVICE void finish(Product& product, int chunk, unsigned char*, int64_t first_row) {
      // gx has x's dtype: g's, or a smaller one.
      if (p.x_grad.dtype == X::kDType) return this->template write<X>(product, chunk, first_row);
      if constexpr (kSame<X, Float32>) this->write_narrow(product, chunk, first_row);
    }
  };
};

}  // namespace vitadapter::cuda
