// Are the CUDA kernels right? All of them, on the CPU (csrc/cuda/emulator.h), against plain float64 loops and in
// several orders of their threads, under AddressSanitizer and UBSan.
//
//   cuda_test                     the emulator itself, every kernel on sampled cases, planted faults: a few minutes
//   cuda_test adapter             of that what concerns the adapter; `others`: the rest, so that two cores share it
//   cuda_test samples 5 [60]      the sampled cases of another seed, or 60 of each op's
//   cuda_test everywhere [1/4]    every combination of the adapter's sizes and dtypes, or a part: an hour
//   cuda_test launches            JSON: threads and shared memory of each kernel, for benchmarks/resources.py
#include "cuda_test.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

using namespace vitadapter::test;

constexpr int kAll = 1 << 30;

int main(int argc, char** argv) {
  const char* const what = argc > 1 ? argv[1] : "";
  int found = 0;
  const bool adapter = !*what || !std::strcmp(what, "adapter"), others = !*what || !std::strcmp(what, "others");
  if (adapter || others) {
    if (adapter) found += check_adapter_samples(1, kAll) + check_adapter_limits();
    if (others) {
      found += check_emulator() + check_arc_samples(1, kAll) + check_arc_limits() +
               check_consolidator_samples(1, kAll) + check_consolidator_limits() + check_faults();
    }
  } else if (!std::strcmp(what, "samples")) {
    const int seed = argc > 2 ? std::atoi(argv[2]) : 0, most = argc > 3 ? std::atoi(argv[3]) : kAll;
    if (seed < 1 || most < 1) {
      std::fprintf(stderr, "cuda_test: samples takes a seed and a number of cases, both from 1 on\n");
      return 2;
    }
    found = check_adapter_samples(seed, most) + check_arc_samples(seed, most) + check_consolidator_samples(seed, most);
  } else if (!std::strcmp(what, "everywhere")) {
    int part = 1, parts = 1;
    if (argc > 2 && (std::sscanf(argv[2], "%d/%d", &part, &parts) != 2 || part < 1 || part > parts)) {
      std::fprintf(stderr, "cuda_test: '%s' is no part such as 1/4\n", argv[2]);
      return 2;
    }
    found = check_adapter_everywhere(part, parts);
  } else if (!std::strcmp(what, "launches")) {
    std::printf("%s\n", launches().c_str());
    return 0;
  } else {
    std::fprintf(stderr, "cuda_test: '%s' is none of: adapter, others, samples SEED, everywhere, launches\n", what);
    return 2;
  }
  std::printf("%d failures\n", found);
  return found ? 1 : 0;
}
