// The adapter's forward pass in one kernel, for sm_80 and newer; the mathematics is in ../common/adapter.h.
//
// The idea. A block owns a tile of rows and works through it in chunks of columns, twice: first hidden += x · downᵀ,
// chunk after chunk, then, with the middle (bias, activation, dropout) still on chip, y = residual + z · upᵀ, chunk
// after chunk. Rows of x come into shared memory by cp.async and stay there: where x is also the residual ("kept"), the
// second pass finds it in place. As soon as a chunk has been used for the last time, its place takes the same chunk of
// the block's next tile: so reads are under way in both passes, next to the writes of y. Where x does not fit or the
// residual is another tensor ("streamed"), the places are a ring that x and then the residual go through. The weights,
// which all tiles read, come from the L2 cache through registers, where they are converted, into two places that take
// turns: one is filled while the other is multiplied.
//
// The traffic, in device memory: x once, the residual once if it is another tensor, y once, the hidden layer (rank
// floats a row) once if it is kept. That is the floor too: for N rows of D elements of b bytes 2 · N · D · b, so 38.7
// MB at N = 12,608, D = 768 in bfloat16, 9 µs at 4.3 TB/s; the products are 4 · N · D · rank operations, 2.5 G at rank
// 64, 3 µs at 790 TFLOP/s. Streamed because it does not fit, x is read twice, the second time from the L2 as far as
// that holds all blocks' tiles. From the L2 a tile reads both weights, 2 · D · rank elements: with 128 rows in a tile
// and rank 64 as much as x itself. Shared memory gives each weight once to every kRowTiles · 16 rows.
//
// Not yet run on a GPU. By the count of instructions (sm_90, bfloat16, rank 64) it is not the memory that binds but
// issue and latency: some 60 to 70 % of the copy rate is what to expect of this version.
#pragma once

#include <algorithm>
#include <type_traits>

#include "activation.cuh"
#include "adapter.h"
#include "weights.cuh"

namespace vitadapter::cuda {

// How a block of a kernel for up to kRanks ranks is cut: warps stand in a grid of row_warps × kColumnWarps. A block of
// threads takes 16 · kRowTiles · row_warps rows; its warps share a chunk of columns, or a block of ranks, side by side.
template <typename Math, int kRanks>
struct Shape {
  static constexpr bool kNarrow = kRanks == 16, kWide = kRanks > 64;
  static constexpr int kChunk = 128 / Math::kBytes;                    // columns of x, and of y, at a time
  static constexpr int kBlock = std::min(kRanks, 128 / Math::kBytes);  // ranks at a time
  static constexpr int kBlocks = kRanks / kBlock;
  // A wide one has accumulators for many ranks: fewer rows, or fewer ranks, a warp.
  static constexpr int kRowTiles = kNarrow || (kWide && Math::kBytes == 4) ? 1 : 2;
  static constexpr int kColumnWarps = kNarrow ? 1 : kWide && Math::kBytes == 2 ? 4 : 2;
  static constexpr int kRankTiles = kBlock / 8 / kColumnWarps;    // mma tiles of a warp in a block of ranks
  static constexpr int kColumnTiles = kChunk / 8 / kColumnWarps;  // and in a chunk of columns
  static constexpr int kMaxThreads = 256, kMinThreads = 128;

  static constexpr int rows(int threads) { return threads / 32 / kColumnWarps * 16 * kRowTiles; }

  // A chunk of weights is handled in pieces that are a unit of a panel each, side by side in memory in rows of so many
  // in the first and the second pass.
  static constexpr int kPiece = 16 / Math::kBytes;
  static constexpr int kFirstUnits = kChunk / kPiece, kSecondUnits = kBlock / kPiece;
  static constexpr int kPieces = kBlock * kFirstUnits;
  static constexpr int kPiecesPerThread = kPieces / kMinThreads;
  static constexpr int kWeightBytes = 16 * kPieces;
  static constexpr int kWeightPlace = kWeightBytes + 2 * kChunk * 4;  // with each column's scale and bias
  static constexpr int kRankBytes = kBlock * Math::kBytes;            // a block of ranks of one row
};

// How one launch goes about it.
struct AdapterPlan {
  int threads = 0, tile_rows = 0;
  bool kept = false;
  int places = 0;       // for chunks of x or the residual
  int place_bytes = 0;  // of one
  int chunks = 0;       // of a row
  int z_bytes = 0;
  int64_t tiles = 0, blocks = 0, shared_bytes = 0;
};

// x: how it is stored: Math, or Float32, or, where Math is Float32, anything.
template <typename Math, typename X, int kRanks>
struct AdapterForwardKernel {
  using S = Shape<Math, kRanks>;
  static constexpr int kMaxThreads = S::kMaxThreads, kMinBlocks = 1;
  static constexpr bool kNeedsSm80 = true;
  // ldmatrix cannot bring float32, so lanes load x in quads, and the weights follow.
  static constexpr bool kRoundsX = Math::kBytes == 2 && !kSame<X, Math>;

  AdapterForward p;
  AdapterPlan plan;
  float scale_value;
  bool x_aligned, residual_aligned;  // rows begin at multiples of 16 bytes
  bool y_aligned, hidden_aligned;    // and of four elements
  Alignment down_alignment, up_alignment;

  VA_DEVICE void operator()() const { Worker(*this).run(); }

  // One thread at work.
  struct Worker {
    const AdapterForwardKernel& k;
    const AdapterForward& p;
    const int thread = thread_index(), lane = lane_index(), g = lane >> 2, t = lane & 3;
    const int row_warp = warp_index() / S::kColumnWarps, column_warp = warp_index() % S::kColumnWarps;
    const int warp_row = row_warp * 16 * S::kRowTiles;  // in the tile

    // Shared memory: two chunks of weights, z, the places for x and the residual, drop-path's factor of each row.
    unsigned char *const weights, *const z, *const places;
    float* const row_factors;
    uint64_t seed = 0;  // of both kinds of dropout
    int weight_place = 0;
    // Loads of x and the residual go through the places in turn, tile after tile.
    int64_t load_tile = block_index();
    int load_index = 0;               // in the tile, of the next one to start
    int started = 0;                  // so many
    int filling = 0, reading = 0;     // the places of the next one to start, and to read
    const char* load_from = nullptr;  // this thread's first unit of the last one started
    int load_bytes = 0;               // from there to the end of its row, or less than 1
    int load_rows = 0;                // from there to the last row

    WeightStream<S, Math, kRoundsX> stream;
    uint32_t scale_bits = 0, bias_bits = 0;  // of the next chunk's column number `thread`

    VA_DEVICE explicit Worker(const AdapterForwardKernel& kernel)
        : k(kernel),
          p(kernel.p),
          weights(dynamic_shared()),
          z(weights + 2 * S::kWeightPlace),
          places(z + k.plan.z_bytes),
          row_factors(reinterpret_cast<float*>(places + k.plan.places * k.plan.place_bytes)) {}

    VA_DEVICE int blocks() const { return S::kBlocks == 1 ? 1 : (int(p.rank) + S::kBlock - 1) / S::kBlock; }
    VA_DEVICE int loads_per_tile() const { return k.plan.kept ? k.plan.chunks : 2 * k.plan.chunks; }

    VA_DEVICE Panel<128> place(int index) const { return {places + index * k.plan.place_bytes, k.plan.tile_rows}; }
    VA_DEVICE int next_place(int index) const { return index + 1 == k.plan.places ? 0 : index + 1; }

    // ---- x and the residual: global to shared memory

    VA_DEVICE void start_load() {
      if (load_tile >= k.plan.tiles) return;
      const int chunks = k.plan.chunks;
      if (load_index < chunks) {
        copy_chunk<X::kBytes>(p.x.data, k.x_aligned, load_index == 0);
      } else if (p.residual.dtype == DType::kFloat32) {
        copy_chunk<4>(p.residual.data, k.residual_aligned, load_index == chunks);
      } else {
        copy_chunk<2>(p.residual.data, k.residual_aligned, load_index == chunks);
      }
      cp_async_commit();
      ++started;
      filling = next_place(filling);
      if (++load_index == loads_per_tile()) {
        load_index = 0;
        load_tile += block_count();
      }
    }

    // The first chunk of a tile, or the one after the last. Zeros stand for what is beyond the last row or column.
    template <int kBytes>
    VA_DEVICE void copy_chunk(const void* data, bool aligned, bool first) {
      constexpr int kUnits = S::kChunk * kBytes / 16, kCount = kUnits * 16 * S::kRowTiles / 32 / S::kColumnWarps;
      // A thread's next unit is a whole number of eight rows further, where units are exchanged in the same way.
      const int row = thread / kUnits, unit = thread % kUnits, stride = thread_count() / kUnits;
      const int64_t row_bytes = p.dim * kBytes;
      if (first) {
        const int64_t first_row = load_tile * k.plan.tile_rows + row;
        load_from = static_cast<const char*>(data) + first_row * row_bytes + 16 * unit;
        load_bytes = int(row_bytes) - 16 * unit;
        load_rows = int(p.rows - first_row < k.plan.tile_rows ? p.rows - first_row : k.plan.tile_rows - row);
      } else {
        load_from += S::kChunk * kBytes;
        load_bytes -= S::kChunk * kBytes;
      }
      const int valid = load_bytes >= 16 ? 16 : load_bytes > 0 ? load_bytes : 0;
      unsigned char* const to = place(filling).unit(row, unit);
      const char* from = load_from;
      if (aligned) {
        VA_UNROLL
        for (int i = 0; i < kCount; ++i, from += stride * row_bytes) {
          // Beyond the last row nothing is read, so that the address does not matter.
          cp_async16(to + i * stride * 128, from, i * stride < load_rows ? valid : 0);
        }
      } else {
        VA_ROLL
        for (int i = 0; i < kCount; ++i, from += stride * row_bytes) {
          store16(to + i * stride * 128, load_elements<kBytes>(from, i * stride < load_rows ? valid : 0));
        }
      }
    }

    template <int kBytes>
    VA_DEVICE static Words4 load_elements(const void* from, int bytes) {
      uint32_t elements[16 / kBytes];
      VA_UNROLL
      for (int i = 0; i < 16 / kBytes; ++i) {
        elements[i] = i * kBytes >= bytes ? 0
                      : kBytes == 4       ? static_cast<const uint32_t*>(from)[i]
                                          : static_cast<const uint16_t*>(from)[i];
      }
      Words4 words;
      VA_UNROLL
      for (int i = 0; i < 4; ++i) {
        words.word[i] =
            kBytes == 4 ? elements[i] : elements[2 * i % (16 / kBytes)] | elements[(2 * i + 1) % (16 / kBytes)] << 16;
      }
      return words;
    }

    // Waits for this thread's part of a load.
    VA_DEVICE void wait_for(int load) const { cp_async_wait(started - 1 - load); }

    // ---- the scale and bias of each column of y, beside the weights of its chunk

    VA_DEVICE void fetch_columns(int chunk) {
      const int column = chunk * S::kChunk + thread;
      if (!stream.second || thread >= S::kChunk || column >= p.dim) return;
      if (p.scale.data) scale_bits = load_bits(p.scale, p.scale_is_channel ? column : 0);
      if (p.up_bias.data) bias_bits = load_bits(p.up_bias, column);
    }

    VA_DEVICE void store_columns(unsigned char* place) const {
      if (!stream.second || thread >= S::kChunk) return;
      float* const columns = reinterpret_cast<float*>(place + S::kWeightBytes);
      const float scale = p.scale.data ? value_of(scale_bits, p.scale.dtype) : k.scale_value;
      columns[thread] = scale;
      columns[S::kChunk + thread] = p.up_bias.data ? scale * value_of(bias_bits, p.up_bias.dtype) : 0.0f;
    }

    // ---- the steps

    VA_DEVICE void begin_pass(bool second) {
      if (second) {
        stream.begin(true, p.up, k.up_alignment, int(p.dim), int(p.rank));
      } else {
        stream.begin(false, p.down, k.down_alignment, int(p.rank), int(p.dim));
      }
    }

    // A step multiplies one chunk of weights while the next one is on its way: (chunk, block) of this pass; one past
    // the last chunk is the first of the other pass. `needs`: the load that the next step reads, or -1; it has been
    // started, as there are two places or more. `ends_chunk`: the step was this pass' last to read from its place.
    template <typename Multiply>
    VA_DEVICE void step(int chunk, int block, int needs, bool ends_chunk, const Multiply& multiply_chunk) {
      // A kept chunk is read in both passes.
      const bool frees = ends_chunk && (stream.second || !k.plan.kept);
      if (chunk == k.plan.chunks) {
        chunk = 0;
        begin_pass(!stream.second);
      }
      stream.fetch(chunk, block);
      fetch_columns(chunk);
      multiply_chunk(weights + weight_place * S::kWeightPlace);
      unsigned char* const next = weights + (weight_place ^ 1) * S::kWeightPlace;
      stream.store(next, chunk, block);
      store_columns(next);
      if (needs >= 0) wait_for(needs);
      sync_threads();
      weight_place ^= 1;
      // With as many places as chunks, the second pass begins at the first place again.
      if (ends_chunk) reading = next_place(reading);
      if (frees) start_load();
    }

    VA_DEVICE void run() {
      if (p.dropout.active() || p.dropout_out.active()) seed = uint64_t(*p.dropout.seed);
      for (int i = 0; i < k.plan.places; ++i) start_load();
      begin_pass(false);
      stream.fetch(0, 0);
      stream.store(weights, 0, 0);
      wait_for(0);
      sync_threads();
      int load = 0;  // the first one of the tile
      for (int64_t tile = block_index(); tile < k.plan.tiles; tile += block_count(), load += loads_per_tile()) {
        const int64_t first_row = tile * k.plan.tile_rows + warp_row;
        {
          float hidden[S::kBlocks][S::kRowTiles][S::kRankTiles][4] = {};
          first_pass(hidden, load);
          VA_UNROLL
          for (int block = 0; block < S::kBlocks; ++block) {
            if (block < blocks()) middle(hidden[block], block, first_row);
          }
        }
        if (p.drop_path.active() && thread < k.plan.tile_rows) {
          row_factors[thread] = p.sample_factor<float>(tile * k.plan.tile_rows + thread);
        }
        sync_threads();
        second_pass(first_row, load, tile + block_count() < k.plan.tiles);
      }
    }

    // hidden = x · downᵀ.
    VA_DEVICE void first_pass(float (&hidden)[S::kBlocks][S::kRowTiles][S::kRankTiles][4], int load) {
      const int chunks = k.plan.chunks;
      for (int chunk = 0; chunk < chunks; ++chunk) {
        VA_ROLL
        for (int block = 0; block < blocks(); ++block) {
          const bool last = block + 1 == blocks(), needs = last && (chunk + 1 < chunks || !k.plan.kept);
          const int next_chunk = last ? chunk + 1 : chunk, next_block = last ? 0 : block + 1;
          step(next_chunk, next_block, needs ? load + chunk + 1 : -1, last, [&](unsigned char* chunk_weights) {
            // Registers have no addresses: the block's number must be a constant.
            VA_UNROLL
            for (int each = 0; each < S::kBlocks; ++each) {
              if (S::kBlocks > 1 && each != block) continue;
              multiply<Math, X, S::kChunk>(hidden[each], place(reading), warp_row, Panel<128>{chunk_weights, S::kBlock},
                                           column_warp * S::kRankTiles * 8);
            }
          });
        }
      }
    }

    // z = dropout ∘ act(hidden + bias), into shared memory; the hidden layer to where it is kept.
    VA_DEVICE void middle(float (&hidden)[S::kRowTiles][S::kRankTiles][4], int block, int64_t first_row) {
      // Calls body(m, tile, half, column, rank): `tile` is the first of two that make a quad.
      const auto for_each_quad = [&](auto body) {
        VA_UNROLL
        for (int tile = 0; tile < S::kRankTiles; tile += 2) {
          const int column = (column_warp * S::kRankTiles + tile) * 8 + 4 * t, rank = block * S::kBlock + column;
          VA_UNROLL
          for (int m = 0; m < S::kRowTiles; ++m) {
            VA_UNROLL
            for (int half = 0; half < 2; ++half) body(m, tile, half, column, rank);
          }
        }
      };
      VA_UNROLL
      for (int tile = 0; tile < S::kRankTiles && p.down_bias.data; ++tile) {
        VA_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int rank = block * S::kBlock + quad_order((column_warp * S::kRankTiles + tile) * 8 + 2 * t + i);
          if (rank >= p.rank) continue;
          const float bias = value_of(load_bits(p.down_bias, rank), p.down_bias.dtype);
          VA_UNROLL
          for (int m = 0; m < S::kRowTiles; ++m) hidden[m][tile][i] += bias, hidden[m][tile][i + 2] += bias;
        }
      }
      if (p.hidden) {
        for_each_quad([&](int m, int tile, int half, int, int rank) {
          const int64_t row = first_row + 16 * m + 8 * half + g;
          float quad[4];
          take_quad(quad, hidden[m], tile, half);
          if (row < p.rows && rank < p.rank) {
            float* const kept = static_cast<float*>(p.hidden) + row * p.rank + rank;
            store_row<Float32>(kept, k.hidden_aligned, int(p.rank) - rank, quad);
          }
        });
      }
      activate_all<S::kRowTiles * S::kRankTiles * 4>(
          p.activation, [&](int i) -> float& { return hidden[i / 4 / S::kRankTiles][i / 4 % S::kRankTiles][i % 4]; });
      const Panel<S::kRankBytes> to{z + block * k.plan.tile_rows * S::kRankBytes, k.plan.tile_rows};
      for_each_quad([&](int m, int tile, int half, int column, int rank) {
        const int tile_row = 16 * m + 8 * half + g;
        float quad[4];
        take_quad(quad, hidden[m], tile, half);
        drop_out(quad, p.dropout, first_row + tile_row, rank);
        // Ranks that are not there must be 0 in the second product, whatever x holds.
        VA_UNROLL
        for (int i = 0; i < 4; ++i) quad[i] = rank + i < p.rank ? quad[i] : 0.0f;
        store_quad<Math>(element<Math>(to, warp_row + tile_row, column), quad);
      });
    }

    // Four neighbouring columns from a multiple of four on are one draw.
    VA_DEVICE void drop_out(float (&values)[4], const Dropout& dropout, int64_t row, int column) const {
      if (!dropout.active()) return;
      const Philox4 words = dropout.words(seed, row, column);
      VA_UNROLL
      for (int i = 0; i < 4; ++i) values[i] *= dropout.factor<float>(words.word[i]);
    }

    using Product = float[S::kRowTiles][S::kColumnTiles][4];

    // y = residual + drop_path ∘ dropout_out ∘ (scale ∘ (z · upᵀ + bias)).
    VA_DEVICE void second_pass(int64_t first_row, int load, bool goes_on) {
      const int chunks = k.plan.chunks;
      for (int chunk = 0; chunk < chunks; ++chunk) {
        Product product = {};
        VA_ROLL
        for (int block = 0; block < blocks(); ++block) {
          const bool last = block + 1 == blocks(), same_pass = chunk + 1 < chunks;
          const bool needs = last && (same_pass ? !k.plan.kept : goes_on);
          const int needed = same_pass ? load + chunks + chunk + 1 : load + loads_per_tile();
          const int next_chunk = last ? chunk + 1 : chunk, next_block = last ? 0 : block + 1;
          step(next_chunk, next_block, needs ? needed : -1, last, [&](unsigned char* chunk_weights) {
            multiply<Math, Math, S::kBlock>(
                product, Panel<S::kRankBytes>{z + block * k.plan.tile_rows * S::kRankBytes, k.plan.tile_rows}, warp_row,
                Panel<S::kRankBytes>{chunk_weights, S::kChunk}, column_warp * S::kColumnTiles * 8);
            if (!last) return;
            scale_and_drop(product, chunk, reinterpret_cast<const float*>(chunk_weights + S::kWeightBytes), first_row);
            // Without edges, without their tests. y has the smallest dtype that holds both x and the residual.
            const bool whole =
                k.y_aligned && (chunk + 1) * S::kChunk <= p.dim && first_row + 16 * S::kRowTiles <= p.rows;
            if (p.y.dtype == X::kDType) {
              whole ? finish<X, true>(product, chunk, first_row) : finish<X, false>(product, chunk, first_row);
            } else {
              whole ? finish<Float32, true>(product, chunk, first_row)
                    : finish<Float32, false>(product, chunk, first_row);
            }
          });
        }
      }
    }

    // The first of the four columns of a chunk that a lane has of two tiles side by side.
    VA_DEVICE int quad_column(int tile) const { return (column_warp * S::kColumnTiles + tile) * 8 + 4 * t; }

    VA_DEVICE void scale_and_drop(Product& product, int chunk, const float* columns, int64_t first_row) const {
      VA_UNROLL
      for (int tile = 0; tile < S::kColumnTiles; tile += 2) {
        float scale[4], bias[4];
        load_quad<Float32>(scale, columns + quad_column(tile));
        load_quad<Float32>(bias, columns + S::kChunk + quad_column(tile));
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
          const float sample = p.drop_path.active() ? row_factors[warp_row + tile_row] : 1.0f;
          VA_UNROLL
          for (int tile = 0; tile < S::kColumnTiles; tile += 2) {
            float factors[4] = {sample, sample, sample, sample};
            drop_out(factors, p.dropout_out, first_row + tile_row, chunk * S::kChunk + quad_column(tile));
            VA_UNROLL
            for (int i = 0; i < 4; ++i) product[m][tile + i / 2][2 * half + i % 2] *= factors[i];
          }
        }
      }
    }

    template <typename Y, bool kWhole>
    VA_DEVICE void finish(const Product& product, int chunk, int64_t first_row) const {
      const Panel<128> residual = place(reading);
      const int first_column = chunk * S::kChunk + quad_column(0);
      // 64: more than a warp has.
      const int rows = p.rows - first_row < 64 ? int(p.rows - first_row) - g : 64;
      const int64_t row_bytes = p.dim * Y::kBytes;
      char* const y = static_cast<char*>(p.y.data) + (first_row + g) * row_bytes + first_column * Y::kBytes;
      VA_UNROLL
      for (int m = 0; m < S::kRowTiles; ++m) {
        VA_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int row = 16 * m + 8 * half;
          VA_UNROLL
          for (int tile = 0; tile < S::kColumnTiles; tile += 2) {
            const int inside = int(p.dim) - first_column - 8 * tile;
            if (!kWhole && (row >= rows || inside <= 0)) continue;
            float value[4], base[4];
            take_quad(value, product[m], tile, half);
            load_residual<Y>(base, residual, warp_row + row + g, quad_column(tile));
            VA_UNROLL
            for (int i = 0; i < 4; ++i) value[i] += base[i];
            store_row<Y>(y + row * row_bytes + 8 * tile * Y::kBytes, kWhole || k.y_aligned, inside, value);
          }
        }
      }
    }

    template <typename Y>
    VA_DEVICE void load_residual(float (&to)[4], const Panel<128>& from, int row, int column) const {
      if (Y::kBytes == 2 || p.residual.dtype == Y::kDType) return load_quad<Y>(to, element<Y>(from, row, column));
      if (p.residual.dtype == DType::kBFloat16) return load_quad<BFloat16>(to, element<BFloat16>(from, row, column));
      load_quad<Float16>(to, element<Float16>(from, row, column));
    }

    // The up to four elements that are inside a row.
    template <typename Y>
    VA_DEVICE static void store_row(void* to, bool aligned, int inside, const float (&from)[4]) {
      if (aligned) return store_quad<Y>(to, from);  // then rows end with a quad, too
      VA_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (i >= inside) break;
        if constexpr (Y::kBytes == 4) {
          static_cast<float*>(to)[i] = from[i];
        } else {
          static_cast<uint16_t*>(to)[i] = uint16_t(Y::pack(from[i], 0.0f));
        }
      }
    }
  };
};

}  // namespace vitadapter::cuda
