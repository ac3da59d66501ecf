// Is the CPU side of the consolidator right, without Python? Random problems against plain float64 loops at every
// instruction-set level that this machine has. Built with AddressSanitizer and UBSan: every buffer ends where its block
// of the heap ends, and outputs and workspaces are poisoned with NaN.
//
//   consolidator_test [cases = 300] [seed = 1]
#include "cpu/consolidator.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "consolidator_cases.h"
#include "cpu_checks.h"

using namespace vitadapter;
using namespace vitadapter::test;

namespace {

void run_cpu(cpu::Level level, int number, const ConsolidatorCase& c, int needs, const Exact& e) {
  const char* kernel = cpu::name(level);
  ConsolidatorOutputs one(c, needs), three(c, needs);
  poison_workspaces();
  cpu::consolidator_forward(level, one.forward(c), thread_pool<1>);
  poison_workspaces();
  cpu::consolidator_backward(level, one.backward(c), thread_pool<1>);
  compare(kernel, number, c, one, e);
  cpu::consolidator_forward(level, three.forward(c), thread_pool<3>);
  cpu::consolidator_backward(level, three.backward(c), thread_pool<3>);
  for (size_t i = 0; i < one.all().size(); ++i) {
    const auto [name, buffer] = one.all()[i];
    expect_same_bits(kernel, number, name, *buffer, *three.all()[i].second, "between 1 and 3 threads");
  }
}

void run_weight(cpu::Level level, int number, const ConsolidatorCase& c, DType dtype) {
  const int wrong = wrong_weights(c, dtype, [&](const ConsolidatorWeight& problem) {
    poison_workspaces();
    cpu::consolidator_weight(level, problem, thread_pool<3>);
  });
  if (wrong == 0) return;
  std::printf("%s, case %d: %d entries of the weight are wrong\n", cpu::name(level), number, wrong);
  ++failures;
}

// By name: what the sizes of models and odd sizes are.
std::vector<ConsolidatorOptions> named_options() {
  std::vector<ConsolidatorOptions> all;
  const auto add = [&](int64_t in, int64_t out, std::vector<int64_t> groups) {
    ConsolidatorOptions o;
    o.rows = 13;
    o.in = in;
    o.out = out;
    o.groups = std::move(groups);
    o.bias = o.base = o.x_grad_base = DType::kFloat32;
    o.drop_path = 0.5;
    all.push_back(o);
  };
  add(30, 42, {6});
  add(768, 2304, {384, 96});
  add(768, 768, {384});
  add(768, 3072, {384, 384});
  add(3072, 768, {384, 384, 12, 768});
  return all;
}

void check_problems(int cases, int64_t seed) {
  const std::vector<cpu::Level> levels = cpu::supported_levels();
  const std::vector<ConsolidatorOptions> named = named_options();
  std::map<std::string, int> ran;
  for (int number = 0; number < cases + int(named.size()); ++number) {
    begin_case(seed, number);
    const ConsolidatorOptions options = number < cases ? draw_consolidator_options() : named[size_t(number - cases)];
    const auto c = make_consolidator_case(options);
    const int needs = draw(0, 1) ? kAllConsolidatorGrads : int(draw(0, kAllConsolidatorGrads));
    const Exact expected = exact(*c);
    for (cpu::Level level : levels) {
      // float64 is the portable kernel's at every level.
      const bool wide = options.compute == DType::kFloat64;
      if (wide && level != levels.back()) continue;
      run_cpu(level, number, *c, needs, expected);
      run_weight(level, number, *c, options.x);
      ++ran[wide ? "float64" : cpu::name(level)];
    }
  }
  std::printf("%d cases;", cases + int(named.size()));
  for (const auto& [kernel, count] : ran) std::printf(" %s: %d;", kernel.c_str(), count);
  std::printf(" %d failures\n", failures);
}

// An output of so many elements that begins at this byte of a cache line, and ends where its block of the heap ends.
class PlacedOutput {
 public:
  PlacedOutput(DType dtype, int64_t count, int64_t past)
      : block_(static_cast<char*>(::operator new[](size_t(past + count * element_size(dtype)), kLine))),
        result_{block_.get() + past, dtype},
        bytes_(size_t(count * element_size(dtype))) {
    memset(result_.data, 0xff, bytes_);
  }
  Result result() const { return result_; }
  bool same_bits(const PlacedOutput& other) const { return !memcmp(result_.data, other.result_.data, bytes_); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(char* block) const { ::operator delete[](block, kLine); }
  };
  std::unique_ptr<char, Free> block_;
  Result result_;
  size_t bytes_;
};

// Large outputs are written past the caches, if they begin with a cache line. That changes no bit.
void check_streams() {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    begin_case(2, int(dtype));
    ConsolidatorOptions o;
    o.in = 320;
    o.out = 352;
    o.groups = {32, 16};
    o.rows = cpu::stream_bytes() / (o.in * element_size(dtype)) + 5;
    o.x = o.compute = dtype;
    const auto c = make_consolidator_case(o);
    const auto run = [&](cpu::Level level, const PlacedOutput& y, const PlacedOutput& x_grad) {
      ConsolidatorForward forward = c->forward;
      forward.y = y.result();
      cpu::consolidator_forward(level, forward, thread_pool<3>);
      ConsolidatorBackward backward = c->backward;
      backward.x_grad = x_grad.result();
      cpu::consolidator_backward(level, backward, thread_pool<3>);
    };
    for (cpu::Level level : cpu::supported_levels()) {
      const PlacedOutput y(dtype, o.rows * o.out, 0), x_grad(dtype, o.rows * o.in, 0);
      const PlacedOutput plain_y(dtype, o.rows * o.out, 16), plain_x_grad(dtype, o.rows * o.in, 16);
      run(level, y, x_grad);
      run(level, plain_y, plain_x_grad);
      const auto streams = [&](const PlacedOutput& output, int64_t width) {
        return cpu::streams(output.result().data, o.rows, width * element_size(dtype));
      };
      if (streams(y, o.out) && streams(x_grad, o.in) && !streams(plain_y, o.out) && !streams(plain_x_grad, o.in) &&
          y.same_bits(plain_y) && x_grad.same_bits(plain_x_grad)) {
        continue;
      }
      std::printf("%s: outputs that are written past the caches differ from others\n", cpu::name(level));
      ++failures;
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  check_streams();
  check_problems(argc > 1 ? std::atoi(argv[1]) : 300, argc > 2 ? std::atoll(argv[2]) : 1);
  return failures ? 1 : 0;
}
