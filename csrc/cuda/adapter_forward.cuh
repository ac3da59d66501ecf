// The adapter's forward pass in one kernel; the mathematics is in ../common/adapter.h, the way it goes in sandwich.cuh.
// ARC's forward pass and its gradient of x are this kernel, too (arc.cu): which way the first weight lies, and what
// happens in the middle, is asked once a chunk or a tile, where a kernel of its own would be a quarter more code.
//
// The traffic, in device memory: x once, the residual once if it is another tensor, y once, the hidden layer (rank
// floats a row) once if it is kept. That is the floor too: for N rows of D elements of b bytes 2 · N · D · b, so 38.7
// MB at N = 12,608, D = 768 in bfloat16, 9 µs at 4.3 TB/s; the products are 4 · N · D · rank operations, 2.5 G at rank
// 64, 3 µs at 790 TFLOP/s.
//
// Not yet run on a GPU. By the count of instructions (sm_90, bfloat16, rank 64) it is not the memory that binds but
// issue and latency: some 60 to 70 % of the copy rate is what to expect of this version.
#pragma once

#include "activation.cuh"
#include "adapter.h"
#include "sandwich.cuh"

namespace vitadapter::cuda {

// The first weight is down (rank, dim), or ARC's basis (dim, rank); the second is up (dim, rank), or the basis again.
// ldmatrix cannot bring float32: such an x comes in quads.
template <typename Math, typename X, int kRanks>
using AdapterForwardForm =
    SandwichForm<Math, X, kRanks, Layout::kEither, Layout::kByDim, !kSame<X, Math>, false, false>;

template <typename Math, typename X, int kRanks>
struct AdapterForwardKernel {
  using Form = AdapterForwardForm<Math, X, kRanks>;
  using S = Shape<Math, kRanks>;
  static constexpr int kMaxThreads = S::kMaxThreads, kMinBlocks = 1;
  static constexpr bool kNeedsSm80 = true;

  Sandwich job;
  AdapterOrArcForward p;
  float scale_value;
  bool hidden_aligned;  // its rows begin at multiples of four floats
  int padded_rank;      // the row stride of what ARC's gradient keeps

  VA_DEVICE void operator()() const { Worker(*this).run(); }

  struct Worker : SandwichWorker<Form, Worker> {
    using Base = SandwichWorker<Form, Worker>;
    using Hidden = typename Base::Hidden;
    using Product = typename Base::Product;
    using Base::column_warp, Base::g, Base::t, Base::thread, Base::warp_row;

    const AdapterForwardKernel& k;
    const AdapterOrArcForward& p;
    uint64_t seed = 0;                       // of both kinds of dropout
    uint32_t scale_bits = 0, bias_bits = 0;  // of the next chunk's column number `thread`

    VA_DEVICE explicit Worker(const AdapterForwardKernel& kernel) : Base(kernel.job), k(kernel), p(kernel.p) {
      if (p.dropout.active() || p.dropout_out.active()) seed = uint64_t(*p.dropout.seed);
    }

    // ---- the scale and bias of each column of y

    VA_DEVICE void fetch_columns(int chunk) {
      const int column = chunk * S::kChunk + thread;
      if (!this->stream.second || thread >= S::kChunk || column >= p.dim) return;
      if (p.scale.data) scale_bits = load_bits(p.scale, p.scale_is_channel ? column : 0);
      if (p.up_bias.data) bias_bits = load_bits(p.up_bias, column);
    }

    VA_DEVICE void store_columns(unsigned char* place) const {
      if (!this->stream.second || thread >= S::kChunk) return;
      float* const columns = reinterpret_cast<float*>(place + S::kWeightBytes);
      const float scale = p.scale.data ? value_of(scale_bits, p.scale.dtype) : k.scale_value;
      columns[thread] = scale;
      columns[S::kChunk + thread] = p.up_bias.data ? scale * value_of(bias_bits, p.up_bias.dtype) : 0.0f;
    }

    // ---- the middle

    // z = dropout ∘ act(hidden + bias), or ARC's dropout ∘ (hidden ∘ rescale), into shared memory; the hidden layer to
    // where it is kept.
    VA_DEVICE void middle(Hidden& hidden, int block, int64_t first_row) {
      const Operand each_rank = p.is_gradient ? Operand{} : p.is_arc() ? p.rescale : p.down_bias;
      VA_UNROLL
      for (int tile = 0; tile < S::kRankTiles && each_rank.data; ++tile) {
        VA_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int rank = block * S::kBlock + quad_order((column_warp * S::kRankTiles + tile) * 8 + 2 * t + i);
          if (rank >= p.rank) continue;
          const float value = value_of(load_bits(each_rank, rank), each_rank.dtype);
          const float factor = p.is_arc() ? value : 1.0f, bias = p.is_arc() ? 0.0f : value;
          VA_UNROLL
          for (int m = 0; m < S::kRowTiles; ++m) {
            hidden[m][tile][i] = factor * hidden[m][tile][i] + bias;
            hidden[m][tile][i + 2] = factor * hidden[m][tile][i + 2] + bias;
          }
        }
      }
      if (p.hidden) {
        this->for_each_quad(block, [&](int m, int tile, int half, int, int rank) {
          const int64_t row = first_row + 16 * m + 8 * half + g;
          float quad[4];
          take_quad(quad, hidden[m], tile, half);
          if (row < p.rows && rank < p.rank) {
            float* const kept = static_cast<float*>(p.hidden) + row * p.rank + rank;
            Base::template store_row<Float32>(kept, k.hidden_aligned, int(p.rank) - rank, quad);
          }
        });
      }
      activate_all<S::kRowTiles * S::kRankTiles * 4>(
          p.activation, [&](int i) -> float& { return hidden[i / 4 / S::kRankTiles][i / 4 % S::kRankTiles][i % 4]; });
      const Panel<S::kRankBytes> z = this->middle_panel(block);
      this->for_each_quad(block, [&](int m, int tile, int half, int column, int rank) {
        const int tile_row = 16 * m + 8 * half + g;
        float quad[4];
        take_quad(quad, hidden[m], tile, half);
        drop_out(quad, p.dropout, seed, first_row + tile_row, rank);
        // Ranks that are not there must be 0 in the second product, whatever x holds.
        VA_UNROLL
        for (int i = 0; i < 4; ++i) quad[i] = rank + i < p.rank ? quad[i] : 0.0f;
        store_quad<Math>(element<Math>(z, warp_row + tile_row, column), quad);
      });
    }

    // ---- of ARC's gradient, what is kept for the reduction
    //
    // In loops of their own, which are short: what stands among accumulators is there once for each of them.

    // z, drawn anew from the hidden layer that was kept, while the tile's first chunks of x are on their way.
    VA_DEVICE void keep_z(int64_t first_row) {
      constexpr int kUnderWay = 4;
      const int quads = k.padded_rank / 4, count = this->plan.tile_rows * quads;
      VA_ROLL
      for (int first = thread; first < count; first += kUnderWay * thread_count()) {
        float z[kUnderWay][4];
        VA_UNROLL
        for (int n = 0; n < kUnderWay; ++n) {
          const int i = first + n * thread_count();
          this->load_hidden(z[n], p.kept_hidden, k.hidden_aligned, first_row + i / quads, i % quads * 4);
        }
        VA_UNROLL
        for (int n = 0; n < kUnderWay; ++n) {
          const int i = first + n * thread_count(), rank = i % quads * 4;
          const int64_t row = first_row + i / quads;
          if (i >= count || row >= p.rows) break;
          drop_out(z[n], p.dropout, seed, row, rank);
          this->keep(p.z, k.padded_rank, row, rank, z[n]);
        }
      }
    }

    // gh, which is in shared memory; gh ∘ rescale takes its place.
    VA_DEVICE void end_middle(int64_t tile) {
      if (!p.is_gradient) return;
      sync_threads();
      const int quads = k.padded_rank / 4;
      VA_ROLL
      for (int i = thread; i < this->plan.tile_rows * quads; i += thread_count()) {
        const int tile_row = i / quads, rank = i % quads * 4;
        const int64_t row = tile * this->plan.tile_rows + tile_row;
        unsigned char* const place = element<Math>(this->middle_panel(rank / S::kBlock), tile_row, rank % S::kBlock);
        float grad[4];
        load_quad<Math>(grad, place);
        if (row < p.rows) this->keep(p.hidden_grad, k.padded_rank, row, rank, grad);
        VA_UNROLL
        for (int e = 0; e < 4; ++e) {
          if (rank + e < p.rank) grad[e] *= value_of(load_bits(p.rescale, rank + e), p.rescale.dtype);
        }
        store_quad<Math>(place, grad);
      }
    }

    // ---- the end: y = residual + drop_path ∘ dropout_out ∘ (scale ∘ (z · upᵀ + bias))

    // The rows' factors are read a whole pass later.
    VA_DEVICE void begin_tile(int64_t tile) {
      if (p.z) keep_z(tile * this->plan.tile_rows);
      if (!p.drop_path.active() || thread >= this->plan.tile_rows) return;
      this->row_factors_of_two_tiles[thread] = p.sample_factor<float>(tile * this->plan.tile_rows + thread);
    }

    VA_DEVICE void finish(Product& product, int chunk, unsigned char* chunk_weights, int64_t first_row) {
      scale_and_drop(product, chunk, reinterpret_cast<const float*>(chunk_weights + S::kWeightBytes), first_row);
      // y has the smallest dtype that holds both x and the residual.
      if (p.y.dtype == DType::kFloat32) return this->template write<Float32>(product, chunk, first_row);
      if constexpr (X::kBytes == 2 || Form::kWidensX) this->write_narrow(product, chunk, first_row);
    }

    VA_DEVICE void scale_and_drop(Product& product, int chunk, const float* columns, int64_t first_row) const {
      VA_UNROLL
      for (int tile = 0; tile < S::kColumnTiles; tile += 2) {
        float scale[4], bias[4];
        load_quad<Float32>(scale, columns + this->quad_column(tile));
        load_quad<Float32>(bias, columns + S::kChunk + this->quad_column(tile));
        VA_UNROLL
        for (int m = 0; m < S::kRowTiles; ++m) {
          VA_UNROLL
          for (int i = 0; i < 8; ++i) {
            float& value = product[m][tile + i % 4 / 2][i / 4 * 2 + i % 2];
            value = scale[i % 4] * value + bias[i % 4];
          }
        }
      }
      if (!p.dropout_out.active() && !p.drop_path.active()) return;
      VA_UNROLL
      for (int m = 0; m < S::kRowTiles; ++m) {
        VA_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int tile_row = 16 * m + 8 * half + g;
          const float sample = p.drop_path.active() ? this->row_factors_of_two_tiles[warp_row + tile_row] : 1.0f;
          VA_UNROLL
          for (int tile = 0; tile < S::kColumnTiles; tile += 2) {
            float factors[4] = {sample, sample, sample, sample};
            const int column = chunk * S::kChunk + this->quad_column(tile);
            drop_out(factors, p.dropout_out, seed, first_row + tile_row, column);
            VA_UNROLL
            for (int i = 0; i < 4; ++i) product[m][tile + i / 2][2 * half + i % 2] *= factors[i];
          }
        }
      }
    }
  };
};

}  // namespace vitadapter::cuda
