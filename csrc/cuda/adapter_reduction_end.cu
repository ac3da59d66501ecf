// How do the slices' sums become the gradients of the adapter's weights? Stage two of adapter_reduction.cuh: one kernel
// for every arithmetic.
#include "adapter_reduction.cuh"
#include "slices.cuh"

namespace vitadapter::cuda {

// A group of lanes has a row of (dim, rank), a lane quads of it; then a thread has a quad of (rank, dim); then one has
// an element of (rank).
struct AdapterReductionEnd {
  static constexpr int kMaxThreads = 128, kMinBlocks = 8;
  static constexpr bool kNeedsSm80 = false;

  AdapterBackward p;
  SliceSums slices;
  int padded_rank;
  int64_t up_threads = 0, down_threads = 0;  // in whole warps; 0: nothing of it is asked for
  int group = 1;                             // lanes, a power of two
  // As plan_adapter_reduction() places them.
  const float *up_product = nullptr, *up_sums = nullptr, *down_product = nullptr, *down_sums = nullptr;
  float* scale_parts = nullptr;
  int* ended = nullptr;

  VA_DEVICE void operator()() const {
    const int64_t thread = block_index() * thread_count() + thread_index();
    float by_scale = 0;
    if (thread < up_threads) {
      by_scale = finish_up(thread / group, int(thread % group));
    } else if (thread < up_threads + down_threads) {
      finish_down(thread - up_threads);
    } else if (p.down_bias_grad.data && thread - up_threads - down_threads < p.rank) {
      const int64_t rank = thread - up_threads - down_threads;
      store(p.down_bias_grad, rank, slices.sum(down_sums + rank, p.rank));
    }
    const int parts = int((up_threads + kMaxThreads - 1) / kMaxThreads);
    if (p.scale_grad.data && !p.scale_is_channel && block_index() < parts) finish_scale(by_scale, parts);
  }

  // Returns what the column adds to a scalar scale's gradient, in one of its lanes.
  VA_DEVICE float finish_up(int64_t column, int lane) const {
    // All lanes of a warp take part in shuffles.
    const bool inside = column < p.dim;
    const float scale = inside ? p.scale_at<float>(column) : 0.0f;
    float by_scale = 0;
    for (int rank = 4 * lane; p.needs_up_product() && inside && rank < p.rank; rank += 4 * group) {
      float quad[4];
      slices.sum(quad, up_product + column * padded_rank + rank, p.dim * padded_rank);
      VA_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (rank + i >= p.rank) break;
        const int64_t index = column * p.rank + rank + i;
        if (p.scale_grad.data) by_scale += rounded(load<float>(p.up, index), p.compute) * quad[i];
        if (p.up_grad.data) store(p.up_grad, index, scale * quad[i]);
      }
    }
    for (int other = group / 2; p.scale_grad.data && other; other /= 2) {
      by_scale += float_of(shuffle_xor(bits_of(by_scale), other));
    }
    if (!inside || lane) return 0;
    const float sum = p.needs_grad_sum() ? slices.sum(up_sums + column, p.dim) : 0.0f;
    if (p.up_bias_grad.data) store(p.up_bias_grad, column, scale * sum);
    if (!p.scale_grad.data) return 0;
    if (p.up_bias.data) by_scale += load<float>(p.up_bias, column) * sum;
    if (p.scale_is_channel) store(p.scale_grad, column, by_scale);
    return by_scale;
  }

  VA_DEVICE void finish_down(int64_t index) const {
    const int64_t padded = ReductionProduct::padded_columns(p.dim), quads = padded / 4;
    const int64_t rank = index / quads, column = (index - rank * quads) * 4;
    if (rank >= p.rank) return;
    float quad[4];
    slices.sum(quad, down_product + rank * padded + column, p.rank * padded);
    VA_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (column + i < p.dim) store(p.down_grad, rank * p.dim + column + i, quad[i]);
    }
  }

  // The last block to end adds the blocks' parts.
  VA_DEVICE void finish_scale(float by_scale, int parts) const {
    struct Threads {
      float by_scale[kMaxThreads];
    };
    VA_SHARED(Threads, threads);
    threads.by_scale[thread_index()] = by_scale;
    sync_threads();
    if (warp_index()) return;
    const int lane = lane_index();
    const float part = sum_of_warp(kMaxThreads, [&](int i) { return threads.by_scale[i]; });
    if (lane == 0) scale_parts[block_index()] = part;
    if (!is_last_warp(ended, parts)) return;
    const float sum = sum_of_warp(parts, [&](int i) { return scale_parts[i]; });
    if (lane == 0) store(p.scale_grad, 0, sum);
  }
  template <typename Term>
  VA_DEVICE static float sum_of_warp(int count, const Term& term) {
    float sum = 0;
    for (int i = lane_index(); i < count; i += 32) sum += term(i);
    for (int other = 16; other; other /= 2) sum += float_of(shuffle_xor(bits_of(sum), other));
    return sum;
  }
};

void launch_adapter_reduction_end(const AdapterOrArcBackward& p, const AdapterReductionPlan& plan, int padded_rank,
                                  void* workspace, Stream stream) {
  const auto at = [&](int64_t bytes) { return reinterpret_cast<float*>(static_cast<char*>(workspace) + bytes); };
  AdapterReductionEnd end{p, {plan.slices}, padded_rank};
  end.up_product = at(0);
  end.up_sums = at(plan.up_sums);
  end.down_product = at(plan.down_product);
  end.down_sums = at(plan.down_sums);
  end.scale_parts = at(plan.parts);
  end.ended = reinterpret_cast<int*>(at(plan.ended));
  const auto whole_warps = [](int64_t threads) { return (threads + 31) / 32 * 32; };
  while (p.needs_up_product() && end.group < 32 && 4 * end.group < p.rank) end.group *= 2;
  if (plan.up_tiles) end.up_threads = whole_warps(p.dim * end.group);
  if (p.down_grad.data) end.down_threads = whole_warps(p.rank * ReductionProduct::padded_columns(p.dim) / 4);
  const int64_t threads = end.up_threads + end.down_threads + (p.down_bias_grad.data ? p.rank : 0);
  constexpr int kThreads = AdapterReductionEnd::kMaxThreads;
  launch(stream, (threads + kThreads - 1) / kThreads, kThreads, 0, end);
}

}  // namespace vitadapter::cuda
