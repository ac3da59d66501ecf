// Is the CPU side of ARC right, without Python? Random problems against plain float64 loops at every instruction-set
// level that this machine has. Built with AddressSanitizer and UBSan: every buffer ends where its block of the heap
// ends, and outputs and workspaces are poisoned with NaN.
//
//   arc_test [cases = 300] [seed = 1]
#include "cpu/arc.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "arc_cases.h"
#include "cpu_checks.h"

using namespace vitadapter;
using namespace vitadapter::test;

namespace {

// float16 is float32 on the CPU.
Precision cpu_precision(DType compute) {
  switch (compute) {
    case DType::kBFloat16: return Precision::kBFloat16;
    case DType::kFloat64: return Precision::kFloat64;
    default: return Precision::kFloat32;
  }
}

void run_cpu(cpu::Level level, int number, const ArcCase& c, int needs, const Exact& e) {
  const char* kernel = cpu::name(level);
  ArcOutputs one(c, needs), three(c, needs);
  poison_workspaces();
  cpu::arc_forward(level, one.forward(c), thread_pool<1>);
  poison_workspaces();
  cpu::arc_backward(level, one.backward(c), thread_pool<1>);
  compare(kernel, number, c, one, e);

  ArcForward alone = three.forward(c);
  alone.hidden = nullptr;
  cpu::arc_forward(level, alone, thread_pool<1>);
  expect_same_bits(kernel, number, "y", one.y, three.y, "where the hidden layer is not kept");
  cpu::arc_forward(level, three.forward(c), thread_pool<3>);
  cpu::arc_backward(level, three.backward(c), thread_pool<3>);
  for (size_t i = 0; i < one.all().size(); ++i) {
    const auto [name, buffer] = one.all()[i];
    expect_same_bits(kernel, number, name, *buffer, *three.all()[i].second, "between 1 and 3 threads");
  }
}

void check_random_problems(int cases, int64_t seed) {
  const std::vector<cpu::Level> levels = cpu::supported_levels();
  std::map<std::string, int> ran;
  for (int number = 0; number < cases; ++number) {
    begin_case(seed, number);
    const CaseOptions options = draw_options();
    const auto c = make_arc_case(options, pick({1.0, 1.0, 1e-6, 0.0}));
    const int needs = draw(0, 1) ? kAllArcGrads : int(draw(0, kAllArcGrads));
    const Precision precision = cpu_precision(options.compute);
    const bool pairs = levels.back() == cpu::Level::kBf16 && precision == Precision::kBFloat16 && options.rows > 0;
    const Exact expected = exact(*c, precision, false);
    for (cpu::Level level : levels) {
      // float64 is the portable kernel's at every level.
      if (precision == Precision::kFloat64 && level != levels.back()) continue;
      const bool in_pairs = pairs && level == cpu::Level::kBf16;
      run_cpu(level, number, *c, needs, in_pairs ? exact(*c, precision, true) : expected);
      ++ran[precision == Precision::kFloat64 ? "float64"
            : in_pairs                       ? std::string(cpu::name(level)) + " in pairs"
                                             : cpu::name(level)];
    }
  }
  std::printf("%d cases;", cases);
  for (const auto& [kernel, count] : ran) std::printf(" %s: %d;", kernel.c_str(), count);
  std::printf(" %d failures\n", failures);
}

}  // namespace

int main(int argc, char** argv) {
  check_random_problems(argc > 1 ? std::atoi(argv[1]) : 300, argc > 2 ? std::atoll(argv[2]) : 1);
  return failures ? 1 : 0;
}
