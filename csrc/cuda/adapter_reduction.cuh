// How do the weights of an adapter, or of ARC, get their gradients? In two kernels behind the one that finds gx; the
// mathematics is in ../common/adapter.h and ../common/arc.h.
//
// The idea. G = g'ᵀ · z and g_down = ghᵀ · x are two products over all rows (reduction.cuh): stage one sums slices of
// the rows, Σg' and Σgh along with them, and stage two adds the slices in their order and finishes what is made of
// the sums: g_up, g_up_bias and g_scale all come from G and Σg'. z and gh were left behind by the kernel before, as the
// products take them; where they are float32, z is found anew from the hidden layer. g' is never kept: the masks are
// drawn again. A learned scalar scale needs a sum over all channels: the last block of stage two to end takes it.
//
// The traffic, in device memory: x and g once, z and gh once, the gradients once. For N rows of D elements of b bytes
// that is 2 · N · (D + rank) · b, so 42 MB at N = 12,608, D = 768 and rank 64 in bfloat16, and that is the floor too if
// x and g have left the L2 cache since the kernel before; 10 µs at 4.3 TB/s. The products are 4 · N · D · rank
// operations, 3 µs at 790 TFLOP/s. On top, through the L2 cache: z and gh once for each tile of 128 columns but the
// first, 16 MB; the slices' sums, 22 of 0.4 MB, 8.7 MB written and 8.7 MB read.
//
// Why not in one kernel with gx, which has g in its hands? On paper, at rank 64 and D = 768: the sums of both products
// (393 KB) fit in no multiprocessor's registers, but in those of a cluster of four blocks on sm_90, 192 columns each,
// beside its parts of the weights (49 KB of shared memory) and two tiles of 64 rows of g and x (98 KB). That moves
// 4,864 bytes a token and not 6,912. But each of 33 clusters then leaves sums behind, 13 MB written and read where the
// slices have 8.7, so that at 12,608 tokens 16 % are saved, and 28 % at 131,072; and a tile, 2.4 µs of a cluster's
// share of the memory, waits for two exchanges across the cluster, gh and its products, with no second block to hide
// them. Ranks above 64 or D above 1,024 would not fit, and sm_80 has no clusters: these two kernels would have to stay
// beside it. At ranks up to 16 one block can hold all sums, for 26 % less traffic at 131,072 tokens and nothing less at
// 12,608. So: not before a GPU has shown what the exchanges cost.
//
// Not yet run on a GPU. By the count (sm_90, bfloat16, rank 64, no masks) a step of 64 rows and 128 columns is some 255
// instructions a warp, 320 with its sums: 6 µs of issue for stage one; and 88 KB through shared memory: 7 µs. So the
// memory binds, if two blocks hide each other's waits. Philox adds about 20 instructions an element.
#pragma once

#include "activation.cuh"
#include "adapter.h"
#include "reduction.cuh"

namespace vitadapter::cuda {

// What the adapter's operands go through on their way: product 0 is zᵀ · g', product 1 is ghᵀ · x.
template <typename Math>
struct AdapterReductionOperands {
  static constexpr bool kChangesLeft = Math::kBytes == 4;

  Activation activation;
  Dropout dropout, dropout_out, drop_path;
  int64_t rows_per_sample;
  double samples_per_row;

  VA_DEVICE uint64_t seed() const {
    return dropout.active() || dropout_out.active() || drop_path.active() ? uint64_t(*dropout.seed) : 0;
  }
  VA_DEVICE bool changes_left(int product) const {
    return product == 0 && (dropout.active() || activation != Activation::kIdentity);
  }
  VA_DEVICE bool changes_right(int product) const {
    return product == 0 && (dropout_out.active() || drop_path.active());
  }
  VA_DEVICE bool has_row_factors(int product) const { return product == 0 && drop_path.active(); }
  VA_DEVICE float row_factor(uint64_t seed, int64_t row) const {
    // row / rows_per_sample, as a GPU divides integers of 64 bits by a call.
    int64_t sample = int64_t(double(row) * samples_per_row);
    const int64_t rest = row - sample * rows_per_sample;
    sample += rest >= rows_per_sample ? 1 : rest < 0 ? -1 : 0;
    return drop_path.factor<float>(drop_path.words(seed, sample, 0).word[0]);
  }

  VA_DEVICE void change_left(float (&quad)[4], uint64_t seed, int64_t row, int rank) const {
    activate_all<4>(activation, [&](int i) -> float& { return quad[i]; });
    drop_out(quad, dropout, seed, row, rank);
  }
  VA_DEVICE void change_right(float (&quad)[4], uint64_t seed, float row_factor, int64_t row, int column) const {
    float factors[4] = {row_factor, row_factor, row_factor, row_factor};
    drop_out(factors, dropout_out, seed, row, column);
    VA_UNROLL
    for (int i = 0; i < 4; ++i) quad[i] *= factors[i];
  }
};

// By the shape alone, the places also by what is asked for. The workspace holds of each slice what its rows add to G,
// Σg', g_down and Σgh; then each block's part of the gradient of a scalar scale, or of ARC's rescale; then the number
// of blocks that have ended.
struct AdapterReductionPlan {
  bool served = true;  // false: not in as many slices as are asked for, or not on this device
  int slices = 0;
  int64_t slice_rows = 0;
  int up_tiles = 0, down_tiles = 0;  // of columns, in a slice; 0: nothing is asked for
  int64_t up_sums = 0, down_product = 0, down_sums = 0, parts = 0, ended = 0;  // where they begin, in bytes
  int64_t bytes = 0;                                                           // 0: there is nothing to do
};

// Floats that ARC's stage two leaves behind for its last block.
int64_t arc_reduction_end_parts(int64_t dim, int64_t rank);

template <typename Math>
AdapterReductionPlan plan_adapter_reduction(const AdapterOrArcBackward& p, int asked_slices) {
  const bool up_sums = p.needs_grad_sum(), down_product = p.needs_down_product(), down_sums = p.down_bias_grad.data;
  AdapterReductionPlan plan;
  if (!p.needs_up_product() && !up_sums && !down_product && !down_sums) return plan;
  // Of one slice, in bytes.
  const auto bytes_of = [](bool needs, int64_t count) { return needs ? count * int64_t(sizeof(float)) : 0; };
  const int64_t up_product_bytes = bytes_of(p.needs_up_product(), ReductionProduct::size<Math>(p.rank, p.dim, false));
  const int64_t up_sums_bytes = bytes_of(up_sums, p.dim);
  const bool by_rank = !p.is_arc();
  const int64_t down_product_bytes = bytes_of(down_product, ReductionProduct::size<Math>(p.rank, p.dim, by_rank));
  const int64_t down_sums_bytes = bytes_of(down_sums, p.rank);
  // Of all, so that a gradient has the same bits whatever else is asked for.
  const int64_t slice_bytes = bytes_of(true, ReductionProduct::size<Math>(p.rank, p.dim, false) + p.dim +
                                                 ReductionProduct::size<Math>(p.rank, p.dim, by_rank) + p.rank);
  // A scalar scale has no more than one of each channel.
  const int64_t part_bytes = bytes_of(true, p.is_arc() ? arc_reduction_end_parts(p.dim, p.rank) : p.dim);
  // 16 MB beside what the kernel before leaves behind, of which the padding is counted here; and a little for the
  // places between.
  const int64_t padding = p.rows * (padded_rank<Math>(p.rank) - p.rank) * int64_t(sizeof(float));
  // Where there are so many rows that the padding alone is more, 4 MB on top of it.
  const int64_t most = std::max<int64_t>((16 << 20) - padding, 4 << 20) - 256 - part_bytes;
  for_rank(p.rank, [&](auto ranks) {
    constexpr int kColumns = ReductionShape<Math, ranks>::kColumns;
    const int tiles = int((p.dim + kColumns - 1) / kColumns);
    if (up_product_bytes || up_sums_bytes) plan.up_tiles = tiles;
    if (down_product || down_sums) plan.down_tiles = down_product ? tiles : 1;
    const auto slices = cut_into_slices<Math, ranks>(p.rows, 2 * tiles, slice_bytes, most, asked_slices);
    plan.slices = slices.count;
    plan.slice_rows = slices.rows;
    using Kernel = ReductionKernel<Math, false, ranks, AdapterReductionOperands<Math>>;
    plan.served = plan.slices && resident_blocks<Kernel>(Kernel::kMaxThreads, Kernel::kSharedBytes);
  });
  const auto place = [&](int64_t bytes) {
    const int64_t begin = plan.bytes;
    plan.bytes += (bytes + 15) / 16 * 16;
    return begin;
  };
  place(plan.slices * up_product_bytes);
  plan.up_sums = place(plan.slices * up_sums_bytes);
  plan.down_product = place(plan.slices * down_product_bytes);
  plan.down_sums = place(plan.slices * down_sums_bytes);
  plan.parts = place(part_bytes);
  plan.ended = place(sizeof(int));
  return plan;
}

// Stage two (adapter_reduction_end.cu, arc_reduction_end.cu), which every arithmetic shares. padded_rank: of the
// slices' sums, which ARC has both as (dim, padded_rank).
void launch_adapter_reduction_end(const AdapterOrArcBackward& p, const AdapterReductionPlan& plan, int padded_rank,
                                  void* workspace, Stream stream);
void launch_arc_reduction_end(const AdapterOrArcBackward& p, const AdapterReductionPlan& plan, int padded_rank,
                              void* workspace, Stream stream);

// hidden_grad, z: (rows, padded_rank()) as Math's dtype is, zeros beyond the rank, at multiples of 16 bytes; null where
// they are not needed, and z where Math has 4 bytes. workspace: plan.bytes, at a multiple of 16 bytes.
template <typename Math>
void launch_adapter_reduction(const AdapterOrArcBackward& p, const AdapterReductionPlan& plan, const void* hidden_grad,
                              const void* z, void* workspace, Stream stream) {
  if (!plan.bytes) return;
  const auto at = [&](int64_t bytes) { return reinterpret_cast<float*>(static_cast<char*>(workspace) + bytes); };
  const int padded = int(padded_rank<Math>(p.rank)), rank = int(p.rank), dim = int(p.dim);
  const auto rows_at = [](const Operand& of, int64_t row) {
    const int64_t vector = of.dtype == DType::kFloat32 ? 16 : 32 / Math::kBytes;
    return reinterpret_cast<uintptr_t>(of.data) % vector == 0 && row * element_size(of.dtype) % vector == 0;
  };
  const auto side = [&](const Operand& data, int stride, int columns, float* sums) {
    return ReductionSide{data, stride, columns, rows_at(data, stride), sums};
  };
  int* const ended = reinterpret_cast<int*>(at(plan.ended));
  ReductionProduct products[2];
  if (plan.up_tiles) {
    const auto hidden = Math::kBytes == 4 ? side({p.hidden, DType::kFloat32}, rank, rank, nullptr)
                                          : side({z, Math::kDType}, padded, rank, nullptr);
    products[0] = {hidden, side(p.grad, dim, dim, p.needs_grad_sum() ? at(plan.up_sums) : nullptr), plan.up_tiles,
                   p.needs_up_product() ? at(0) : nullptr, false};
  }
  if (plan.down_tiles) {
    products[1] = {
        side({hidden_grad, Math::kDType}, padded, rank, p.down_bias_grad.data ? at(plan.down_sums) : nullptr),
        side(p.x, dim, dim, nullptr), plan.down_tiles, p.needs_down_product() ? at(plan.down_product) : nullptr,
        !p.is_arc()};
  }
  const AdapterReductionOperands<Math> operands{p.activation, p.dropout,         p.dropout_out,
                                                p.drop_path,  p.rows_per_sample, 1.0 / double(p.rows_per_sample)};
  const auto own = [](const Operand& of) { return !of.data || of.dtype == Math::kDType; };
  const auto start = [&](auto is_own) {
    for_rank(p.rank, [&](auto ranks) {
      using Kernel = ReductionKernel<Math, is_own, ranks, AdapterReductionOperands<Math>>;
      launch_reduction(stream,
                       Kernel{{products[0], products[1]}, operands, p.rows, plan.slice_rows, plan.slices, ended});
    });
  };
  if (Math::kBytes == 2 && own(products[0].right.data) && own(products[1].right.data)) {
    start(std::bool_constant<Math::kBytes == 2>());
  } else {
    start(std::false_type());
  }
  if (p.is_arc()) return launch_arc_reduction_end(p, plan, padded, workspace, stream);
  launch_adapter_reduction_end(p, plan, padded, workspace, stream);
}

}  // namespace vitadapter::cuda
