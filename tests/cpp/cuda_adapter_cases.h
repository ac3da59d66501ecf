// Which problems do the tests of the adapter's fast CUDA kernels run, on which emulated devices, and what must hold of
// these kernels and of other ops'? A
// trial is a problem, a device, a plan where it fits, and the gradients that are asked for. Its forward pass, and then
// its backward pass on the hidden layer, must be as right as the float64 loops of adapter_cases.h say, and the same to
// the last bit in every order of threads, on every device and by every plan.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "adapter_cases.h"
#include "cuda/adapter.h"
#include "cuda_test.h"

namespace vitadapter::test {

using cuda::AdapterRequest;
using cuda::emulator::settings;
using cuda::emulator::Settings;
using cuda::emulator::statistics;

constexpr int kOrders = 5;

// ---- the choices

inline const std::vector<int64_t> kRows{1, 2, 15, 16, 17, 31, 63, 64, 65, 100, 129, 197, 300};
inline const std::vector<int64_t> kDims{1, 2, 3, 7, 8, 16, 33, 64, 65, 124, 192, 200, 384, 577, 768, 1280, 1300};
inline const std::vector<int64_t> kRanks{1,  2,  3,  5,  8,  15,  16,  17,  31,  32,
                                         33, 50, 63, 64, 65, 100, 128, 200, 255, 256};

// x's dtype, the compute dtype, whether TF32 is allowed.
struct Numbers {
  DType x, compute;
  bool allow_tf32;
};
inline const std::vector<Numbers> kNumbers{
    {DType::kBFloat16, DType::kBFloat16, false}, {DType::kFloat32, DType::kBFloat16, false},
    {DType::kFloat16, DType::kFloat16, false},   {DType::kFloat32, DType::kFloat16, true},
    {DType::kFloat32, DType::kFloat32, false},   {DType::kFloat32, DType::kFloat32, true},
    {DType::kBFloat16, DType::kFloat32, true},   {DType::kFloat16, DType::kFloat32, false},
};

// What the emulated device has: blocks that take many tiles, few, or one; shared memory of sm_90, sm_80 and sm_86.
struct Machine {
  int multiprocessors;
  int64_t shared_bytes;
};
inline const std::vector<Machine> kMachines{{1, 227 << 10}, {2, 163 << 10}, {1, 99 << 10}, {132, 227 << 10}};

// Rows in a tile, and whether x is kept.
inline const std::vector<AdapterRequest> kRequests{{0, -1}, {0, 0}, {32, -1}, {64, 1}, {128, -1}};
// Of the rows in the backward pass' sums.
inline const std::vector<int> kSlices{0, 1, 3};

// The gradients that are asked for: each alone, and what a frozen or first layer, or training biases alone, leaves.
inline const std::vector<int> kNeeds{kAllGrads,
                                     kAllGrads & ~kXGrad,
                                     kXGrad,
                                     kDownGrad,
                                     kDownBiasGrad,
                                     kUpGrad,
                                     kUpBiasGrad,
                                     kScaleGrad,
                                     kDownGrad | kUpGrad,
                                     kXGrad | kDownBiasGrad | kUpBiasGrad,
                                     kUpGrad | kScaleGrad,
                                     kAllGrads & ~kUpGrad};

enum Factor {
  kRowsFactor,
  kDimFactor,
  kRankFactor,
  kNumbersFactor,
  kResidual,
  kWeights,
  kBiases,
  kScale,
  kActivation,
  kDropout,
  kMachine,
  kRequest,
  kSlicesFactor,
  kNeedsFactor,
  kAddresses,
  kHidden,
  kWholeNumbers,
  kFactors
};
// Of each factor.
inline const std::vector<int> kChoices{int(kRows.size()),
                                       int(kDims.size()),
                                       int(kRanks.size()),
                                       int(kNumbers.size()),
                                       3,
                                       4,
                                       4,
                                       3,
                                       kActivations,
                                       5,
                                       int(kMachines.size()),
                                       int(kRequests.size()),
                                       int(kSlices.size()),
                                       int(kNeeds.size()),
                                       2,
                                       2,
                                       2};

struct Trial {
  CaseOptions options;
  Settings settings;
  AdapterRequest request;
  int needs = kAllGrads;
  bool keeps_hidden = true;
};

// What may stand beside float32: one low dtype, bfloat16 where the numbers do not say.
inline DType low_beside(const Numbers& numbers) {
  if (numbers.x != DType::kFloat32) return numbers.x;
  return numbers.compute != DType::kFloat32 ? numbers.compute : DType::kBFloat16;
}

inline Trial make_trial(const std::vector<int>& choice) {
  Trial trial;
  CaseOptions& o = trial.options;
  const Numbers& numbers = kNumbers[size_t(choice[kNumbersFactor])];
  o.rows = kRows[size_t(choice[kRowsFactor])];
  o.dim = kDims[size_t(choice[kDimFactor])];
  o.rank = kRanks[size_t(choice[kRankFactor])];
  o.rows_per_sample = o.rows % 3 ? 1 : o.rows / 3;
  o.x = numbers.x;
  o.compute = numbers.compute;
  o.allow_tf32 = numbers.allow_tf32;
  trial.needs = kNeeds[size_t(choice[kNeedsFactor])];
  const DType low = low_beside(numbers);
  const auto of = [&](int bits, int bit) { return bits >> bit & 1 ? low : DType::kFloat32; };
  if (choice[kResidual]) o.residual = of(choice[kResidual], 1);
  o.down = of(choice[kWeights], 0);
  o.up = of(choice[kWeights], 1);
  // What alone is asked for must be there.
  if (choice[kBiases] & 1 || trial.needs == kDownBiasGrad) o.down_bias = of(choice[kWeights], 1);
  if (choice[kBiases] & 2 || trial.needs == kUpBiasGrad) o.up_bias = of(choice[kWeights], 0);
  if (choice[kScale] || trial.needs == kScaleGrad) o.scale = of(choice[kWeights], 1);
  o.scale_is_channel = choice[kScale] == 2;
  o.activation = Activation(choice[kActivation]);
  o.whole_numbers = choice[kWholeNumbers];
  if (o.whole_numbers) o.activation = choice[kActivation] % 2 ? Activation::kRelu : Activation::kIdentity;
  o.scale_value = o.whole_numbers ? -0.5 : -0.3;
  const int dropout = choice[kDropout];
  if (dropout == 1 || dropout == 4) o.dropout = o.whole_numbers ? 0.5 : 0.3;
  if (dropout == 2 || dropout == 4) o.dropout_out = o.whole_numbers ? 0.75 : 0.9;
  if (dropout == 3 || dropout == 4) o.drop_path = 0.5;
  o.odd_addresses = choice[kAddresses];
  trial.settings.multiprocessors = kMachines[size_t(choice[kMachine])].multiprocessors;
  trial.settings.shared_bytes = kMachines[size_t(choice[kMachine])].shared_bytes;
  trial.request = kRequests[size_t(choice[kRequest])];
  trial.request.slices = kSlices[size_t(choice[kSlicesFactor])];
  trial.keeps_hidden = choice[kHidden];
  return trial;
}

// ---- running them

// So many bytes that are NaN in every dtype, as aligned as they are promised to be, and ending where their heap block
// ends.
struct Workspace {
  std::unique_ptr<char, Buffer::Free> bytes;

  explicit Workspace(int64_t count) : bytes(static_cast<char*>(::operator new[](size_t(count), Buffer::kAlignment))) {
    memset(bytes.get(), 0xff, size_t(count));
  }
};

// How the tests call an op's fast kernels, by its Case.
template <typename AnyCase>
struct Kernels;

template <>
struct Kernels<Case> {
  static constexpr const char* kName = "fast adapter kernels";
  using AllOutputs = Outputs;
  static bool forward(const AdapterForward& problem, const AdapterRequest& request) {
    return cuda::adapter_forward_fast(problem, nullptr, request);
  }
  static int64_t workspace(const AdapterBackward& problem, const AdapterRequest& request) {
    return cuda::adapter_backward_workspace(problem, request);
  }
  static bool backward(const AdapterBackward& problem, void* workspace, const AdapterRequest& request) {
    return cuda::adapter_backward_fast(problem, workspace, nullptr, request);
  }
};

// Where a plan that is asked for does not fit, the kernel's own choice.
template <typename AnyCase = Case, typename Problem>
bool run_forward(const Problem& problem, const AdapterRequest& request) {
  return Kernels<AnyCase>::forward(problem, request) || Kernels<AnyCase>::forward(problem, {});
}
// Of as many slices, on which the sums may depend.
template <typename AnyCase = Case, typename Problem>
bool run_backward(const Problem& problem, AdapterRequest request) {
  int64_t bytes = Kernels<AnyCase>::workspace(problem, request);
  if (bytes < 0) {
    request = {0, -1, request.slices};
    bytes = Kernels<AnyCase>::workspace(problem, request);
  }
  return bytes >= 0 && Kernels<AnyCase>::backward(problem, Workspace(bytes).bytes.get(), request);
}

inline void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("fast kernels: %s\n", what.c_str());
  ++failures;
}

// How the fast kernels round.
inline Exact exact_of(const Case& c) {
  const Precision precision = tensor_core_precision(c.forward);
  return exact(c, precision, precision == Precision::kTf32 ? Rounds::kMiddle : Rounds::kHiddenGrad);
}

template <typename AnyCase>
void check_trial(int number, const Trial& trial, const AnyCase& c, const Exact& e, int orders) {
  using AllOutputs = typename Kernels<AnyCase>::AllOutputs;
  constexpr const char* kKernels = Kernels<AnyCase>::kName;
  settings = trial.settings;
  // The backward pass has the hidden layer from a run of its own where this trial's do not keep it.
  AllOutputs first(c, trial.needs), keeper(c, 0);
  if (!trial.keeps_hidden) {
    run_forward<AnyCase>(keeper.forward(c), trial.request);
    first.hidden = Buffer();
  }
  for (int order = 0; order < orders; ++order) {
    AllOutputs other(c, trial.needs);
    if (!trial.keeps_hidden) other.hidden = Buffer();
    AllOutputs& outputs = order ? other : first;
    settings = trial.settings;
    settings.order = uint64_t(number) * 1000 + uint64_t(order);
    AdapterRequest request = trial.request;
    if (order % 2) {
      const Machine& machine = kMachines[size_t(order) % kMachines.size()];
      settings.multiprocessors = machine.multiprocessors;
      settings.shared_bytes = machine.shared_bytes;
      request = kRequests[size_t(order) % kRequests.size()];
      request.slices = trial.request.slices;
    }
    bool served = run_forward<AnyCase>(outputs.forward(c), request);
    auto backward = outputs.backward(c);
    backward.hidden = (trial.keeps_hidden ? first : keeper).hidden.bytes;
    served = served && run_backward<AnyCase>(backward, request);
    if (!served) return expect(false, "case " + std::to_string(number) + " is not served");
    if (order == 0) {
      compare(kKernels, number, c, first, e);
      if (!trial.keeps_hidden) expect_same_bits(kKernels, number, "y", keeper.y, first.y, "where hidden is not kept");
      continue;
    }
    for (size_t i = 0; i < first.all().size(); ++i) {
      const auto [name, buffer] = first.all()[i];
      expect_same_bits(kKernels, number, name, *buffer, *other.all()[i].second,
                       order % 2 ? "between orders of threads, devices or plans" : "between orders of threads");
    }
  }
}

inline void run_trial(int seed, int number, const Trial& trial, int orders) {
  begin_case(seed, number);
  const auto c = make_case(trial.options);
  check_trial(number, trial, *c, exact_of(*c), orders);
}

// ---- small problems

inline CaseOptions plain_options(int64_t rows, int64_t dim, int64_t rank) {
  CaseOptions o;
  o.rows = rows;
  o.dim = dim;
  o.rank = rank;
  o.x = o.compute = DType::kBFloat16;
  o.activation = Activation::kRelu;
  o.rows_per_sample = 1;
  return o;
}

inline CaseOptions plain_options(int64_t rows, int64_t dim, int64_t rank, const Numbers& numbers) {
  CaseOptions o = plain_options(rows, dim, rank);
  o.x = numbers.x;
  o.compute = numbers.compute;
  o.allow_tf32 = numbers.allow_tf32;
  return o;
}

// With all that has a gradient.
inline CaseOptions full_options(int64_t rows, int64_t dim, int64_t rank, const Numbers& numbers) {
  CaseOptions o = plain_options(rows, dim, rank, numbers);
  o.down_bias = o.up_bias = o.scale = DType::kFloat32;
  o.scale_is_channel = true;
  return o;
}

}  // namespace vitadapter::test
