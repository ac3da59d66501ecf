// Which kernels did the cases of a CUDA test run, and how did it go?
#pragma once

#include <cxxabi.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <string>

#include "adapter_cases.h"
#include "cuda/simt.cuh"

namespace vitadapter::test {

using cuda::emulator::Launch;
using cuda::emulator::statistics;

inline std::string name_of(const Launch& launch) {
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

  template <typename RunTrial>
  void run(const RunTrial& run_trial) {
    statistics.launches.clear();
    run_trial();
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

}  // namespace vitadapter::test
