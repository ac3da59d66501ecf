// Are the adapter's fast CUDA kernels right? Trials (cuda_adapter_cases.h) in which every two choices meet, each in
// five orders of its threads; on demand, every combination of sizes and dtypes. And how are the kernels launched?
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "cuda_arc_cases.h"
#include "cuda_consolidator_cases.h"
#include "cuda_report.h"
#include "pairwise.h"

namespace vitadapter::test {

int check_adapter_samples(int seed, int most) {
  Rows rows = pairwise_rows(kChoices, uint64_t(seed));
  expect(meets_all_pairs(kChoices, rows), "the cases do not meet all pairs");
  if (most < int(rows.size())) rows.resize(size_t(most));
  statistics = {};
  Report report;
  for (const std::vector<int>& choice : rows) {
    report.run([&] { run_trial(seed, report.count, make_trial(choice), kOrders); });
  }
  expect(!statistics.ldmatrix_conflicts,
         std::to_string(statistics.ldmatrix_conflicts) + " conflicts of banks in ldmatrix");
  return report.print("fast adapter kernels", kOrders);
}

int check_adapter_everywhere(int part, int parts) {
  Report report;
  int number = 0;
  std::vector<int> choice(kFactors);
  for (choice[kRowsFactor] = 0; choice[kRowsFactor] < kChoices[kRowsFactor]; ++choice[kRowsFactor]) {
    for (choice[kDimFactor] = 0; choice[kDimFactor] < kChoices[kDimFactor]; ++choice[kDimFactor]) {
      for (choice[kRankFactor] = 0; choice[kRankFactor] < kChoices[kRankFactor]; ++choice[kRankFactor]) {
        for (choice[kNumbersFactor] = 0; choice[kNumbersFactor] < kChoices[kNumbersFactor]; ++choice[kNumbersFactor]) {
          if (++number % parts != part - 1) continue;
          // The rest is drawn.
          begin_case(6, number);
          for (int factor = kResidual; factor < kFactors; ++factor)
            choice[size_t(factor)] = int(draw(0, kChoices[size_t(factor)] - 1));
          report.run([&] { run_trial(6, number, make_trial(choice), 2); });
          if (report.count % 1000 == 0)
            std::printf("%d cases, %d failures\n", report.count, failures), std::fflush(stdout);
        }
      }
    }
  }
  return report.print("fast adapter kernels, everywhere", 2);
}

std::string launches() {
  // By kernel, then by architecture.
  std::map<std::string, std::map<int, Launch>> kernels;
  // ViT-B: 64 images of 197 tokens, with what each architecture's blocks may have of shared memory.
  constexpr std::pair<int, int64_t> kArchitectures[] = {{80, 163 << 10}, {90, 227 << 10}, {100, 227 << 10}};
  constexpr int64_t kRows = 12'608;
  for (const auto& [architecture, shared_bytes] : kArchitectures) {
    settings = Settings{};
    settings.shared_bytes = shared_bytes;
    settings.multiprocessors = 132;
    settings.dry = true;
    begin_case(7, 0);
    statistics.launches.clear();
    for (const Numbers& numbers : kNumbers) {
      for (int64_t rank : {16, 64, 256}) {
        const auto c = make_case(full_options(1, 768, rank, numbers));
        c->forward.rows = c->backward.rows = kRows;
        Outputs outputs(*c, kAllGrads);
        const auto arc = make_arc_case(c->options, 1);
        arc->forward.rows = arc->backward.rows = kRows;
        ArcOutputs arc_outputs(*arc, kAllArcGrads);
        run_forward(outputs.forward(*c), {});
        run_backward(outputs.backward(*c), {});
        run_forward<ArcCase>(arc_outputs.forward(*arc), {});
        run_backward<ArcCase>(arc_outputs.backward(*arc), {});
      }
    }
    for (const ConsolidatorLayer& layer : kConsolidatorLayers) {
      const auto c = make_consolidator_case(
          full_consolidator_options(1, layer.in, layer.out, layer.groups, kConsolidatorNumbers[0]));
      c->forward.rows = c->backward.rows = kRows;
      ConsolidatorOutputs outputs(*c, kAllConsolidatorGrads);
      run_consolidator(outputs, *c);
    }
    for (const Launch& launch : statistics.launches) {
      // Of those that several problems share, the one that takes most.
      auto& most = kernels[name_of(launch)].try_emplace(architecture, launch).first->second;
      if (launch.shared_bytes > most.shared_bytes) most = launch;
    }
  }
  std::string text;
  for (const auto& [name, by_architecture] : kernels) {
    std::string entry;
    for (const auto& [architecture, launch] : by_architecture) {
      entry += (entry.empty() ? "" : ", ") + ("\"sm_" + std::to_string(architecture)) +
               "\": {\"threads\": " + std::to_string(launch.threads) +
               ", \"shared\": " + std::to_string(launch.shared_bytes) + "}";
    }
    text += (text.empty() ? "\n \"" : ",\n \"") + name + "\": {" + entry + "}";
  }
  return "{" + text + "\n}";
}

}  // namespace vitadapter::test
