// How are the fast adapter kernels launched? By the shape of the problem and what the device has: so many rows in a
// tile, x kept or streamed, so many places for it in shared memory.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <map>

#include "adapter_backward.cuh"
#include "adapter_forward.cuh"
#include "adapter_reduction.cuh"

namespace vitadapter::cuda {

template <typename Kernel>
SandwichPlan make_plan(const Sandwich& job, const Device& device, int threads, bool kept) {
  using S = typename Kernel::S;
  SandwichPlan plan;
  plan.threads = threads;
  plan.tile_rows = S::rows(threads);
  plan.kept = kept;
  plan.chunks = int((job.dim + S::kChunk - 1) / S::kChunk);
  plan.tiles = (job.rows + plan.tile_rows - 1) / plan.tile_rows;
  plan.middle_bytes = plan.tile_rows * S::kRankBytes * int((job.rank + S::kBlock - 1) / S::kBlock);
  if (job.changes_x) plan.changed_bytes = plan.tile_rows * 128;
  const int64_t bytes = std::max(element_size(job.x.dtype), job.base.data ? element_size(job.base.dtype) : 0);
  plan.place_bytes = int(plan.tile_rows * std::max<int64_t>(S::kChunk * bytes, 128));
  const int64_t fixed =
      2 * S::kWeightPlace + plan.middle_bytes + plan.changed_bytes + plan.tile_rows * int64_t(2 * sizeof(float));
  const int64_t room = (device.shared_bytes - fixed) / plan.place_bytes;
  // A ring of 64 KB keeps enough reads under way.
  const int64_t ring = std::max<int64_t>(4, (64 << 10) / plan.place_bytes);
  plan.places = int(kept ? plan.chunks : std::min(room, std::min<int64_t>(ring, 2 * plan.chunks)));
  if (!job.x.data) plan.places = 0;
  plan.shared_bytes = fixed + int64_t(plan.places) * plan.place_bytes;
  // With one place, nobody could wait for the next load before this one's last reader is done.
  if (plan.places > room || (job.x.data && plan.places < 2)) return {};
  const int resident = resident_blocks<Kernel>(threads, plan.shared_bytes);
  plan.blocks = std::min<int64_t>(plan.tiles, int64_t(resident) * device.multiprocessors);
  return plan;
}

// What a plan may cost, to choose between two; a model until a GPU has been asked. The bytes that its rows take through
// the L2 cache (x, a base, y and the weights; the hidden layer is every plan's), with as many rows for all
// multiprocessors as the busiest one has; and more where one has fewer than the eight warps that hide each other's
// waits.
inline double cost_of(const SandwichPlan& plan, const Sandwich& job, const Device& device) {
  const auto bytes_of = [](const auto& of, int64_t count) {
    return of.data ? double(count * element_size(of.dtype)) : 0.0;
  };
  const double base = plan.kept ? 0 : bytes_of(job.base, job.dim);
  const double weights = bytes_of(job.first, job.rank * job.dim) + bytes_of(job.second, job.dim * job.rank);
  const double row_bytes = bytes_of(job.x, job.dim) + base + bytes_of(job.y, job.dim);
  const double tiles = std::ceil(double(plan.tiles) / device.multiprocessors) * device.multiprocessors;
  const double warps = std::ceil(double(plan.blocks) / device.multiprocessors) * plan.threads / 32;
  return tiles * (plan.tile_rows * row_bytes + weights) * std::max(1.0, 8 / warps);
}

// The cheapest plan that fits, of those that are asked for. Without blocks if there is none.
template <typename Kernel>
SandwichPlan choose_plan(const Sandwich& job, const Device& device, const AdapterRequest& request) {
  using S = typename Kernel::S;
  SandwichPlan best;
  double least = 0;
  for (bool kept : {true, false}) {
    const bool can_keep = job.y.data && job.base.data == job.x.data && job.base.dtype == job.x.dtype;
    if ((kept && !can_keep) || (request.keep >= 0 && kept != bool(request.keep))) continue;
    for (int threads = S::kMaxThreads; threads >= S::kMinThreads; threads /= 2) {
      if (request.tile_rows && request.tile_rows != S::rows(threads)) continue;
      const SandwichPlan plan = make_plan<Kernel>(job, device, threads, kept);
      if (!plan.blocks) continue;
      const double cost = cost_of(plan, job, device);
      if (!best.blocks || cost < least) best = plan, least = cost;
    }
  }
  return best;
}

// A training loop comes with the same few shapes again and again, and to ask the driver takes longer than to launch.
template <typename Kernel>
SandwichPlan remembered_plan(const Sandwich& job, const Device& device, const AdapterRequest& request) {
  using Question = std::array<int64_t, 18>;
  thread_local std::map<Question, SandwichPlan> answers;
  const Question question{device.index,
                          device.multiprocessors,
                          device.shared_bytes,
                          job.rows,
                          job.dim,
                          job.rank,
                          request.tile_rows,
                          request.keep,
                          int64_t(job.x.dtype),
                          int64_t(job.first.dtype),
                          int64_t(job.second.dtype),
                          int64_t(job.base.dtype),
                          int64_t(job.y.dtype),
                          job.changes_x,
                          job.base.data == job.x.data,
                          !job.base.data,
                          !job.x.data,
                          !job.y.data};
  if (const auto found = answers.find(question); found != answers.end()) return found->second;
  if (answers.size() >= 1000) answers.clear();
  const SandwichPlan plan = choose_plan<Kernel>(job, device, request);
  if (plan.blocks) answers[question] = plan;
  return plan;
}

// Whether each row of `row` elements begins at a multiple of so many bytes.
template <typename Tensor>
bool rows_at(const Tensor& of, int64_t row, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(of.data) % bytes == 0 && row * element_size(of.dtype) % bytes == 0;
}
inline Alignment alignment_of(const Operand& weight, int64_t row) {
  if (rows_at(weight, row, 16)) return Alignment::kVector;
  return rows_at(weight, row, 2 * element_size(weight.dtype)) ? Alignment::kPair : Alignment::kElement;
}

// Completes a job with its plan and what it may be loaded by; false where there is no plan.
template <typename Kernel>
bool prepare(Sandwich& job, const AdapterRequest& request) {
  using Form = typename Kernel::Form;
  if (Form::kWidensX && job.x.dtype != DType::kFloat32) job.changes_x = true;
  job.plan = remembered_plan<Kernel>(job, device(), request);
  job.x_aligned = rows_at(job.x, job.dim, 16);
  job.base_aligned = rows_at(job.base, job.dim, 16);
  job.y_aligned = rows_at(job.y, job.dim, 4 * element_size(job.y.dtype));
  const auto is_by_dim = [](Layout layout, bool open) {
    return layout == Layout::kEither ? open : layout == Layout::kByDim;
  };
  job.first_alignment = alignment_of(job.first, is_by_dim(Form::kFirst, job.first_by_dim) ? job.rank : job.dim);
  job.second_alignment = alignment_of(job.second, is_by_dim(Form::kSecond, job.second_by_dim) ? job.rank : job.dim);
  return job.plan.blocks > 0;
}

// ---- the two directions

inline Sandwich sandwich_of(const AdapterProblem& p) {
  Sandwich job;
  job.rows = p.rows;
  job.dim = p.dim;
  job.rank = p.rank;
  return job;
}

template <typename Math, typename X, int kRanks>
bool launch_adapter_forward(const AdapterOrArcForward& p, const AdapterRequest& request, const Stream* stream) {
  using Kernel = AdapterForwardKernel<Math, X, kRanks>;
  Sandwich job = sandwich_of(p);
  job.x = p.x;
  job.first = p.is_arc() ? p.up : p.down;
  job.first_by_dim = p.is_arc();
  job.second = p.up;
  job.base = p.residual;
  job.y = p.y;
  if (!prepare<Kernel>(job, request)) return false;
  if (!stream) return true;
  const Operand hidden{p.is_gradient ? p.kept_hidden : p.hidden};
  launch(*stream, job.plan.blocks, job.plan.threads, job.plan.shared_bytes,
         Kernel{job, p, float(p.scale_value), rows_at(hidden, p.rank, 16), int(padded_rank<Math>(p.rank))});
  return true;
}

// ARC's gradient of x, and what is kept on the way there, as a problem of the forward kernel.
inline AdapterOrArcForward arc_gradient(const AdapterOrArcBackward& p, void* hidden_grad, void* z) {
  AdapterOrArcForward same;
  static_cast<AdapterProblem&>(same) = p;
  same.x = same.residual = p.grad;
  same.up_bias = {};
  same.y = p.x_grad;
  same.rescale = p.rescale;
  same.is_gradient = true;
  same.kept_hidden = p.hidden;
  same.hidden_grad = hidden_grad;
  same.z = z;
  return same;
}

// What the backward pass of a problem needs, and where in its workspace: gh and z, then the reduction's own.
struct AdapterBackwardPlan {
  Sandwich job;  // an adapter's
  AdapterReductionPlan reduction;
  int64_t padded_rank = 0;
  int64_t hidden_grad_bytes = 0, z_bytes = 0;  // 0: not written
  bool served = false, has_sandwich = false;

  int64_t bytes() const { return hidden_grad_bytes + z_bytes + reduction.bytes; }
};

template <typename Math, typename X, int kRanks>
AdapterBackwardPlan plan_adapter_backward(const AdapterOrArcBackward& p, const AdapterRequest& request) {
  AdapterBackwardPlan plan;
  plan.reduction = plan_adapter_reduction<Math>(p, request.slices);
  plan.padded_rank = padded_rank<Math>(p.rank);
  const int64_t matrix_bytes = p.rows * plan.padded_rank * Math::kBytes;
  if (p.needs_down_product() || p.down_bias_grad.data) plan.hidden_grad_bytes = matrix_bytes;
  if (p.needs_up_product() && Math::kBytes == 2) plan.z_bytes = matrix_bytes;
  plan.has_sandwich = p.needs_hidden_grad() || plan.z_bytes > 0;
  if (p.is_arc()) {
    const bool has_gradient =
        !plan.has_sandwich || adapter_or_arc_forward(arc_gradient(p, nullptr, nullptr), request, nullptr);
    plan.served = plan.reduction.served && has_gradient;
    return plan;
  }
  plan.job = sandwich_of(p);
  if (p.needs_hidden_grad()) plan.job.x = p.grad, plan.job.first = p.up;
  if (p.x_grad.data) {
    plan.job.second = p.down;
    plan.job.y = p.x_grad;
    if (p.residual_is_x) plan.job.base = p.grad;
  }
  plan.job.changes_x = AdapterBackwardKernel<Math, X, kRanks>::changes_grad(p);
  plan.served = plan.reduction.served;
  if (plan.served && plan.has_sandwich)
    plan.served = prepare<AdapterBackwardKernel<Math, X, kRanks>>(plan.job, request);
  return plan;
}

template <typename Math, typename X, int kRanks>
int64_t launch_adapter_backward(const AdapterOrArcBackward& p, const AdapterRequest& request,
                                const AdapterBackwardRun* run) {
  const AdapterBackwardPlan plan = plan_adapter_backward<Math, X, kRanks>(p, request);
  if (!plan.served) return -1;
  if (!run) return plan.bytes();
  char* const memory = static_cast<char*>(run->workspace);
  void* const hidden_grad = plan.hidden_grad_bytes ? memory : nullptr;
  void* const z = plan.z_bytes ? memory + plan.hidden_grad_bytes : nullptr;
  if (plan.has_sandwich && p.is_arc()) {
    if (!adapter_or_arc_forward(arc_gradient(p, hidden_grad, z), request, &run->stream)) return -1;
  } else if (plan.has_sandwich) {
    const SandwichPlan& how = plan.job.plan;
    launch(run->stream, how.blocks, how.threads, how.shared_bytes,
           AdapterBackwardKernel<Math, X, kRanks>{plan.job, p, float(p.scale_value),
                                                  rows_at(Operand{p.hidden}, p.rank, 16), hidden_grad, z,
                                                  int(plan.padded_rank)});
  }
  if (plan.reduction.bytes) {
    launch_adapter_reduction<Math>(p, plan.reduction, hidden_grad, z, memory + plan.hidden_grad_bytes + plan.z_bytes,
                                   run->stream);
  }
  return plan.bytes();
}

// Then a place in a weight, and in a tile, fits an int.
constexpr int64_t kMaxDim = 1 << 22;

template <typename Math, typename X>
bool launch_adapter_forward(const AdapterOrArcForward& p, const AdapterRequest& request, const Stream* stream) {
  if (p.dim > kMaxDim) return false;
  return for_rank(p.rank, [&](auto ranks) { return launch_adapter_forward<Math, X, ranks>(p, request, stream); });
}

template <typename Math, typename X>
int64_t launch_adapter_backward(const AdapterOrArcBackward& p, const AdapterRequest& request,
                                const AdapterBackwardRun* run) {
  if (p.dim > kMaxDim) return -1;
  return for_rank(p.rank, [&](auto ranks) { return launch_adapter_backward<Math, X, ranks>(p, request, run); });
}

}  // namespace vitadapter::cuda
