// How does the consolidator's forward pass run in one kernel that reads x and the base and writes y once? A block takes
// tiles of eight rows, or of four where rows are long. It brings a tile of x into shared memory; then a thread takes a
// few neighbouring outputs of a group, in all rows and through all branches, and keeps their sums in registers. So a
// weight is loaded once for all rows of a tile, out of the L1 or L2 cache, an element of x once for several outputs,
// and neighbouring outputs are read and written as vectors. Several blocks share a multiprocessor: while one waits for
// memory, another multiplies.
#include "consolidator_tile.cuh"

namespace vitadapter::cuda {

template <int kSide, int kUnits>
struct ConsolidatorForwardKernel {
  static constexpr int kMaxThreads = kMostThreads, kMinBlocks = 2;
  static constexpr bool kNeedsSm80 = true;
  static constexpr int kRows = kUnits * kFour;

  ConsolidatorForward p;
  Grouping grouping[kMaxBranches];

  VA_DEVICE void operator()() const {
    const Tile tile{dynamic_shared(), int(p.in)};
    const Keeps<kRows> keeps{reinterpret_cast<float*>(tile.base + kUnits * tile_bytes(p.in))};
    const int items = int(p.out) / kSide;
    for (int64_t row = block_index() * kRows; row < p.rows; row += block_count() * kRows) {
      stage<kUnits, columns_of(kSide)>(p, p.x, p.in, row, 0, tile, [](int, const auto&) {});
      if (p.drop_path.active()) keeps.stage(p, row);
      sync_threads();
      for (int item = thread_index(); item < items; item += thread_count()) {
        find(tile, keeps, row, item * kSide);
      }
      sync_threads();
    }
  }

  // Some neighbouring outputs of a tile, from this row on.
  VA_DEVICE void find(const Tile& tile, const Keeps<kRows>& keeps, int64_t first_row, int output) const {
    float sums[kRows][kSide] = {};
    const int rows = p.rows - first_row < kRows ? int(p.rows - first_row) : kRows;
    if (p.base.data) {
      with_dtype(p.base.dtype, [&](auto neighbours) {
        VA_UNROLL
        for (int r = 0; r < kRows; ++r) {
          if (r < rows) neighbours.load(sums[r], p.base, (first_row + r) * p.out + output);
        }
      });
    }
    VA_ROLL
    for (int branch = 0; branch < p.branches; ++branch) add(sums, tile, keeps, branch, output);
    VA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (r < rows) store_neighbours(p.y, (first_row + r) * p.out + output, sums[r]);
    }
  }

  VA_DEVICE void add(float (&sums)[kRows][kSide], const Tile& tile, const Keeps<kRows>& keeps, int branch,
                     int output) const {
    const Grouping& own = grouping[branch];
    const Operand &weight = p.branch[branch].weight, &bias = p.branch[branch].bias;
    Unit keep[kUnits];
    VA_UNROLL
    for (int u = 0; u < kUnits; ++u) keep[u] = p.drop_path.active() ? keeps.unit(branch, u) : Unit{{1, 1, 1, 1}};
    if (bias.data) {
      VA_UNROLL
      for (int o = 0; o < kSide; ++o) {
        const float value = value_of(load_bits(bias, output + o), bias.dtype);
        VA_UNROLL
        for (int r = 0; r < kRows; ++r) sums[r][o] += keep[r / kFour].row[r % kFour] * value;
      }
    }
    Sources sources(own.by_group_out.divide(output) * own.group_in, own, p.shuffle, int(p.in));
    with_dtype(weight.dtype, [&](auto neighbours) {
      VA_ROLL
      for (int s = 0; s < own.group_in; s += kSide) {
        float weights[kSide][kSide];
        VA_UNROLL
        for (int o = 0; o < kSide; ++o) neighbours.load(weights[o], weight, (output + o) * int64_t(own.group_in) + s);
        VA_UNROLL
        for (int o = 0; o < kSide; ++o) neighbours.round(weights[o], p.compute);
        VA_UNROLL
        for (int v = 0; v < kSide; ++v) {
          const int source = sources.next();
          VA_UNROLL
          for (int u = 0; u < kUnits; ++u) {
            const Unit unit = load_unit(tile.unit(source, u));
            VA_UNROLL
            for (int r = 0; r < kFour; ++r) {
              const float value = p.drop_path.active() ? keep[u].row[r] * unit.row[r] : unit.row[r];
              VA_UNROLL
              for (int o = 0; o < kSide; ++o) sums[u * kFour + r][o] += weights[o][v] * value;
            }
          }
        }
      }
    });
  }
};

template <int kSide, int kUnits>
bool launch_forward(const ConsolidatorForward& p, Stream stream) {
  using Kernel = ConsolidatorForwardKernel<kSide, kUnits>;
  static_assert(sizeof(Kernel) <= 4096, "the parameters of a kernel");
  Kernel kernel{p, {}};
  for (int i = 0; i < p.branches; ++i) kernel.grouping[i] = Grouping(p.branch[i], kSide);
  const int threads = threads_for(p.out / kSide);
  const int64_t keeps = p.drop_path.active() ? int64_t(p.branches) * Kernel::kRows * int64_t(sizeof(float)) : 0;
  const int64_t shared_bytes = kUnits * tile_bytes(p.in) + keeps;
  if (shared_bytes > device().shared_bytes) return false;
  const int64_t resident = int64_t(resident_blocks<Kernel>(threads, shared_bytes)) * device().multiprocessors;
  const int64_t tiles = (p.rows + Kernel::kRows - 1) / Kernel::kRows;
  if (resident > 0) launch(stream, std::min(tiles, resident), threads, shared_bytes, kernel);
  return resident > 0;
}

bool consolidator_forward_fast(const ConsolidatorForward& p, Stream stream) {
  if (!serves(p)) return false;
  const bool aligned = begins_at(p.x, p.in, 4) && begins_at(p.base, p.out, 4) && begins_at(p.y, p.out, 4);
  return with_side(p, aligned, [&](auto side) {
    // Eight rows where registers have room for their sums and a multiprocessor for two such tiles.
    if constexpr (side == 2) {
      if (4 * tile_bytes(p.in) <= device().shared_bytes) return launch_forward<side, 2>(p, stream);
    }
    return launch_forward<side, 1>(p, stream);
  });
}

}  // namespace vitadapter::cuda
