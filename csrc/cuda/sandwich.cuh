// The low-rank sandwich, y = base + mid(x · first) · second, in one kernel, for sm_80 and newer: what the forward pass
// of an adapter, its input gradient and their like have in common. Each brings its own middle.
//
// The idea. A block owns a tile of rows and works through it in chunks of columns, twice: first hidden += x · first,
// chunk after chunk, then, with the middle still on chip, y = base + mid · second, chunk after chunk. Rows of x come
// into shared memory by cp.async and stay there: where x is also the base ("kept"), the second pass finds it in place.
// As soon as a chunk has been used for the last time, its place takes the same chunk of the block's next tile: so reads
// are under way in both passes, next to the writes of y. Where x does not fit or the base is another tensor
// ("streamed"), the places are a ring that x and then the base go through. The weights, which all tiles read, come from
// the L2 cache through registers, where they are converted, into two places that take turns: one is filled while the
// other is multiplied.
//
// The traffic, in device memory: x once, the base once if it is another tensor, y once. That is the floor too. Streamed
// because it does not fit, x is read twice, the second time from the L2 as far as that holds all blocks' tiles. From
// the L2 a tile reads both weights, 2 · dim · rank elements: with 128 rows in a tile and rank 64 as much as x itself.
// Shared memory gives each weight once to every kRowTiles · 16 rows.
#pragma once

#include <algorithm>
#include <type_traits>

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

  // A chunk of weights is handled in pieces that are a unit of a panel each: so many in a row of columns or of ranks.
  static constexpr int kPiece = 16 / Math::kBytes;
  static constexpr int kColumnUnits = kChunk / kPiece, kRankUnits = kBlock / kPiece;
  static constexpr int kPieces = kBlock * kColumnUnits;
  static constexpr int kPiecesPerThread = kPieces / kMinThreads;
  static constexpr int kWeightBytes = 16 * kPieces;
  static constexpr int kWeightPlace = kWeightBytes + 2 * kChunk * 4;  // with two floats for each column
  static constexpr int kRankBytes = kBlock * Math::kBytes;            // a block of ranks of one row
};

// How one launch goes about it.
struct SandwichPlan {
  int threads = 0, tile_rows = 0;
  bool kept = false;
  int places = 0;       // for chunks of x or the base
  int place_bytes = 0;  // of one
  int chunks = 0;       // of a row
  int middle_bytes = 0;
  int changed_bytes = 0;  // of a chunk of x that is changed before it is multiplied
  int64_t tiles = 0, blocks = 0, shared_bytes = 0;
};

// The tensors and the plan of one launch.
struct Sandwich {
  int64_t rows = 0, dim = 0, rank = 0;
  Operand x;              // (rows, dim); null: there is no first product, and nothing of y either
  Operand first, second;  // (dim, rank) or (rank, dim), as a Form says, or these where it leaves that open
  bool first_by_dim = false, second_by_dim = false;
  Operand base;            // (rows, dim), may be x; null: 0
  Result y;                // (rows, dim); null: not asked for
  bool changes_x = false;  // whether begin_chunk() leaves x as it is multiplied in changed_panel()
  SandwichPlan plan;
  bool x_aligned = false, base_aligned = false;  // rows begin at multiples of 16 bytes
  bool y_aligned = false;                        // and of four elements
  Alignment first_alignment = Alignment::kElement, second_alignment = Alignment::kElement;
};

// What every kernel of a kind has in common at compile time. X: how x is stored: Math, or Float32. Where Math is
// Float32, x may have 2 bytes, too: it is widened before it is multiplied. In quads: see LeftPanel. Scales: the first
// weight's rows may have a scale. Changes: x may be changed before it is multiplied.
template <typename TheMath, typename TheX, int kTheRanks, Layout kTheFirst, Layout kTheSecond, bool kInQuads,
          bool kScales, bool kChanges>
struct SandwichForm {
  using Math = TheMath;
  using X = TheX;
  static constexpr int kRanks = kTheRanks;
  static constexpr Layout kFirst = kTheFirst, kSecond = kTheSecond;
  static constexpr bool kFirstInQuads = Math::kBytes == 2 && kInQuads;
  static constexpr bool kWidensX = kSame<Math, Float32>;
  static constexpr bool kScalesFirst = kScales, kChangesFirst = kChanges || kWidensX;
};

// One thread at work. Each kernel derives its own from this, with
//   void middle(Hidden& hidden, int block, int64_t first_row)
//     which finds x · first of a block of ranks in `hidden` and puts the middle into middle_panel(block);
//   void finish(Product& product, int chunk, unsigned char* chunk_weights, int64_t first_row)
//     which finds middle · second of a chunk of columns in `product` and ends with write();
// `first_row` is this warp's. It may replace begin_tile(), begin_chunk(), end_middle(), fetch_columns() and
// store_columns().
template <typename Form, typename Derived>
struct SandwichWorker {
  using Math = typename Form::Math;
  using X = typename Form::X;
  using S = Shape<Math, Form::kRanks>;
  using Hidden = float[S::kRowTiles][S::kRankTiles][4];
  using Product = float[S::kRowTiles][S::kColumnTiles][4];

  const Sandwich& job;
  const SandwichPlan& plan;
  const int thread = thread_index(), lane = lane_index(), g = lane >> 2, t = lane & 3;
  const int row_warp = warp_index() / S::kColumnWarps, column_warp = warp_index() % S::kColumnWarps;
  const int warp_row = row_warp * 16 * S::kRowTiles;  // in the tile

  // Shared memory: two chunks of weights, the middle, a changed chunk of x, the places for x and the base, and for each
  // row of two tiles a float.
  unsigned char *const weights, *const middles, *const changed, *const places;
  float* const row_factors_of_two_tiles;
  int weight_place = 0;
  // Loads of x and the base go through the places in turn, tile after tile.
  int64_t load_tile = block_index();
  int load_index = 0;               // in the tile, of the next one to start
  int started = 0;                  // so many
  int filling = 0, reading = 0;     // the places of the next one to start, and to read
  const char* load_from = nullptr;  // this thread's first unit of the last one started
  int load_bytes = 0;               // from there to the end of its row, or less than 1
  int load_rows = 0;                // from there to the last row

  WeightStream<S, Math, Form> stream;

  VA_DEVICE explicit SandwichWorker(const Sandwich& sandwich)
      : job(sandwich),
        plan(sandwich.plan),
        weights(dynamic_shared()),
        middles(weights + 2 * S::kWeightPlace),
        changed(middles + plan.middle_bytes),
        places(changed + plan.changed_bytes),
        row_factors_of_two_tiles(reinterpret_cast<float*>(places + plan.places * plan.place_bytes)) {}

  VA_DEVICE Derived& self() { return static_cast<Derived&>(*this); }

  VA_DEVICE int blocks() const { return S::kBlocks == 1 ? 1 : (int(job.rank) + S::kBlock - 1) / S::kBlock; }
  // Whether the second pass reads loads of its own, or finds x where the first pass left it.
  VA_DEVICE bool streams_base() const { return !plan.kept && job.y.data && job.base.data; }
  VA_DEVICE bool second_reads() const { return plan.kept || streams_base(); }
  VA_DEVICE int loads_per_tile() const { return streams_base() ? 2 * plan.chunks : plan.chunks; }

  VA_DEVICE Panel<128> place(int index) const { return {places + index * plan.place_bytes, plan.tile_rows}; }
  VA_DEVICE int next_place(int index) const { return index + 1 == plan.places ? 0 : index + 1; }

  // ---- x and the base: global to shared memory

  VA_DEVICE void start_load() {
    if (load_tile >= plan.tiles) return;
    const bool is_base = load_index >= plan.chunks, first = load_index == (is_base ? plan.chunks : 0);
    const Operand& from = is_base ? job.base : job.x;
    const bool aligned = is_base ? job.base_aligned : job.x_aligned;
    if (from.dtype == DType::kFloat32) {
      copy_chunk<4>(from.data, aligned, first);
    } else {
      copy_chunk<2>(from.data, aligned, first);
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
    const int64_t row_bytes = job.dim * kBytes;
    if (first) {
      const int64_t first_row = load_tile * plan.tile_rows + row;
      load_from = static_cast<const char*>(data) + first_row * row_bytes + 16 * unit;
      load_bytes = int(row_bytes) - 16 * unit;
      load_rows = int(job.rows - first_row < plan.tile_rows ? job.rows - first_row : plan.tile_rows - row);
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

  // ---- the steps

  VA_DEVICE void begin_pass(bool second) {
    stream.begin(second, second ? job.second : job.first, second ? job.second_alignment : job.first_alignment,
                 int(job.dim), int(job.rank), second ? job.second_by_dim : job.first_by_dim);
  }

  // Before the first pass of a tile, and before the first product with each of its chunks.
  VA_DEVICE void begin_tile(int64_t) {}
  VA_DEVICE void begin_chunk(int, int64_t) {
    if constexpr (Form::kWidensX) change_chunk([](float (&)[4], int, int) {});
  }
  // When the middle of all of a tile's ranks has been put into its panels.
  VA_DEVICE void end_middle(int64_t) {}
  // What a kernel keeps of each column of y beside the weights of its chunk, fetched and stored as those are.
  VA_DEVICE void fetch_columns(int) {}
  VA_DEVICE void store_columns(unsigned char*) const {}

  // A step multiplies one chunk of weights while the next one is on its way: (chunk, block) of this pass; one past
  // the last chunk is the first of the other pass. `needs`: the load that the next step reads, or -1; it has been
  // started, as there are two places or more. `ends_chunk`: the step was this pass' last to read from its place.
  template <typename Multiply>
  VA_DEVICE void step(int chunk, int block, int needs, bool ends_chunk, const Multiply& multiply_chunk) {
    const bool moves_on = ends_chunk && (!stream.second || second_reads());
    // A kept chunk is read in both passes.
    const bool frees = moves_on && (stream.second || !plan.kept);
    if (chunk == plan.chunks) {
      chunk = 0;
      if (job.y.data) begin_pass(!stream.second);
    }
    stream.fetch(chunk, block);
    self().fetch_columns(chunk);
    multiply_chunk(weights + weight_place * S::kWeightPlace);
    unsigned char* const next = weights + (weight_place ^ 1) * S::kWeightPlace;
    stream.store(next, chunk, block);
    self().store_columns(next);
    if (needs >= 0) wait_for(needs);
    sync_threads();
    weight_place ^= 1;
    // With as many places as chunks, the second pass begins at the first place again.
    if (moves_on) reading = next_place(reading);
    if (frees) start_load();
  }

  VA_DEVICE void run() {
    if (!job.x.data) return run_middles();
    for (int i = 0; i < plan.places; ++i) start_load();
    begin_pass(false);
    stream.fetch(0, 0);
    stream.store(weights, 0, 0);
    wait_for(0);
    sync_threads();
    int load = 0;  // the first one of the tile
    for (int64_t tile = block_index(); tile < plan.tiles; tile += block_count(), load += loads_per_tile()) {
      const int64_t first_row = tile * plan.tile_rows + warp_row;
      const bool goes_on = tile + block_count() < plan.tiles;
      self().begin_tile(tile);
      {
        float hidden[S::kBlocks][S::kRowTiles][S::kRankTiles][4] = {};
        first_pass(hidden, first_row, load, goes_on);
        VA_UNROLL
        for (int block = 0; block < S::kBlocks; ++block) {
          if (block < blocks()) self().middle(hidden[block], block, first_row);
        }
      }
      self().end_middle(tile);
      if (!job.y.data) continue;
      sync_threads();
      second_pass(first_row, load, goes_on);
    }
  }

  // Where the middle depends on nothing but what has been kept of it.
  VA_DEVICE void run_middles() {
    for (int64_t tile = block_index(); tile < plan.tiles; tile += block_count()) {
      VA_ROLL
      for (int block = 0; block < blocks(); ++block) {
        Hidden none = {};
        self().middle(none, block, tile * plan.tile_rows + warp_row);
      }
    }
  }

  // hidden = x · first.
  VA_DEVICE void first_pass(float (&hidden)[S::kBlocks][S::kRowTiles][S::kRankTiles][4], int64_t first_row, int load,
                            bool goes_on) {
    for (int chunk = 0; chunk < plan.chunks; ++chunk) {
      VA_ROLL
      for (int block = 0; block < blocks(); ++block) {
        const bool last = block + 1 == blocks(), same_pass = chunk + 1 < plan.chunks;
        // After this pass comes the base, the same places again, or, where there is no second pass, the next tile.
        const bool needs = last && (same_pass || streams_base() || (!job.y.data && goes_on));
        const int next_chunk = last ? chunk + 1 : chunk, next_block = last ? 0 : block + 1;
        step(next_chunk, next_block, needs ? load + chunk + 1 : -1, last, [&](unsigned char* chunk_weights) {
          if (block == 0) self().begin_chunk(chunk, first_row);
          with_layout<Form::kFirst>(job.first_by_dim, [&]<bool kByDim>() {
            const RightPanel<kByDim, kByDim ? S::kRankBytes : 128> right{
                {chunk_weights, kByDim ? S::kChunk : S::kBlock}, column_warp * S::kRankTiles * 8};
            // Registers have no addresses: the block's number must be a constant.
            VA_UNROLL
            for (int each = 0; each < S::kBlocks; ++each) {
              if (S::kBlocks == 1 || each == block) multiply_first(hidden[each], right);
            }
          });
        });
      }
    }
  }

  template <typename Right>
  VA_DEVICE void multiply_first(Hidden& hidden, const Right& right) const {
    if constexpr (Form::kChangesFirst && kSame<X, Math>) {
      const Panel<128> panel = job.changes_x ? changed_panel() : place(reading);
      multiply<Math, S::kChunk>(hidden, LeftPanel<Math, Form::kFirstInQuads, 128>{panel, warp_row}, right);
    } else if (Form::kChangesFirst && job.changes_x) {
      multiply<Math, S::kChunk>(hidden, LeftPanel<Math, Form::kFirstInQuads, 128>{changed_panel(), warp_row}, right);
    } else {
      multiply<Math, S::kChunk>(hidden, LeftPanel<X, Form::kFirstInQuads, 128>{place(reading), warp_row}, right);
    }
  }

  // y = base + mid · second.
  VA_DEVICE void second_pass(int64_t first_row, int load, bool goes_on) {
    for (int chunk = 0; chunk < plan.chunks; ++chunk) {
      Product product = {};
      VA_ROLL
      for (int block = 0; block < blocks(); ++block) {
        const bool last = block + 1 == blocks(), same_pass = chunk + 1 < plan.chunks;
        const bool needs = last && (same_pass ? streams_base() : goes_on);
        const int needed = same_pass ? load + plan.chunks + chunk + 1 : load + loads_per_tile();
        const int next_chunk = last ? chunk + 1 : chunk, next_block = last ? 0 : block + 1;
        step(next_chunk, next_block, needs ? needed : -1, last, [&](unsigned char* chunk_weights) {
          with_layout<Form::kSecond>(job.second_by_dim, [&]<bool kByDim>() {
            const RightPanel<!kByDim, kByDim ? S::kRankBytes : 128> right{
                {chunk_weights, kByDim ? S::kChunk : S::kBlock}, column_warp * S::kColumnTiles * 8};
            multiply<Math, S::kBlock>(product, LeftPanel<Math, false, S::kRankBytes>{middle_panel(block), warp_row},
                                      right);
          });
          if (last) self().finish(product, chunk, chunk_weights, first_row);
        });
      }
    }
  }

  // ---- what the middle and the end are made of

  VA_DEVICE Panel<S::kRankBytes> middle_panel(int block) const {
    return {middles + block * plan.tile_rows * S::kRankBytes, plan.tile_rows};
  }

  VA_DEVICE Panel<128> changed_panel() const { return {changed, plan.tile_rows}; }

  // Leaves a chunk of x in changed_panel(), each quad after change(quad, row of the tile, column of the chunk), if it
  // is multiplied from there.
  template <typename Change>
  VA_DEVICE void change_chunk(const Change& change) {
    if (!job.changes_x) return;
    constexpr int kQuads = S::kChunk / 4;
    VA_ROLL
    for (int i = thread; i < plan.tile_rows * kQuads; i += thread_count()) {
      const int row = i / kQuads, column = i % kQuads * 4;
      float quad[4];
      Form::kWidensX ? load_any(quad, job.x.dtype, place(reading), row, column)
                     : load_quad<X>(quad, element<X>(place(reading), row, column));
      change(quad, row, column);
      store_quad<Math>(element<Math>(changed_panel(), row, column), quad);
    }
    sync_threads();
  }

  // Calls body(m, tile, half, column, rank) for the quads of a block of ranks that a lane has: `tile` is the first of
  // two that make a quad; row 16 · m + 8 · half + g of the warp; `column` in the block.
  template <typename Body>
  VA_DEVICE void for_each_quad(int block, const Body& body) const {
    VA_UNROLL
    for (int tile = 0; tile < S::kRankTiles; tile += 2) {
      const int column = (column_warp * S::kRankTiles + tile) * 8 + 4 * t, rank = block * S::kBlock + column;
      VA_UNROLL
      for (int m = 0; m < S::kRowTiles; ++m) {
        VA_UNROLL
        for (int half = 0; half < 2; ++half) body(m, tile, half, column, rank);
      }
    }
  }

  // A quad of the hidden layer that was kept, (rows, rank) of float32; what is not there is 0.
  VA_DEVICE void load_hidden(float (&to)[4], const void* hidden, bool aligned, int64_t row, int rank) const {
    const int inside = row < job.rows ? int(job.rank) - rank : 0;
    const float* const from = static_cast<const float*>(hidden) + row * job.rank + rank;
    VA_UNROLL
    for (int i = 0; i < 4; ++i) to[i] = 0;
    if (aligned) {
      if (inside > 0) load_quad<Float32>(to, from);
    } else {
      VA_UNROLL
      for (int i = 0; i < 4; ++i) to[i] = i < inside ? from[i] : 0.0f;
    }
  }

  // Keeps a quad for the reduction, which sums biases in float32 where it may: TF32 is rounded later. matrix: (rows,
  // padded_rank) as operands of Math; null: nobody asks.
  VA_DEVICE static void keep(void* matrix, int padded_rank, int64_t row, int rank, const float (&quad)[4]) {
    using Kept = std::conditional_t<kSame<Math, Tf32>, Float32, Math>;
    if (!matrix) return;
    store_quad<Kept>(static_cast<char*>(matrix) + (row * padded_rank + rank) * Kept::kBytes, quad);
  }

  // The first of the four columns of a chunk that a lane has of two tiles side by side.
  VA_DEVICE int quad_column(int tile) const { return (column_warp * S::kColumnTiles + tile) * 8 + 4 * t; }

  // Writes base + product as y's dtype says if it is not float32: Math's own, or either of 2 bytes where that is
  // Float32.
  VA_DEVICE void write_narrow(const Product& product, int chunk, int64_t first_row) const {
    if constexpr (Math::kBytes == 2) {
      write<Math>(product, chunk, first_row);
    } else if constexpr (kSame<Math, Float32>) {
      job.y.dtype == DType::kBFloat16 ? write<BFloat16>(product, chunk, first_row)
                                      : write<Float16>(product, chunk, first_row);
    }
  }

  // The same as Y. Without edges, without their tests.
  template <typename Y>
  VA_DEVICE void write(const Product& product, int chunk, int64_t first_row) const {
    const bool whole = job.y_aligned && (chunk + 1) * S::kChunk <= job.dim && first_row + 16 * S::kRowTiles <= job.rows;
    whole ? write_tiles<Y, true>(product, chunk, first_row) : write_tiles<Y, false>(product, chunk, first_row);
  }

  template <typename Y, bool kWhole>
  VA_DEVICE void write_tiles(const Product& product, int chunk, int64_t first_row) const {
    const Panel<128> base_panel = place(reading);
    const int first_column = chunk * S::kChunk + quad_column(0);
    // 64: more than a warp has.
    const int rows = job.rows - first_row < 64 ? int(job.rows - first_row) - g : 64;
    const int64_t row_bytes = job.dim * Y::kBytes;
    char* const y = static_cast<char*>(job.y.data) + (first_row + g) * row_bytes + first_column * Y::kBytes;
    VA_UNROLL
    for (int m = 0; m < S::kRowTiles; ++m) {
      VA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * m + 8 * half;
        VA_UNROLL
        for (int tile = 0; tile < S::kColumnTiles; tile += 2) {
          const int inside = int(job.dim) - first_column - 8 * tile;
          if (!kWhole && (row >= rows || inside <= 0)) continue;
          float value[4];
          take_quad(value, product[m], tile, half);
          if (job.base.data) {
            float base[4];
            load_base<Y>(base, base_panel, warp_row + row + g, quad_column(tile));
            VA_UNROLL
            for (int i = 0; i < 4; ++i) value[i] += base[i];
          }
          store_row<Y>(y + row * row_bytes + 8 * tile * Y::kBytes, kWhole || job.y_aligned, inside, value);
        }
      }
    }
  }

  // y's dtype holds the base's.
  template <typename Y>
  VA_DEVICE void load_base(float (&to)[4], const Panel<128>& from, int row, int column) const {
    if constexpr (Y::kBytes == 2) {
      load_quad<Y>(to, element<Y>(from, row, column));
    } else {
      load_any(to, job.base.dtype, from, row, column);
    }
  }
  VA_DEVICE static void load_any(float (&to)[4], DType dtype, const Panel<128>& from, int row, int column) {
    if (dtype == DType::kFloat32) return load_quad<Float32>(to, element<Float32>(from, row, column));
    if (dtype == DType::kBFloat16) return load_quad<BFloat16>(to, element<BFloat16>(from, row, column));
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

}  // namespace vitadapter::cuda
