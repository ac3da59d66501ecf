// Which problems do the tests of ARC's fast CUDA kernels run? As cuda_adapter_cases.h, whose devices, plans and demands
// these are; with fewer sizes, as most of the kernels are the adapter's.
#pragma once

#include <vector>

#include "arc_cases.h"
#include "cuda/arc.h"
#include "cuda_adapter_cases.h"

namespace vitadapter::test {

template <>
struct Kernels<ArcCase> {
  static constexpr const char* kName = "fast ARC kernels";
  using AllOutputs = ArcOutputs;
  static bool forward(const ArcForward& problem, const AdapterRequest& request) {
    return cuda::arc_forward_fast(problem, nullptr, request);
  }
  static int64_t workspace(const ArcBackward& problem, const AdapterRequest& request) {
    return cuda::arc_backward_workspace(problem, request);
  }
  static bool backward(const ArcBackward& problem, void* workspace, const AdapterRequest& request) {
    return cuda::arc_backward_fast(problem, workspace, nullptr, request);
  }
};

inline const std::vector<int64_t> kArcRows{1, 17, 64, 65, 197, 300};
inline const std::vector<int64_t> kArcDims{1, 3, 8, 33, 65, 200, 384, 577};
inline const std::vector<int64_t> kArcRanks{1, 5, 16, 17, 50, 64, 65, 128, 255, 256};
// A model's rescale starts at 0, and is tiny after its first steps.
inline const std::vector<double> kRescales{1, 1e-6, 0};
// The gradients that are asked for.
inline const std::vector<int> kArcNeeds{kAllArcGrads,
                                        kArcXGrad,
                                        kBasisGrad,
                                        kRescaleGrad,
                                        kBiasGrad,
                                        kAllArcGrads & ~kArcXGrad,
                                        kArcXGrad | kRescaleGrad,
                                        kRescaleGrad | kBiasGrad,
                                        kAllArcGrads & ~kRescaleGrad};

enum ArcFactor {
  kArcRowsFactor,
  kArcDimFactor,
  kArcRankFactor,
  kArcNumbersFactor,
  kArcWeights,
  kArcBias,
  kArcRescale,
  kArcDropout,
  kArcMachine,
  kArcRequest,
  kArcSlicesFactor,
  kArcNeedsFactor,
  kArcAddresses,
  kArcHidden,
  kArcWholeNumbers,
};
// Of each factor.
inline const std::vector<int> kArcChoices{int(kArcRows.size()),
                                          int(kArcDims.size()),
                                          int(kArcRanks.size()),
                                          int(kNumbers.size()),
                                          4,
                                          2,
                                          int(kRescales.size()),
                                          2,
                                          int(kMachines.size()),
                                          int(kRequests.size()),
                                          int(kSlices.size()),
                                          int(kArcNeeds.size()),
                                          2,
                                          2,
                                          2};

struct ArcTrial : Trial {
  double rescale_spread = 1;
};

inline ArcTrial make_arc_trial(const std::vector<int>& choice) {
  ArcTrial trial;
  CaseOptions& o = trial.options;
  const Numbers& numbers = kNumbers[size_t(choice[kArcNumbersFactor])];
  o.rows = kArcRows[size_t(choice[kArcRowsFactor])];
  o.dim = kArcDims[size_t(choice[kArcDimFactor])];
  o.rank = kArcRanks[size_t(choice[kArcRankFactor])];
  o.x = numbers.x;
  o.compute = numbers.compute;
  o.allow_tf32 = numbers.allow_tf32;
  trial.needs = kArcNeeds[size_t(choice[kArcNeedsFactor])];
  const DType low = low_beside(numbers);
  o.up = choice[kArcWeights] & 1 ? low : DType::kFloat32;
  o.down = choice[kArcWeights] & 2 ? low : DType::kFloat32;
  // What alone is asked for must be there.
  if (choice[kArcBias] || trial.needs == kBiasGrad) o.up_bias = choice[kArcWeights] & 1 ? DType::kFloat32 : low;
  trial.rescale_spread = kRescales[size_t(choice[kArcRescale])];
  o.whole_numbers = choice[kArcWholeNumbers];
  if (choice[kArcDropout]) o.dropout = o.whole_numbers ? 0.5 : 0.3;
  o.odd_addresses = choice[kArcAddresses];
  trial.settings.multiprocessors = kMachines[size_t(choice[kArcMachine])].multiprocessors;
  trial.settings.shared_bytes = kMachines[size_t(choice[kArcMachine])].shared_bytes;
  trial.request = kRequests[size_t(choice[kArcRequest])];
  trial.request.slices = kSlices[size_t(choice[kArcSlicesFactor])];
  trial.keeps_hidden = choice[kArcHidden];
  return trial;
}

// How the fast kernels round.
inline Exact exact_of(const ArcCase& c) {
  const Precision precision = tensor_core_precision(c.forward);
  const bool rounds = precision != Precision::kFloat32;
  return exact(c, precision, rounds, rounds);
}

inline void run_trial(int seed, int number, const ArcTrial& trial, int orders) {
  begin_case(seed, number);
  const auto c = make_arc_case(trial.options, trial.rescale_spread);
  check_trial(number, trial, *c, exact_of(*c), orders);
}

}  // namespace vitadapter::test
