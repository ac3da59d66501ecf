// Are ARC's CUDA kernels right? Trials (cuda_arc_cases.h) in which every two choices meet, each in five orders of its
// threads; what no trial reaches; and the simple kernels.
#include <cmath>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "cuda_arc_cases.h"
#include "cuda_report.h"
#include "pairwise.h"

namespace vitadapter::test {
namespace {

// What is left to the simple kernels is said to be.
void check_refusals() {
  settings = Settings{};
  settings.dry = true;
  const auto check = [](bool served, const CaseOptions& o, const std::string& what) {
    const auto c = make_arc_case(o, 1);
    ArcOutputs outputs(*c, kAllArcGrads);
    const std::string said = what + (served ? " was not served" : " was served") + " by ARC's kernels";
    expect(cuda::arc_forward_fast(outputs.forward(*c), nullptr) == served, said);
    const ArcBackward backward = outputs.backward(*c);
    const int64_t bytes = cuda::arc_backward_workspace(backward);
    expect((bytes >= 0) == served, said + " with memory for the backward pass");
    const Workspace workspace(std::max<int64_t>(bytes, 0));
    expect(cuda::arc_backward_fast(backward, workspace.bytes.get(), nullptr) == served, said + " in the backward pass");
  };
  CaseOptions wide = plain_options(3, 8, 2);
  wide.x = wide.down = wide.up = wide.compute = DType::kFloat64;
  check(false, wide, "float64");
  check(false, plain_options(0, 8, 2), "a problem without rows");
  check(false, plain_options(3, 8, 0), "rank 0");
  check(false, plain_options(3, 8, 257), "rank 257");
  check(true, plain_options(3, 8, 256), "rank 256");
  settings.capability = 75;
  check(false, plain_options(3, 8, 2), "sm_75");
}

void check_number_of_launches() {
  for (const Numbers& numbers : kNumbers) {
    settings = Settings{};
    CaseOptions o = plain_options(70, 64, 40, numbers);
    o.up_bias = DType::kFloat32;
    const auto c = make_arc_case(o, 1);
    ArcOutputs outputs(*c, kAllArcGrads);
    statistics.launches.clear();
    run_forward<ArcCase>(outputs.forward(*c), {});
    expect(statistics.launches.size() == 1, "ARC's forward pass is not one kernel");
    run_backward<ArcCase>(outputs.backward(*c), {});
    expect(statistics.launches.size() == 4, "ARC's backward pass is not three kernels");
  }
}

// A NaN in x and dy stays in its row of y and gx, and marks all that sums rows.
void check_nan() {
  for (const Numbers& numbers : {kNumbers[0], kNumbers[2], kNumbers[4], kNumbers[5]}) {
    settings = Settings{};
    constexpr int64_t kDim = 100, kRow = 20, kColumn = 7;
    const auto c = make_arc_case(plain_options(40, kDim, 5, numbers), 1);
    ArcOutputs clean(*c, kAllArcGrads), touched(*c, kAllArcGrads);
    const auto run = [&](ArcOutputs& outputs) {
      run_forward<ArcCase>(outputs.forward(*c), {});
      run_backward<ArcCase>(outputs.backward(*c), {});
    };
    run(clean);
    for (Buffer* each : {&c->x, &c->grad}) store(each->result(), kRow * kDim + kColumn, double(NAN));
    run(touched);
    bool same = true, marked = true;
    for (const auto& [before, after] : {std::pair{&clean.y, &touched.y}, std::pair{&clean.x_grad, &touched.x_grad}}) {
      for (int64_t i = 0; i < after->count; ++i) {
        if (i / kDim == kRow) {
          marked &= std::isnan(after->at(i));
        } else {
          same &= after->at(i) == before->at(i);
        }
      }
    }
    for (const Buffer* each : {&touched.basis_grad, &touched.rescale_grad}) {
      for (int64_t i = 0; i < each->count; ++i) marked &= std::isnan(each->at(i));
    }
    expect(same, "a NaN changed another row of ARC's");
    expect(marked, "a NaN got lost in ARC");
  }
}

// The simple kernels, for which float16 is float32.
void check_simple() {
  for (int number = 0; number < 60; ++number) {
    begin_case(9, number);
    settings = Settings{};
    settings.order = uint64_t(number);
    CaseOptions o = draw_options();
    o.rows = std::min<int64_t>(o.rows, 50);
    o.dim = std::min<int64_t>(o.dim, 100);
    const auto c = make_arc_case(o, pick({1.0, 1e-6, 0.0}));
    ArcOutputs outputs(*c, draw(0, 1) ? kAllArcGrads : int(draw(0, kAllArcGrads)));
    const Precision precision = o.compute == DType::kFloat16 ? Precision::kFloat32 : precision_of(c->forward);
    const auto run = [&](auto t) {
      using T = decltype(t);
      const auto room = [](int64_t count) { return std::vector<T>(size_t(count), T(NAN)); };
      auto down = room(o.rank * o.dim), down_grad = down, up_product = down, grad_sum = room(o.dim),
           hidden_grad = room(o.rows * o.rank);
      cuda::arc_forward_simple<T>(outputs.forward(*c), reinterpret_cast<T*>(outputs.hidden.bytes), down.data(),
                                  nullptr);
      down = room(o.rank * o.dim);
      cuda::arc_backward_simple<T>(
          outputs.backward(*c), {hidden_grad.data(), down.data(), down_grad.data(), up_product.data(), grad_sum.data()},
          nullptr);
    };
    o.x == DType::kFloat64 ? run(double()) : run(float());
    compare("simple ARC kernels", number, *c, outputs, exact(*c, precision, false));
  }
}

}  // namespace

int check_arc_samples(int seed, int most) {
  Rows rows = pairwise_rows(kArcChoices, uint64_t(seed));
  expect(meets_all_pairs(kArcChoices, rows), "ARC's cases do not meet all pairs");
  if (most < int(rows.size())) rows.resize(size_t(most));
  statistics = {};
  Report report;
  for (const std::vector<int>& choice : rows) {
    report.run([&] { run_trial(seed, report.count, make_arc_trial(choice), kOrders); });
  }
  return report.print("fast ARC kernels", kOrders);
}

int check_arc_limits() {
  const int before = failures;
  begin_case(5, 0);
  check_refusals();
  check_number_of_launches();
  check_nan();
  check_simple();
  std::printf("ARC kernels: limits, %d failures\n", failures - before);
  return failures - before;
}

}  // namespace vitadapter::test
