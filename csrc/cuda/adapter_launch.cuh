// How is the fast adapter kernel launched? By the shape of the problem and what the device has: so many rows in a tile,
// x kept or streamed, so many places for it in shared memory.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <map>

#include "adapter_forward.cuh"

namespace vitadapter::cuda {

template <typename Math, typename X, int kRanks>
AdapterPlan make_plan(const AdapterForward& p, const Device& device, int threads, bool kept) {
  using S = Shape<Math, kRanks>;
  AdapterPlan plan;
  plan.threads = threads;
  plan.tile_rows = S::rows(threads);
  plan.kept = kept;
  plan.chunks = int((p.dim + S::kChunk - 1) / S::kChunk);
  plan.tiles = (p.rows + plan.tile_rows - 1) / plan.tile_rows;
  plan.z_bytes = plan.tile_rows * S::kRankBytes * int((p.rank + S::kBlock - 1) / S::kBlock);
  const int64_t bytes = std::max(element_size(p.x.dtype), element_size(p.residual.dtype));
  plan.place_bytes = int(plan.tile_rows * std::max<int64_t>(S::kChunk * bytes, 128));
  const int64_t fixed = 2 * S::kWeightPlace + plan.z_bytes + plan.tile_rows * int64_t(sizeof(float));
  const int64_t room = (device.shared_bytes - fixed) / plan.place_bytes;
  // A ring of 64 KB keeps enough reads under way.
  const int64_t ring = std::max<int64_t>(4, (64 << 10) / plan.place_bytes);
  plan.places = int(kept ? plan.chunks : std::min(room, std::min<int64_t>(ring, 2 * plan.chunks)));
  plan.shared_bytes = fixed + int64_t(plan.places) * plan.place_bytes;
  // With one place, nobody could wait for the next load before this one's last reader is done.
  if (plan.places < 2 || plan.places > room) return {};
  const int resident = resident_blocks<AdapterForwardKernel<Math, X, kRanks>>(threads, plan.shared_bytes);
  plan.blocks = std::min<int64_t>(plan.tiles, int64_t(resident) * device.multiprocessors);
  return plan;
}

// What a plan may cost, to choose between two; a model until a GPU has been asked. The bytes that its rows take through
// the L2 cache (x, a residual, y and the weights; the hidden layer is every plan's), with as many rows for all
// multiprocessors as the busiest one has; and more where one has fewer than the eight warps that hide each other's
// waits.
inline double cost_of(const AdapterPlan& plan, const AdapterForward& p, const Device& device) {
  const auto bytes_of = [](const Operand& of, int64_t count) { return double(count * element_size(of.dtype)); };
  const double residual = plan.kept ? 0 : bytes_of(p.residual, p.dim);
  const double weights = bytes_of(p.down, p.rank * p.dim) + bytes_of(p.up, p.dim * p.rank);
  const double row_bytes = bytes_of(p.x, p.dim) + residual + double(p.dim * element_size(p.y.dtype));
  const double tiles = std::ceil(double(plan.tiles) / device.multiprocessors) * device.multiprocessors;
  const double warps = std::ceil(double(plan.blocks) / device.multiprocessors) * plan.threads / 32;
  return tiles * (plan.tile_rows * row_bytes + weights) * std::max(1.0, 8 / warps);
}

// The cheapest plan that fits, of those that are asked for. Without blocks if there is none.
template <typename Math, typename X, int kRanks>
AdapterPlan choose_plan(const AdapterForward& p, const Device& device, const AdapterRequest& request) {
  using S = Shape<Math, kRanks>;
  AdapterPlan best;
  double least = 0;
  for (bool kept : {true, false}) {
    const bool can_keep = p.residual.data == p.x.data && p.residual.dtype == p.x.dtype;
    if ((kept && !can_keep) || (request.keep >= 0 && kept != bool(request.keep))) continue;
    for (int threads = S::kMaxThreads; threads >= S::kMinThreads; threads /= 2) {
      if (request.tile_rows && request.tile_rows != S::rows(threads)) continue;
      const AdapterPlan plan = make_plan<Math, X, kRanks>(p, device, threads, kept);
      if (!plan.blocks) continue;
      const double cost = cost_of(plan, p, device);
      if (!best.blocks || cost < least) best = plan, least = cost;
    }
  }
  return best;
}

// A training loop comes with the same few shapes again and again, and to ask the driver takes longer than to launch.
template <typename Math, typename X, int kRanks>
AdapterPlan remembered_plan(const AdapterForward& p, const Device& device, const AdapterRequest& request) {
  using Question = std::array<int64_t, 12>;
  thread_local std::map<Question, AdapterPlan> answers;
  const Question question{device.index,
                          device.multiprocessors,
                          device.shared_bytes,
                          p.rows,
                          p.dim,
                          p.rank,
                          request.tile_rows,
                          request.keep,
                          int64_t(p.down.dtype),
                          int64_t(p.up.dtype),
                          int64_t(p.residual.dtype),
                          p.residual.data == p.x.data};
  if (const auto found = answers.find(question); found != answers.end()) return found->second;
  if (answers.size() >= 1000) answers.clear();
  const AdapterPlan plan = choose_plan<Math, X, kRanks>(p, device, request);
  if (plan.blocks) answers[question] = plan;
  return plan;
}

template <typename Math, typename X, int kRanks>
bool launch_adapter_forward(const AdapterForward& p, Stream stream, const AdapterRequest& request) {
  using Kernel = AdapterForwardKernel<Math, X, kRanks>;
  const AdapterPlan plan = remembered_plan<Math, X, kRanks>(p, device(), request);
  if (!plan.blocks) return false;
  const auto rows_at = [](const auto& of, int64_t row, int64_t bytes) {
    const int64_t row_bytes = row * element_size(of.dtype);
    return reinterpret_cast<uintptr_t>(of.data) % bytes == 0 && row_bytes % bytes == 0;
  };
  const auto alignment = [&](const Operand& weight, int64_t row) {
    if (rows_at(weight, row, 16)) return Alignment::kVector;
    return rows_at(weight, row, 2 * element_size(weight.dtype)) ? Alignment::kPair : Alignment::kElement;
  };
  launch(
      stream, plan.blocks, plan.threads, plan.shared_bytes,
      Kernel{p, plan, float(p.scale_value), rows_at(p.x, p.dim, 16), rows_at(p.residual, p.dim, 16),
             rows_at(p.y, p.dim, 4 * element_size(p.y.dtype)), rows_at(Result{p.hidden, DType::kFloat32}, p.rank, 16),
             alignment(p.down, p.dim), alignment(p.up, p.rank)});
  return true;
}

// Then a place in a weight, and in a tile, fits an int.
constexpr int64_t kMaxDim = 1 << 22;

// The kernel for a rank.
template <typename Math, typename X>
bool launch_adapter_forward(const AdapterForward& p, Stream stream, const AdapterRequest& request) {
  if (p.dim > kMaxDim) return false;
  if (p.rank <= 16) return launch_adapter_forward<Math, X, 16>(p, stream, request);
  if (p.rank <= 64) return launch_adapter_forward<Math, X, 64>(p, stream, request);
  return launch_adapter_forward<Math, X, 256>(p, stream, request);
}

}  // namespace vitadapter::cuda
