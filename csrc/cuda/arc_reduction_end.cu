// How do the slices' sums become the gradients of ARC's parameters? Stage two of adapter_reduction.cuh:
//
//   g_basis = gᵀ · z + Gᵀ ∘ rescale,  g_rescale = colsum(basis ∘ Gᵀ),  g_bias = Σ g
//
// with G = ghᵀ · x, of which the slices' sums lie as (dim, rank), as the basis does. A sum over all rows of the basis
// is left to the last block to end, which adds the blocks' parts in an order of its own, always the same.
#include "adapter_reduction.cuh"
#include "slices.cuh"

namespace vitadapter::cuda {

// A group of lanes has a row of the basis, a lane quads of it.
struct ArcReductionEnd {
  static constexpr int kMaxThreads = 128, kMinBlocks = 8;
  static constexpr bool kNeedsSm80 = false;

  AdapterOrArcBackward p;
  SliceSums slices;
  int padded_rank;
  int group;  // lanes, a power of two
  // As plan_adapter_reduction() places them.
  const float *up_product, *up_sums, *down_product;
  float* parts;  // (blocks, ranks in whole quads)
  int* ended;

  // Lanes for a row of the basis, and with them the rows of a block.
  static int lanes(int64_t rank) {
    int lanes = 1;
    while (lanes < 32 && 4 * lanes < rank) lanes *= 2;
    return lanes;
  }
  static int64_t blocks(int64_t dim, int64_t rank) { return (dim * lanes(rank) + kMaxThreads - 1) / kMaxThreads; }

  VA_DEVICE int lane() const { return thread_index() % group; }
  VA_DEVICE int row() const { return thread_index() / group; }
  VA_DEVICE int rows() const { return kMaxThreads / group; }

  VA_DEVICE void operator()() const {
    const int64_t column = block_index() * rows() + row();
    if (p.up_bias_grad.data && lane() == 0 && column < p.dim) {
      store(p.up_bias_grad, column, slices.sum(up_sums + column, p.dim));
    }
    if (!p.needs_down_product()) return;
    const int quads = int(p.rank + 3) / 4;
    for (int first = 0; first < quads; first += group) {
      const int quad = first + lane();
      float by_rescale[4] = {};
      if (column < p.dim && quad < quads) finish_quad(by_rescale, column, 4 * quad);
      if (!p.rescale_grad.data) continue;
      add_rows(by_rescale);
      if (row() == 0 && quad < quads) store_quad<Float32>(parts + (block_index() * quads + quad) * 4, by_rescale);
    }
    if (p.rescale_grad.data && is_last_block()) finish_rescale(quads);
  }

  // Finds what a quad of the basis adds to the rescale's gradient.
  VA_DEVICE void finish_quad(float (&by_rescale)[4], int64_t column, int rank) const {
    const int64_t from = column * padded_rank + rank, size = p.dim * padded_rank;
    float up[4] = {}, down[4];
    if (p.up_grad.data) slices.sum(up, up_product + from, size);
    slices.sum(down, down_product + from, size);
    VA_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (rank + i >= p.rank) break;
      const int64_t index = column * p.rank + rank + i;
      by_rescale[i] = load<float>(p.up, index) * down[i];
      if (p.up_grad.data) store(p.up_grad, index, up[i] + load<float>(p.rescale, rank + i) * down[i]);
    }
  }

  // Adds the quads of all rows of the block to that of the first.
  VA_DEVICE void add_rows(float (&quad)[4]) const {
    struct Quads {
      alignas(16) float of_thread[kMaxThreads][4];
    };
    VA_SHARED(Quads, quads);
    store_quad<Float32>(quads.of_thread[thread_index()], quad);
    sync_threads();
    for (int other = 1; other < rows() && row() == 0; ++other) {
      float more[4];
      load_quad<Float32>(more, quads.of_thread[other * group + thread_index()]);
      VA_UNROLL
      for (int i = 0; i < 4; ++i) quad[i] += more[i];
    }
    sync_threads();
  }

  // The first warp has left the block's parts behind: the groups are no larger than a warp.
  VA_DEVICE bool is_last_block() const {
    struct Answer {
      bool is_last;
    };
    VA_SHARED(Answer, answer);
    if (warp_index() == 0) {
      const bool is_last = is_last_warp(ended, int(block_count()));
      if (lane_index() == 0) answer.is_last = is_last;
    }
    sync_threads();
    return answer.is_last;
  }

  VA_DEVICE void finish_rescale(int quads) const {
    for (int first = 0; first < quads; first += group) {
      const int quad = first + lane();
      const SliceSums of_row{(int(block_count()) - row() + rows() - 1) / rows()};
      float sum[4] = {};
      if (quad < quads) of_row.sum(sum, parts + (row() * quads + quad) * 4, int64_t(rows()) * quads * 4);
      add_rows(sum);
      if (row()) continue;
      VA_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (4 * quad + i < p.rank) store(p.rescale_grad, 4 * quad + i, sum[i]);
      }
    }
  }
};

int64_t arc_reduction_end_parts(int64_t dim, int64_t rank) {
  return ArcReductionEnd::blocks(dim, rank) * ((rank + 3) / 4 * 4);
}

void launch_arc_reduction_end(const AdapterOrArcBackward& p, const AdapterReductionPlan& plan, int padded_rank,
                              void* workspace, Stream stream) {
  const auto at = [&](int64_t bytes) { return reinterpret_cast<float*>(static_cast<char*>(workspace) + bytes); };
  launch(stream, ArcReductionEnd::blocks(p.dim, p.rank), ArcReductionEnd::kMaxThreads, 0,
         ArcReductionEnd{p,
                         {plan.slices},
                         padded_rank,
                         ArcReductionEnd::lanes(p.rank),
                         at(0),
                         at(plan.up_sums),
                         at(plan.down_product),
                         at(plan.parts),
                         reinterpret_cast<int*>(at(plan.ended))});
}

}  // namespace vitadapter::cuda
