// Are the consolidator's CUDA kernels right? Trials (cuda_consolidator_cases.h) in which every two choices meet, each
// in five orders of its threads; ViT-B's layers; what no trial reaches; and the simple kernels.
#include <cmath>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "cuda_consolidator_cases.h"
#include "cuda_report.h"
#include "pairwise.h"

namespace vitadapter::test {
namespace {

// What is left to the simple kernels is said to be.
void check_refusals() {
  const auto check = [](bool served, const ConsolidatorOptions& o, const std::string& what, int64_t in = 0) {
    const auto c = make_consolidator_case(o);
    if (in) c->forward.in = c->backward.in = in;
    ConsolidatorOutputs outputs(*c, kAllConsolidatorGrads);
    const std::string said = what + (served ? " was not served" : " was served") + " by the consolidator's kernels";
    expect(cuda::consolidator_forward_fast(outputs.forward(*c), nullptr) == served, said);
    const ConsolidatorBackward backward = outputs.backward(*c);
    const int64_t bytes = cuda::consolidator_backward_workspace(backward);
    expect((bytes >= 0) == served, said + " with memory for the backward pass");
    const Workspace workspace(std::max<int64_t>(bytes, 0));
    expect(cuda::consolidator_backward_fast(backward, workspace.bytes.get(), nullptr) == served,
           said + " in the backward pass");
  };
  settings = Settings{};
  settings.dry = true;
  const auto plain = [](int64_t rows) { return full_consolidator_options(rows, 8, 8, {4}, kConsolidatorNumbers[0]); };
  ConsolidatorOptions wide = plain(3);
  wide.x = wide.compute = wide.weights[0] = DType::kFloat64;
  wide.bias = wide.base = wide.x_grad_base = DType::kFloat64;
  check(false, wide, "float64");
  check(false, plain(0), "a problem without rows");
  check(true, plain(3), "a small problem");
  check(false, plain(3), "a row beyond shared memory", 16'000);
  check(false, plain(3), "a row of 2^16 elements", 1 << 16);
  settings.capability = 75;
  check(false, plain(3), "sm_75");
}

void check_number_of_launches() {
  const auto launches = [](int64_t groups, int needs) {
    settings = Settings{};
    settings.dry = true;
    const auto c =
        make_consolidator_case(full_consolidator_options(20, 768, 768, {groups, groups}, kConsolidatorNumbers[0]));
    ConsolidatorOutputs outputs(*c, needs);
    statistics.launches.clear();
    expect(run_consolidator(outputs, *c), "a layer of ViT-B is not served");
    return statistics.launches.size() - 1;
  };
  expect(launches(384, 0) == 0, "without gradients, the consolidator launches something");
  expect(launches(384, kInputGrad) == 1, "x's gradient of the consolidator is not one kernel");
  expect(launches(384, kAllConsolidatorGrads) == 2, "the consolidator's backward pass is not two kernels");
  expect(launches(384, kBiasGrads) == 2, "the consolidator's bias gradients are not two kernels");
  expect(launches(4, kAllConsolidatorGrads) == 3,
         "with few groups, the consolidator's backward pass is not three kernels");
}

// The workspace does not grow with the rows, and no more than 16 MB are asked for where one slice takes less.
void check_workspace() {
  settings = Settings{};
  settings.multiprocessors = 132;
  for (const ConsolidatorLayer& layer : kConsolidatorLayers) {
    const auto c = make_consolidator_case(
        full_consolidator_options(1, layer.in, layer.out, layer.groups, kConsolidatorNumbers[0]));
    c->backward.rows = 1 << 20;
    ConsolidatorOutputs outputs(*c, kAllConsolidatorGrads);
    const int64_t bytes = cuda::consolidator_backward_workspace(outputs.backward(*c));
    expect(bytes > 0 && bytes <= 16 << 20, "the consolidator asks for " + std::to_string(bytes) + " bytes");
  }
}

// Each in a few rows, of which the last tile has one.
void check_layers() {
  int number = 0;
  for (const ConsolidatorLayer& layer : kConsolidatorLayers) {
    ConsolidatorTrial trial;
    trial.options = full_consolidator_options(9, layer.in, layer.out, layer.groups, kConsolidatorNumbers[0]);
    trial.options.drop_path = number % 2 ? 0.5 : 0;
    trial.settings.shared_bytes = kMachines[size_t(number) % 2].shared_bytes;
    run_trial(10, number++, trial, 2);
  }
}

// As many branches as there may be, for which the trials' smallest device has no room at every size; and 75 slices, so
// many that each thread of the second kernel takes more of them than it loads together.
void check_most() {
  int number = 0;
  for (const Numbers& numbers : {kConsolidatorNumbers[0], kConsolidatorNumbers[4]}) {
    ConsolidatorTrial branches, slices;
    branches.options = full_consolidator_options(9, 48, 144, std::vector<int64_t>(kMaxBranches, 24), numbers);
    branches.options.drop_path = 0.5;
    slices.options = full_consolidator_options(600, 16, 48, {8, 2}, numbers);
    slices.options.drop_path = number ? 0.5 : 0;
    run_trial(11, number++, branches, 3);
    run_trial(11, number++, slices, 3);
  }
}

// A NaN in x or dy stays in its row and group, and marks all that sums it.
void check_nan() {
  constexpr int64_t kIn = 24, kOut = 36, kGroups = 6, kRow = 6, kSource = 7, kOutput = 20;
  for (const Numbers& numbers : kConsolidatorNumbers) {
    settings = Settings{};
    ConsolidatorOptions o = full_consolidator_options(11, kIn, kOut, {kGroups}, numbers);
    o.drop_path = 0.5;
    const auto c = make_consolidator_case(o);
    ConsolidatorOutputs clean(*c, kAllConsolidatorGrads), touched(*c, kAllConsolidatorGrads);
    run_consolidator(clean, *c);
    store(c->x.result(), kRow * kIn + kSource, double(NAN));
    store(c->grad.result(), kRow * kOut + kOutput, double(NAN));
    run_consolidator(touched, *c);
    const ConsolidatorBranch& b = c->forward.branch[0];
    const int64_t x_group = b.place(kSource, true) / b.group_in, g_group = kOutput / b.group_out;
    const auto check = [&](const char* name, const Buffer& before, const Buffer& after, auto reaches) {
      bool right = true;
      for (int64_t i = 0; i < after.count; ++i) {
        right &= reaches(i) ? std::isnan(after.at(i)) : after.at(i) == before.at(i);
      }
      expect(right, std::string("a NaN got lost or went astray in the consolidator's ") + name);
    };
    check("y", clean.y, touched.y, [&](int64_t i) { return i / kOut == kRow && i % kOut / b.group_out == x_group; });
    check("x_grad", clean.x_grad, touched.x_grad,
          [&](int64_t i) { return i / kIn == kRow && b.place(i % kIn, true) / b.group_in == g_group; });
    check("weight_grad", clean.weight_grads[0], touched.weight_grads[0], [&](int64_t i) {
      const int64_t output = i / b.group_in, place = output / b.group_out * b.group_in + i % b.group_in;
      return output == kOutput || b.source(place, true) == kSource;
    });
    check("bias_grad", clean.bias_grads[0], touched.bias_grads[0], [&](int64_t i) { return i == kOutput; });
    check("grad_sum", clean.grad_sum, touched.grad_sum, [&](int64_t i) { return i == kOutput; });
  }
}

void check_simple() {
  for (int number = 0; number < 60; ++number) {
    begin_case(9, number);
    settings = Settings{};
    settings.order = uint64_t(number);
    ConsolidatorOptions o = draw_consolidator_options();
    o.rows = std::min<int64_t>(o.rows, 40) / o.rows_per_sample * o.rows_per_sample;
    const auto c = make_consolidator_case(o);
    ConsolidatorOutputs outputs(*c, draw(0, 1) ? kAllConsolidatorGrads : int(draw(0, kAllConsolidatorGrads)));
    const auto run = [&](auto t) {
      using T = decltype(t);
      cuda::consolidator_forward_simple<T>(outputs.forward(*c), nullptr);
      cuda::consolidator_backward_simple<T>(outputs.backward(*c), nullptr);
      return wrong_weights(*c, o.x, [](const ConsolidatorWeight& p) { cuda::consolidator_weight<T>(p, nullptr); });
    };
    expect((o.x == DType::kFloat64 ? run(double()) : run(float())) == 0, "a weight with its branches is wrong");
    compare("simple consolidator kernels", number, *c, outputs, exact(*c));
  }
}

}  // namespace

int check_consolidator_samples(int seed, int most) {
  Rows rows = pairwise_rows(kConsolidatorChoices, uint64_t(seed));
  expect(meets_all_pairs(kConsolidatorChoices, rows), "the consolidator's cases do not meet all pairs");
  if (most < int(rows.size())) rows.resize(size_t(most));
  statistics = {};
  Report report;
  for (const std::vector<int>& choice : rows) {
    report.run([&] { run_trial(seed, report.count, make_consolidator_trial(choice), kOrders); });
  }
  return report.print("fast consolidator kernels", kOrders);
}

int check_consolidator_limits() {
  const int before = failures;
  begin_case(5, 0);
  check_refusals();
  check_number_of_launches();
  check_workspace();
  check_layers();
  check_most();
  check_nan();
  check_simple();
  std::printf("consolidator kernels: limits, %d failures\n", failures - before);
  return failures - before;
}

}  // namespace vitadapter::test
