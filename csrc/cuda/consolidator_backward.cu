// How does the consolidator's backward pass run in two kernels that read g and x and write x's gradient once? The rows
// are cut into slices, and a block walks through one of them in tiles of four rows:
//
//   1. g and x come into shared memory, and the sums of g's columns are taken on the way;
//   2. a thread adds g · x to a few neighbouring entries of the weights' gradients, in float32, in shared memory, where
//      each entry has one owner for all of the slice;
//   3. a thread finds x's gradient at a few neighbouring places of a group, through all branches of as many groups, and
//      puts it where the shuffle says, in the place that x had;
//   4. from there it is written in the order of its columns.
//
// Each block leaves its sums behind, and the second kernel adds them in an order that is always the same. How many
// there are hangs on the shape alone: the same bits on every device, without atomics. Where sums have no room in shared
// memory, as with few groups, the outputs are cut into parts, a block each, and x's gradient has a launch of its own.
#include "consolidator_tile.cuh"
#include "slices.cuh"

namespace vitadapter::cuda {

// What a slice leaves behind: for each branch the sums of its weight's gradient, square by square of kSide outputs and
// places, and then rows of sums of g.
struct ConsolidatorSums {
  int64_t size = 0;              // floats of a slice
  int64_t weight[kMaxBranches];  // where a branch begins; -1 where nobody asks
  int64_t first_row = 0;         // where the rows begin, of `out` each
  int rows = 0;
  int branch_of_row[kMaxBranches + 1];  // whose drop-path the row has; -1: none, for grad_sum and all biases

  explicit ConsolidatorSums(const ConsolidatorBackward& p) {
    const auto is_asked = [](const Result& each) { return each.data != nullptr; };
    for (int i = 0; i < p.branches; ++i) {
      weight[i] = is_asked(p.weight_grad[i]) ? size : -1;
      if (is_asked(p.weight_grad[i])) size += p.out * p.branch[i].group_in;
    }
    first_row = size;
    const bool drops = p.drop_path.active();
    const Result* const biases_end = p.bias_grad + p.branches;
    if (is_asked(p.grad_sum) || (!drops && std::any_of(p.bias_grad, biases_end, is_asked))) branch_of_row[rows++] = -1;
    for (int i = 0; drops && i < p.branches; ++i) {
      if (is_asked(p.bias_grad[i])) branch_of_row[rows++] = i;
    }
    size += rows * p.out;
  }
  VA_HOST_DEVICE bool has_weights() const { return first_row > 0; }
};

// Adds terms to sums that lie side by side, at a multiple of 16 bytes where they are four or more.
template <int kCount>
VA_DEVICE void add_to(float* sums, const float (&terms)[kCount]) {
  if constexpr (kCount % 4) {
    VA_UNROLL
    for (int i = 0; i < kCount; ++i) sums[i] += terms[i];
  } else {
    VA_UNROLL
    for (int i = 0; i < kCount; i += 4) {
      Unit sum = load_unit(sums + i);
      VA_UNROLL
      for (int e = 0; e < 4; ++e) sum.row[e] += terms[i + e];
      store_unit(sums + i, sum);
    }
  }
}

template <int kSide>
struct ConsolidatorBackwardKernel {
  static constexpr int kMaxThreads = kMostThreads, kMinBlocks = kSide == 4 ? 1 : 2;
  static constexpr bool kNeedsSm80 = true;
  static constexpr int kColumns = columns_of(kSide);
  using TileKeeps = Keeps<kFour>;

  ConsolidatorBackward p;
  ConsolidatorSums sums;
  Grouping grouping[kMaxBranches];
  float* workspace;  // (slices, sums.size)
  int64_t slices;
  int parts, part_outputs;

  // What a block has in shared memory, in this order: a tile of x, one of g, drop-path's factors of this tile and the
  // next, and the sums of its part of the outputs: rows first, then the branches.
  VA_HOST_DEVICE int64_t x_bytes() const { return sums.has_weights() || p.x_grad.data ? tile_bytes(p.in) : 0; }
  VA_HOST_DEVICE int keep_floats() const { return p.drop_path.active() ? p.branches * kFour : 0; }
  VA_HOST_DEVICE int64_t row_floats() const { return padded(part_outputs); }
  VA_HOST_DEVICE int64_t weight_floats(int branch) const {
    return sums.weight[branch] < 0 ? 0 : padded(part_outputs * p.branch[branch].group_in);
  }
  VA_HOST_DEVICE int64_t sum_floats() const {
    int64_t floats = sums.rows * row_floats();
    for (int i = 0; i < p.branches; ++i) floats += weight_floats(i);
    return floats;
  }
  // Blocks of the branch that has most of them; their numbers are divided (Divisor).
  int64_t most_blocks() const {
    int64_t most = 0;
    for (int i = 0; i < p.branches; ++i) {
      if (sums.weight[i] >= 0) most = std::max(most, part_outputs / kSide * (p.branch[i].group_in / kSide));
    }
    return most;
  }
  int64_t shared_bytes() const {
    return x_bytes() + tile_bytes(part_outputs) + (2 * keep_floats() + sum_floats()) * int64_t(sizeof(float));
  }

  VA_DEVICE void operator()() const {
    const int64_t slice = block_index() / parts;
    const int first_output = int(block_index() - slice * parts) * part_outputs, left = int(p.out) - first_output;
    const Tile x{dynamic_shared(), int(p.in)}, grad{x.base + x_bytes(), left < part_outputs ? left : part_outputs};
    float* const keeps = reinterpret_cast<float*>(grad.base + tile_bytes(part_outputs));
    float* const own_sums = keeps + 2 * keep_floats();
    const auto keeps_of = [&](int64_t tile) { return TileKeeps{keeps + tile % 2 * keep_floats()}; };
    const int64_t tiles = (p.rows + kFour - 1) / kFour, end = tiles * (slice + 1) / slices;
    int64_t tile = tiles * slice / slices;
    for (int i = thread_index(); i < sum_floats(); i += thread_count()) own_sums[i] = 0;
    if (p.drop_path.active()) keeps_of(tile).stage(p, tile * kFour);
    sync_threads();
    for (; tile < end; ++tile) {
      const int64_t row = tile * kFour;
      const TileKeeps keep = keeps_of(tile);
      stage<1, kColumns>(p, p.grad, p.out, row, first_output, grad,
                         [&](int column, const auto& values) { add_columns(own_sums + column, keep, values); });
      if (sums.has_weights()) stage<1, kColumns>(p, p.x, p.in, row, 0, x, [](int, const auto&) {});
      if (p.drop_path.active()) keeps_of(tile + 1).stage(p, row + kFour);
      sync_threads();
      if (sums.has_weights()) {
        add_weights(own_sums + sums.rows * row_floats(), x, grad, keep, first_output);
        sync_threads();
      }
      if (p.x_grad.data) {
        find_input_grad(x, grad, keep);
        sync_threads();
        // By the threads that bring the next x to these places.
        write_input_grad(x, row);
      }
    }
    leave(own_sums, slice, first_output, grad.columns);
  }

  // Σ g of some columns.
  VA_DEVICE void add_columns(float* to, const TileKeeps& keeps, const float (&values)[kFour][kColumns]) const {
    VA_ROLL
    for (int row = 0; row < sums.rows; ++row, to += row_floats()) {
      const int branch = sums.branch_of_row[row];
      const Unit factors = branch < 0 ? Unit{{1, 1, 1, 1}} : keeps.unit(branch);
      float terms[kColumns] = {};
      VA_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        VA_UNROLL
        for (int r = 0; r < kFour; ++r) terms[c] += factors.row[r] * values[r][c];
      }
      add_to(to, terms);
    }
  }

  // g · x of all blocks of all weights.
  VA_DEVICE void add_weights(float* to, const Tile& x, const Tile& grad, const TileKeeps& keeps,
                             int first_output) const {
    VA_ROLL
    for (int branch = 0; branch < p.branches; to += weight_floats(branch++)) {
      if (sums.weight[branch] < 0) continue;
      const Grouping& own = grouping[branch];
      const int across = own.group_in / kSide, blocks = grad.columns / kSide * across;
      Unit keep{};
      if (p.drop_path.active()) keep = keeps.unit(branch);
      VA_ROLL
      for (int block = thread_index(); block < blocks; block += thread_count()) {
        const int down = own.by_blocks.divide(block), output = down * kSide;
        const int group = own.by_group_out.divide(first_output + output);
        Sources sources(group * own.group_in + (block - down * across) * kSide, own, p.shuffle, x.columns);
        Unit g[kSide];
        VA_UNROLL
        for (int o = 0; o < kSide; ++o) g[o] = load_unit(grad.unit(output + o));
        float terms[kSide * kSide] = {};
        VA_UNROLL
        for (int v = 0; v < kSide; ++v) {
          Unit unit = load_unit(x.unit(sources.next()));
          multiply_if(p.drop_path.active(), unit, keep);
          VA_UNROLL
          for (int o = 0; o < kSide; ++o) {
            VA_UNROLL
            for (int r = 0; r < kFour; ++r) terms[o * kSide + v] += g[o].row[r] * unit.row[r];
          }
        }
        add_to(to + block * kSide * kSide, terms);
      }
    }
  }

  // x's gradient without its base into the tile, group by group. Branches of as many groups meet in registers.
  VA_DEVICE void find_input_grad(const Tile& to, const Tile& grad, const TileKeeps& keeps) const {
    int end = 0;
    VA_ROLL
    for (int first = 0; first < p.branches; first = end) {
      for (end = first + 1; end < p.branches && grouping[end].groups == grouping[first].groups;) ++end;
      if (first > 0) sync_threads();
      const Grouping& own = grouping[first];
      VA_ROLL
      for (int place = thread_index() * kSide; place < to.columns; place += thread_count() * kSide) {
        const int group = own.by_group_in.divide(place);
        Unit units[kSide] = {};
        VA_ROLL
        for (int branch = first; branch < end; ++branch) add_group(units, grad, keeps, branch, group, place);
        Sources sources(place, own, p.shuffle, to.columns);
        VA_UNROLL
        for (int v = 0; v < kSide; ++v) {
          unsigned char* const at = to.unit(sources.next());
          if (first > 0) {
            const Unit before = load_unit(at);
            VA_UNROLL
            for (int r = 0; r < kFour; ++r) units[v].row[r] += before.row[r];
          }
          store_unit(at, units[v]);
        }
      }
    }
  }

  // What the outputs of a group give to some of its places.
  VA_DEVICE void add_group(Unit (&units)[kSide], const Tile& grad, const TileKeeps& keeps, int branch, int group,
                           int place) const {
    const Grouping& own = grouping[branch];
    const Operand& weight = p.branch[branch].weight;
    const int begin = group * own.group_out, column = place - group * own.group_in;
    Unit keep{};
    if (p.drop_path.active()) keep = keeps.unit(branch);
    with_dtype(weight.dtype, [&](auto neighbours) {
      VA_ROLL
      for (int output = begin; output < begin + own.group_out; output += kSide) {
        float weights[kSide][kSide];
        VA_UNROLL
        for (int o = 0; o < kSide; ++o) {
          neighbours.load(weights[o], weight, (output + o) * int64_t(own.group_in) + column);
        }
        VA_UNROLL
        for (int o = 0; o < kSide; ++o) {
          neighbours.round(weights[o], p.compute);
          Unit g = load_unit(grad.unit(output + o));
          multiply_if(p.drop_path.active(), g, keep);
          VA_UNROLL
          for (int v = 0; v < kSide; ++v) {
            VA_UNROLL
            for (int r = 0; r < kFour; ++r) units[v].row[r] += weights[o][v] * g.row[r];
          }
        }
      }
    });
  }

  VA_DEVICE static void multiply_if(bool active, Unit& unit, const Unit& keep) {
    if (!active) return;
    VA_UNROLL
    for (int r = 0; r < kFour; ++r) unit.row[r] *= keep.row[r];
  }

  VA_DEVICE void write_input_grad(const Tile& from, int64_t first_row) const {
    const int rows = p.rows - first_row < kFour ? int(p.rows - first_row) : kFour;
    VA_ROLL
    for (int column = thread_index() * kColumns; column < from.columns; column += thread_count() * kColumns) {
      const int64_t index = first_row * p.in + column;
      float values[kFour][kColumns] = {};
      if (p.x_grad_base.data) {
        with_dtype(p.x_grad_base.dtype, [&](auto neighbours) {
          VA_UNROLL
          for (int r = 0; r < kFour; ++r) {
            if (r < rows) neighbours.load(values[r], p.x_grad_base, index + r * p.in);
          }
        });
      }
      VA_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        const Unit unit = load_unit(from.unit(column + c));
        VA_UNROLL
        for (int r = 0; r < kFour; ++r) values[r][c] += unit.row[r];
      }
      VA_UNROLL
      for (int r = 0; r < kFour; ++r) {
        if (r < rows) store_neighbours(p.x_grad, index + r * p.in, values[r]);
      }
    }
  }

  // Brings the sums of this part and slice to the workspace. All threads have come by a barrier since the last of them.
  VA_DEVICE void leave(const float* from, int64_t slice, int first_output, int outputs) const {
    float* const to = workspace + slice * sums.size;
    const auto copy = [](float* to, const float* from, int count) {
      VA_ROLL
      for (int i = thread_index(); i < count; i += thread_count()) to[i] = from[i];
    };
    VA_ROLL
    for (int row = 0; row < sums.rows; ++row, from += row_floats()) {
      copy(to + sums.first_row + row * p.out + first_output, from, outputs);
    }
    VA_ROLL
    for (int branch = 0; branch < p.branches; from += weight_floats(branch++)) {
      const int64_t group_in = p.branch[branch].group_in;
      if (sums.weight[branch] >= 0) {
        copy(to + sums.weight[branch] + first_output * group_in, from, int(outputs * group_in));
      }
    }
  }
};

// Adds what the slices left and writes the gradients: 32 neighbouring sums a block, each by eight threads that take
// every eighth slice.
struct ConsolidatorBackwardEnd {
  static constexpr int kMaxThreads = 256, kMinBlocks = 1;
  static constexpr bool kNeedsSm80 = true;

  ConsolidatorBackward p;
  ConsolidatorSums sums;
  const float* workspace;
  int slices, side;

  VA_DEVICE void operator()() const {
    constexpr int kWarps = kMaxThreads / 32;
    struct Partial {
      float sum[kWarps][32];
    };
    VA_SHARED(Partial, partial);
    const int64_t index = block_index() * 32 + lane_index();
    const SliceSums own{(slices - warp_index() + kWarps - 1) / kWarps};
    float sum = index < sums.size ? own.sum(workspace + warp_index() * sums.size + index, kWarps * sums.size) : 0;
    partial.sum[warp_index()][lane_index()] = sum;
    sync_threads();
    if (warp_index() || index >= sums.size) return;
    for (int warp = 1; warp < kWarps; ++warp) sum += partial.sum[warp][lane_index()];
    index < sums.first_row ? write_weight(index, sum) : write_row(index - sums.first_row, sum);
  }

  VA_DEVICE void write_weight(int64_t index, float sum) const {
    int branch = p.branches - 1;
    while (sums.weight[branch] < 0 || index < sums.weight[branch]) --branch;
    index -= sums.weight[branch];
    const int64_t block = index / (side * side), inside = index - block * (side * side);
    const int64_t group_in = p.branch[branch].group_in, down = block / (group_in / side);
    const int64_t output = down * side + inside / side;
    const int64_t column = (block - down * (group_in / side)) * side + inside % side;
    store(p.weight_grad[branch], output * group_in + column, sum);
  }

  VA_DEVICE void write_row(int64_t index, float sum) const {
    const int64_t row = index / p.out, output = index - row * p.out;
    const int branch = sums.branch_of_row[row];
    if (branch >= 0) return store(p.bias_grad[branch], output, sum);
    if (p.grad_sum.data) store(p.grad_sum, output, sum);
    for (int i = 0; !p.drop_path.active() && i < p.branches; ++i) {
      if (p.bias_grad[i].data) store(p.bias_grad[i], output, sum);
    }
  }
};

// Two blocks for each of an H200's multiprocessors, of at least two tiles and, but for a single one, in at most 16 MB,
// whatever gradients are asked for.
int64_t slices_of(const ConsolidatorBackward& p) {
  constexpr int64_t kMost = 264, kMostFloats = 4 << 20, kRows = 2 * kFour;
  int64_t floats = p.out * (1 + p.branches);
  for (int i = 0; i < p.branches; ++i) floats += p.out * p.branch[i].group_in;
  return std::max<int64_t>(1, std::min({kMost, (p.rows + kRows - 1) / kRows, kMostFloats / floats}));
}

// Launches what the gradients need, if `launches`; false where it does not fit.
template <int kSide>
bool run_backward(const ConsolidatorBackward& p, float* workspace, Stream stream, bool launches) {
  using Kernel = ConsolidatorBackwardKernel<kSide>;
  static_assert(sizeof(Kernel) <= 4096, "the parameters of a kernel");
  const ConsolidatorSums sums(p);
  int64_t items = std::max(p.in, p.out) / kSide;
  for (int i = 0; i < p.branches; ++i) items = std::max(items, p.out * p.branch[i].group_in / (kSide * kSide));
  const int threads = threads_for(items);
  const auto has_room = [](const Kernel& kernel) {
    return kernel.shared_bytes() <= device().shared_bytes && kernel.most_blocks() <= kMostColumns;
  };
  const auto fits = [&](const Kernel& kernel) {
    return has_room(kernel) && resident_blocks<Kernel>(threads, kernel.shared_bytes()) > 0;
  };
  const auto launch_main = [&](Kernel kernel) {
    for (int i = 0; i < p.branches; ++i) kernel.grouping[i] = Grouping(p.branch[i], kSide);
    const int64_t bytes = kernel.shared_bytes();
    if (kernel.sums.size == 0) {
      // No sums hang on the slices.
      const int64_t resident = int64_t(resident_blocks<Kernel>(threads, bytes)) * device().multiprocessors;
      kernel.slices = std::min((p.rows + kFour - 1) / kFour, resident);
    }
    launch(stream, kernel.slices * kernel.parts, threads, bytes, kernel);
  };
  const auto launch_end = [&] {
    ConsolidatorBackwardEnd end{p, sums, workspace, int(slices_of(p)), kSide};
    if (sums.size > 0) launch(stream, (sums.size + 31) / 32, ConsolidatorBackwardEnd::kMaxThreads, 0, end);
  };

  Kernel whole{p, sums, {}, workspace, slices_of(p), 1, int(p.out)};
  if (sums.size == 0 && !p.x_grad.data) return true;
  if (fits(whole)) {
    if (launches) launch_main(whole), launch_end();
    return true;
  }
  // x's gradient alone, and the sums in parts.
  Kernel input = whole, part = whole;
  input.p.grad_sum = {};
  std::fill(input.p.weight_grad, input.p.weight_grad + p.branches, Result{});
  std::fill(input.p.bias_grad, input.p.bias_grad + p.branches, Result{});
  input.sums = ConsolidatorSums(input.p);
  part.p.x_grad = {};
  // In eights, so that each part begins where vectors do.
  do {
    part.part_outputs = int(((p.out + part.parts - 1) / part.parts + 7) / 8 * 8);
  } while (!has_room(part) && part.parts++ < p.out);
  part.parts = int((p.out + part.part_outputs - 1) / part.part_outputs);
  if ((p.x_grad.data && !fits(input)) || !fits(part)) return false;
  if (launches) {
    if (p.x_grad.data) launch_main(input);
    launch_main(part);
    launch_end();
  }
  return true;
}

bool run_backward(const ConsolidatorBackward& p, float* workspace, Stream stream, bool launches) {
  const bool aligned = begins_at(p.grad, p.out, 4) && begins_at(p.x, p.in, 4) && begins_at(p.x_grad_base, p.in, 4) &&
                       begins_at(p.x_grad, p.in, 4);
  return serves(p) &&
         with_side(p, aligned, [&](auto side) { return run_backward<side>(p, workspace, stream, launches); });
}

int64_t consolidator_backward_workspace(const ConsolidatorBackward& p) {
  if (!run_backward(p, nullptr, nullptr, false)) return -1;
  return slices_of(p) * ConsolidatorSums(p).size * int64_t(sizeof(float));
}

bool consolidator_backward_fast(const ConsolidatorBackward& p, void* workspace, Stream stream) {
  return run_backward(p, static_cast<float*>(workspace), stream, true);
}

}  // namespace vitadapter::cuda
