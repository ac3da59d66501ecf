// Which problems do the tests of the consolidator's fast CUDA kernels run? As cuda_adapter_cases.h, whose devices and
// demands these are: as right as the float64 loops of consolidator_cases.h say, and the same to the last bit in every
// order of threads and on every device. There are no plans to ask for.
#pragma once

#include <vector>

#include "consolidator_cases.h"
#include "cuda/consolidator.h"
#include "cuda_adapter_cases.h"

namespace vitadapter::test {

inline const std::vector<int64_t> kConsolidatorRows{1, 3, 4, 9, 17, 40};

// Groups that all branches have, and those of the second one where they differ.
struct ConsolidatorSizes {
  int64_t in, out, groups, other_groups;
};
// Blocks of 5 × 7, 1 × 1, 8 × 8, 2 × 2, 2 × 6, 2 × 8, 8 × 2, 1 × 2, 2 × 1, 25 × 13, 16 × 32, 1 × 3, 5 × 3 and 32 × 32.
inline const std::vector<ConsolidatorSizes> kConsolidatorSizes{
    {30, 42, 6, 3},    {1, 1, 1, 1},     {8, 8, 1, 2},     {96, 96, 48, 12},  {96, 288, 48, 24},
    {96, 384, 48, 12}, {384, 96, 48, 6}, {48, 96, 48, 24}, {96, 48, 48, 16},  {200, 104, 8, 4},
    {64, 128, 4, 2},   {36, 108, 36, 4}, {20, 12, 4, 2},   {128, 128, 4, 16}, {13, 26, 13, 1}};

// x's dtype and the compute dtype.
inline const std::vector<Numbers> kConsolidatorNumbers{
    {DType::kBFloat16, DType::kBFloat16, false}, {DType::kFloat32, DType::kBFloat16, false},
    {DType::kFloat16, DType::kFloat16, false},   {DType::kFloat32, DType::kFloat16, false},
    {DType::kFloat32, DType::kFloat32, false},   {DType::kBFloat16, DType::kFloat32, false},
    {DType::kFloat16, DType::kFloat32, false},
};

// Equal and unequal groups: 1 is of the second kind.
inline const std::vector<std::vector<int>> kConsolidatorBranches{{0}, {0, 0}, {0, 1}, {0, 1, 1}, {0, 0, 1, 0}, {1, 0}};

// The gradients that are asked for: each alone, and what frozen tensors leave.
inline const std::vector<int> kConsolidatorNeeds{kAllConsolidatorGrads,
                                                 kInputGrad,
                                                 kWeightGrads,
                                                 kBiasGrads,
                                                 kGradSum,
                                                 kWeightGrads | kBiasGrads,
                                                 kInputGrad | kWeightGrads,
                                                 kInputGrad | kBiasGrads,
                                                 kAllConsolidatorGrads & ~kGradSum};

// The last one has so little shared memory that sums are taken in parts of the outputs.
inline const std::vector<Machine> kConsolidatorMachines{
    kMachines[0], kMachines[1], kMachines[2], kMachines[3], {3, 12 << 10}};

enum ConsolidatorFactor {
  kConsolidatorRowsFactor,
  kConsolidatorSizesFactor,
  kConsolidatorNumbersFactor,
  kConsolidatorBranchesFactor,
  kConsolidatorWeights,
  kConsolidatorBias,
  kConsolidatorBase,
  kConsolidatorInputGradBase,
  kConsolidatorShuffle,
  kConsolidatorDropPath,
  kConsolidatorMachine,
  kConsolidatorNeedsFactor,
  kConsolidatorAddresses,
  kConsolidatorWholeNumbers,
};
// Of each factor.
inline const std::vector<int> kConsolidatorChoices{int(kConsolidatorRows.size()),
                                                   int(kConsolidatorSizes.size()),
                                                   int(kConsolidatorNumbers.size()),
                                                   int(kConsolidatorBranches.size()),
                                                   4,
                                                   3,
                                                   3,
                                                   3,
                                                   2,
                                                   2,
                                                   int(kConsolidatorMachines.size()),
                                                   int(kConsolidatorNeeds.size()),
                                                   4,
                                                   2};

struct ConsolidatorTrial {
  ConsolidatorOptions options;
  Settings settings;
  int needs = kAllConsolidatorGrads;
};

inline ConsolidatorTrial make_consolidator_trial(const std::vector<int>& choice) {
  ConsolidatorTrial trial;
  ConsolidatorOptions& o = trial.options;
  const ConsolidatorSizes& sizes = kConsolidatorSizes[size_t(choice[kConsolidatorSizesFactor])];
  const Numbers& numbers = kConsolidatorNumbers[size_t(choice[kConsolidatorNumbersFactor])];
  o.rows = kConsolidatorRows[size_t(choice[kConsolidatorRowsFactor])];
  o.rows_per_sample = o.rows % 3 ? 1 : o.rows / 3;
  o.in = sizes.in;
  o.out = sizes.out;
  o.groups.clear();
  for (int other : kConsolidatorBranches[size_t(choice[kConsolidatorBranchesFactor])]) {
    o.groups.push_back(other ? sizes.other_groups : sizes.groups);
  }
  o.x = numbers.x;
  o.compute = numbers.compute;
  trial.needs = kConsolidatorNeeds[size_t(choice[kConsolidatorNeedsFactor])];
  const DType low = low_beside(numbers);
  o.weights[0] = choice[kConsolidatorWeights] & 1 ? low : DType::kFloat32;
  o.weights[1] = choice[kConsolidatorWeights] & 2 ? low : DType::kFloat32;
  const auto perhaps = [&](int kind) -> std::optional<DType> {
    if (kind == 0) return std::nullopt;
    return kind == 1 ? low : DType::kFloat32;
  };
  // What alone is asked for must be there.
  o.bias = perhaps(trial.needs == kBiasGrads && !choice[kConsolidatorBias] ? 1 : choice[kConsolidatorBias]);
  o.base = perhaps(choice[kConsolidatorBase]);
  o.x_grad_base = perhaps(choice[kConsolidatorInputGradBase]);
  o.shuffle = choice[kConsolidatorShuffle];
  if (choice[kConsolidatorDropPath]) o.drop_path = 0.5;
  o.whole_numbers = choice[kConsolidatorWholeNumbers];
  // Among so many tensors one is always odd, and then all are taken element by element.
  o.odd_addresses = choice[kConsolidatorAddresses] == 0;
  const Machine& machine = kConsolidatorMachines[size_t(choice[kConsolidatorMachine])];
  trial.settings.multiprocessors = machine.multiprocessors;
  trial.settings.shared_bytes = machine.shared_bytes;
  return trial;
}

inline bool run_consolidator(ConsolidatorOutputs& outputs, const ConsolidatorCase& c) {
  if (!cuda::consolidator_forward_fast(outputs.forward(c), nullptr)) return false;
  const ConsolidatorBackward backward = outputs.backward(c);
  const int64_t bytes = cuda::consolidator_backward_workspace(backward);
  return bytes >= 0 && cuda::consolidator_backward_fast(backward, Workspace(bytes).bytes.get(), nullptr);
}

inline void check_trial(int number, const ConsolidatorTrial& trial, const ConsolidatorCase& c, const Exact& e,
                        int orders) {
  constexpr const char* kKernels = "fast consolidator kernels";
  ConsolidatorOutputs first(c, trial.needs);
  for (int order = 0; order < orders; ++order) {
    ConsolidatorOutputs other(c, trial.needs);
    settings = trial.settings;
    settings.order = uint64_t(number) * 1000 + uint64_t(order);
    if (order % 2) {
      const Machine& machine = kMachines[size_t(order) % kMachines.size()];
      settings.multiprocessors = machine.multiprocessors;
      settings.shared_bytes = machine.shared_bytes;
    }
    if (!run_consolidator(order ? other : first, c)) {
      return expect(false, "case " + std::to_string(number) + " of the consolidator is not served");
    }
    if (order == 0) {
      compare(kKernels, number, c, first, e);
      continue;
    }
    for (size_t i = 0; i < first.all().size(); ++i) {
      const auto [name, buffer] = first.all()[i];
      expect_same_bits(kKernels, number, name, *buffer, *other.all()[i].second,
                       order % 2 ? "between orders of threads or devices" : "between orders of threads");
    }
  }
}

inline void run_trial(int seed, int number, const ConsolidatorTrial& trial, int orders) {
  begin_case(seed, number);
  const auto c = make_consolidator_case(trial.options);
  check_trial(number, trial, *c, exact(*c), orders);
}

// ---- problems by name

// With all that there may be.
inline ConsolidatorOptions full_consolidator_options(int64_t rows, int64_t in, int64_t out, std::vector<int64_t> groups,
                                                     const Numbers& numbers) {
  ConsolidatorOptions o;
  o.rows = rows;
  o.in = in;
  o.out = out;
  o.groups = std::move(groups);
  o.x = numbers.x;
  o.compute = numbers.compute;
  o.weights[1] = low_beside(numbers);
  o.bias = DType::kFloat32;
  o.base = o.x_grad_base = numbers.x;
  return o;
}

// ViT-B's layers (qkv, proj, fc1, fc2), with as many groups as the paper has, more and fewer; and wider models' fc2.
struct ConsolidatorLayer {
  int64_t in, out;
  std::vector<int64_t> groups;
};
inline const std::vector<ConsolidatorLayer> kConsolidatorLayers{
    {768, 2304, {384}},   {768, 768, {384, 384}}, {768, 3072, {384, 384, 384, 384}},
    {3072, 768, {384}},   {768, 2304, {384, 96}}, {768, 3072, {96}},
    {768, 768, {12}},     {768, 2304, {768}},     {4096, 1024, {512, 512}},
    {4096, 4096, {2048}},
};

}  // namespace vitadapter::test
