// Are the adapter's fast CUDA kernels right? Trials (cuda_adapter_cases.h) in which every two choices meet, each in
// five orders of its threads; on demand, every combination of sizes and dtypes. And how are the kernels launched?
#include <cxxabi.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "cuda_adapter_cases.h"
#include "pairwise.h"

namespace vitadapter::test {
namespace {

using cuda::emulator::Launch;

std::string name_of(const Launch& launch) {
  int status = 0;
  char* const name = abi::__cxa_demangle(launch.kernel->name(), nullptr, nullptr, &status);
  std::string text = name;
  std::free(name);
  const std::string space = "vitadapter::cuda::";
  for (size_t at; (at = text.find(space)) != std::string::npos;) text.erase(at, space.size());
  return text;
}

struct Report {
  std::map<std::string, int> cases;  // of each kernel
  int count = 0;
  const int failures_before = failures;
  const std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();

  void run(int seed, int number, const Trial& trial, int orders) {
    statistics.launches.clear();
    run_trial(seed, number, trial, orders);
    ++count;
    std::set<std::string> kernels;
    for (const Launch& launch : statistics.launches) kernels.insert(name_of(launch));
    for (const std::string& kernel : kernels) ++cases[kernel];
  }
  int print(const char* what, int orders) const {
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    for (const auto& [kernel, number] : cases) std::printf("  %s: %d cases\n", kernel.c_str(), number);
    std::printf("%s: %d cases in %d orders of threads, %d failures, %.0f s\n", what, count, orders,
                failures - failures_before, seconds);
    return failures - failures_before;
  }
};

}  // namespace

int check_adapter_samples(int seed, int most) {
  Rows rows = pairwise_rows(kChoices, uint64_t(seed));
  expect(meets_all_pairs(kChoices, rows), "the cases do not meet all pairs");
  if (most < int(rows.size())) rows.resize(size_t(most));
  statistics = {};
  Report report;
  for (const std::vector<int>& choice : rows) report.run(seed, report.count, make_trial(choice), kOrders);
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
          report.run(6, number, make_trial(choice), 2);
          if (report.count % 1000 == 0)
            std::printf("%d cases, %d failures\n", report.count, failures), std::fflush(stdout);
        }
      }
    }
  }
  return report.print("fast adapter kernels, everywhere", 2);
}

std::string adapter_launches() {
  // By kernel, then by architecture.
  std::map<std::string, std::map<int, Launch>> kernels;
  // ViT-B: 64 images of 197 tokens, with what each architecture's blocks may have of shared memory.
  constexpr std::pair<int, int64_t> kArchitectures[] = {{80, 163 << 10}, {90, 227 << 10}, {100, 227 << 10}};
  constexpr int64_t kRows = 12'608;
  for (const auto& [architecture, shared_bytes] : kArchitectures) {
    for (const Numbers& numbers : kNumbers) {
      for (int64_t rank : {16, 64, 256}) {
        settings = Settings{};
        settings.shared_bytes = shared_bytes;
        settings.multiprocessors = 132;
        settings.dry = true;
        begin_case(7, 0);
        const auto c = make_case(full_options(1, 768, rank, numbers));
        c->forward.rows = c->backward.rows = kRows;
        Outputs outputs(*c, kAllGrads);
        statistics.launches.clear();
        run_forward(outputs.forward(*c), {});
        run_backward(outputs.backward(*c), {});
        for (const Launch& launch : statistics.launches) {
          // Of those that several problems share, the one that takes most.
          auto& most = kernels[name_of(launch)].try_emplace(architecture, launch).first->second;
          if (launch.shared_bytes > most.shared_bytes) most = launch;
        }
      }
    }
  }
  std::string text;
  for (const auto& [name, launches] : kernels) {
    std::string entry;
    for (const auto& [architecture, launch] : launches) {
      entry += (entry.empty() ? "" : ", ") + ("\"sm_" + std::to_string(architecture)) +
               "\": {\"threads\": " + std::to_string(launch.threads) +
               ", \"shared\": " + std::to_string(launch.shared_bytes) + "}";
    }
    text += (text.empty() ? "\n \"" : ",\n \"") + name + "\": {" + entry + "}";
  }
  return "{" + text + "\n}";
}

}  // namespace vitadapter::test
