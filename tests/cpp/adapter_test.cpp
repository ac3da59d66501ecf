// Are the adapter kernels right, without Python? Random problems against plain float64 loops, for the CPU kernels at
// every instruction-set level that this machine has and for the simple CUDA kernel compiled as C++; then the
// activations one number after the other. Built with AddressSanitizer and UBSan: every buffer ends where its block of
// the heap ends, and outputs and workspaces are poisoned with NaN.
//
//   adapter_test [cases = 400] [seed = 1]
#include "cpu/adapter.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "adapter_cases.h"
#include "cpu_checks.h"
#include "cuda/adapter.h"

using namespace vitadapter;
using namespace vitadapter::test;

namespace {

Rounds rounds_at(cpu::Level level, const AdapterProblem& p) {
  const bool portable = level == cpu::Level::kPortable || p.x.dtype == DType::kFloat64 || p.rows == 0;
  if (portable || p.compute == DType::kFloat32) return Rounds::kOperands;
  return level == cpu::Level::kBf16 && p.compute == DType::kBFloat16 ? Rounds::kMiddle : Rounds::kGrad;
}

void run_cpu(cpu::Level level, int number, const Case& c, int needs, const Exact& e) {
  const char* kernel = cpu::name(level);
  Outputs one(c, needs), three(c, needs);
  poison_workspaces();
  cpu::adapter_forward(level, one.forward(c), thread_pool<1>);
  poison_workspaces();
  cpu::adapter_backward(level, one.backward(c), thread_pool<1>);
  compare(kernel, number, c, one, e);

  AdapterForward alone = three.forward(c);
  alone.hidden = nullptr;
  cpu::adapter_forward(level, alone, thread_pool<1>);
  expect_same_bits(kernel, number, "y", one.y, three.y, "where the hidden layer is not kept");
  cpu::adapter_forward(level, three.forward(c), thread_pool<3>);
  cpu::adapter_backward(level, three.backward(c), thread_pool<3>);
  for (size_t i = 0; i < one.all().size(); ++i) {
    const auto [name, buffer] = one.all()[i];
    expect_same_bits(kernel, number, name, *buffer, *three.all()[i].second, "between 1 and 3 threads");
  }
}

template <typename T>
void run_cuda(int number, const Case& c, int needs, const Exact& e) {
  Outputs simple(c, needs);
  const AdapterForward forward = simple.forward(c);
  cuda::adapter_forward_simple<T>(forward, static_cast<T*>(forward.hidden), nullptr);
  const AdapterBackward backward = simple.backward(c);
  std::vector<T> hidden_grad(backward.rows * backward.rank, T(NAN)), up_product(backward.dim * backward.rank, T(NAN)),
      grad_sum(backward.dim, T(NAN));
  cuda::adapter_backward_simple<T>(backward, hidden_grad.data(), up_product.data(), grad_sum.data(), nullptr);
  compare("simple CUDA kernel", number, c, simple, e);
}

void check_random_problems(int cases, int64_t seed) {
  const std::vector<cpu::Level> levels = cpu::supported_levels();
  std::map<std::string, int> ran;
  for (int number = 0; number < cases; ++number) {
    begin_case(seed, number);
    const auto c = make_case(draw_options());
    const int needs = draw(0, 1) ? 0b111111 : int(draw(0, 0b111111));
    std::map<Rounds, Exact> expected;
    auto expect = [&](Rounds rounds) -> const Exact& {
      if (!expected.count(rounds)) expected[rounds] = exact(*c, precision_of(c->forward), rounds);
      return expected[rounds];
    };
    const bool wide = c->x.dtype == DType::kFloat64;
    wide ? run_cuda<double>(number, *c, needs, expect(Rounds::kOperands))
         : run_cuda<float>(number, *c, needs, expect(Rounds::kOperands));
    for (cpu::Level level : levels) {
      // float64 is the portable kernel's at every level.
      if (wide && level != levels.back()) continue;
      const Rounds rounds = rounds_at(level, c->forward);
      run_cpu(level, number, *c, needs, expect(rounds));
      ++ran[wide                        ? "float64"
            : rounds == Rounds::kMiddle ? std::string(cpu::name(level)) + " in pairs"
                                        : cpu::name(level)];
    }
  }
  std::printf("%d cases;", cases);
  for (const auto& [kernel, count] : ran) std::printf(" %s: %d;", kernel.c_str(), count);
  std::printf(" %d failures\n", failures);
}

// ---- the activations

constexpr const char* kActivationNames[kActivations] = {"gelu", "gelu_tanh", "relu", "leaky_relu", "silu", "identity"};

// act(u) and act'(u) of every u, each in a row of its own through weights of 1: y is the value, x_grad the slope.
void activate_all(cpu::Level level, Activation activation, std::vector<float>& u, std::vector<float>& value,
                  std::vector<float>& slope) {
  std::vector<float> zeros(u.size(), 0.0f), ones(u.size(), 1.0f), hidden(u.size());
  AdapterForward forward;
  forward.rows = int64_t(u.size());
  forward.dim = forward.rank = 1;
  forward.x = {u.data(), DType::kFloat32};
  forward.down = forward.up = {ones.data(), DType::kFloat32};
  forward.activation = activation;
  AdapterBackward backward;
  static_cast<AdapterProblem&>(backward) = forward;
  forward.residual = {zeros.data(), DType::kFloat32};
  forward.y = {value.data(), DType::kFloat32};
  forward.hidden = hidden.data();
  backward.grad = {ones.data(), DType::kFloat32};
  backward.hidden = hidden.data();
  backward.residual_is_x = false;
  backward.x_grad = {slope.data(), DType::kFloat32};
  cpu::adapter_forward(level, forward, thread_pool<1>);
  cpu::adapter_backward(level, backward, thread_pool<1>);
}

void check_activations() {
  std::vector<float> u;
  for (int i = -15 << 14; i <= 15 << 14; ++i) u.push_back(float(i) * 0x1p-14f);
  // Further out the portable kernel's slope of gelu_tanh is ∞ · 0, as PyTorch's is.
  for (float magnitude = 16; magnitude < 1e18f; magnitude *= 1.25f) u.insert(u.end(), {magnitude, -magnitude});
  for (float magnitude = 0x1p-15f; magnitude > 0; magnitude *= 0.5f) u.insert(u.end(), {magnitude, -magnitude});
  u.insert(u.end(), {0.0f, -0.0f});
  std::vector<float> value(u.size()), slope(u.size());
  for (cpu::Level level : cpu::supported_levels()) {
    for (int a = 0; a < kActivations; ++a) {
      activate_all(level, Activation(a), u, value, slope);
      double worst_value = 0, worst_slope = 0;
      for (size_t i = 0; i < u.size(); ++i) {
        const Activated<double> expected = activate(Activation(a), double(u[i]));
        const double unit = std::max(1.0, std::abs(double(u[i])));
        const double value_error = std::abs(value[i] - expected.value) / unit;
        const double slope_error = std::abs(slope[i] - expected.slope) / unit;
        // Written so that a NaN stays.
        if (!(value_error <= worst_value) && !std::isnan(worst_value)) worst_value = value_error;
        if (!(slope_error <= worst_slope) && !std::isnan(worst_slope)) worst_slope = slope_error;
      }
      const bool good = worst_value <= kActivationError && worst_slope <= kActivationError;
      std::printf("%s, %s: value within %.3g, slope within %.3g of float64%s\n", cpu::name(level), kActivationNames[a],
                  worst_value, worst_slope, good ? "" : ": too far");
      failures += !good;
    }
  }
}

// A NaN stays one, and +∞ does; nothing else in the block hears of it.
void check_nan_and_infinity() {
  constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> u(100, 1.0f), value(u.size()), slope(u.size());
  u[7] = kNan, u[40] = -kNan, u[8] = u[99] = kInfinity;
  for (cpu::Level level : cpu::supported_levels()) {
    for (int a = 0; a < kActivations; ++a) {
      activate_all(level, Activation(a), u, value, slope);
      const Activated<double> one = activate(Activation(a), 1.0);
      for (size_t i = 0; i < u.size(); ++i) {
        const bool good = std::isnan(u[i]) ? std::isnan(value[i]) && (!is_curved(Activation(a)) || std::isnan(slope[i]))
                          : std::isinf(u[i]) ? value[i] == kInfinity
                                             : std::abs(value[i] - one.value) + std::abs(slope[i] - one.slope) < 1e-6;
        if (good) continue;
        std::printf("%s, %s: %g gives %g with the slope %g\n", cpu::name(level), kActivationNames[a], u[i], value[i],
                    slope[i]);
        ++failures;
      }
    }
  }
}

// The level bf16 takes subnormal numbers for zero where it multiplies, and there only: the residual passes at every
// level.
void check_subnormals() {
  constexpr int64_t kRows = 60, kDim = 130;
  Buffer x(DType::kBFloat16, kRows * kDim, true), first(DType::kBFloat16, kDim, true);
  for (int64_t i = 0; i < x.count; ++i) store(x.result(), i, double(1 + i % 127) * 0x1p-133);
  for (int64_t d = 0; d < kDim; ++d) store(first.result(), d, d == 0 ? 1.0 : 0.0);
  for (cpu::Level level : cpu::supported_levels()) {
    Buffer y = Buffer::poisoned(x.dtype, x.count, true), hidden = Buffer::poisoned(DType::kFloat32, kRows, true);
    AdapterForward p;
    p.rows = kRows;
    p.dim = kDim;
    p.rank = 1;
    p.x = p.residual = x.operand();
    p.down = p.up = first.operand();
    p.scale_value = 0;
    p.activation = Activation::kIdentity;
    p.compute = DType::kBFloat16;
    p.y = y.result();
    p.hidden = hidden.bytes;
    cpu::adapter_forward(level, p, thread_pool<1>);
    expect_same_bits(cpu::name(level), -1, "y", x, y, "from a residual of subnormal numbers");
    for (int64_t n = 0; n < kRows; ++n) {
      const double expected = level == cpu::Level::kBf16 ? 0 : x.at(n * kDim);
      if (hidden.at(n) == expected) continue;
      std::printf("%s: 1 · %g is %g, expected %g\n", cpu::name(level), x.at(n * kDim), hidden.at(n), expected);
      ++failures;
      break;
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  check_random_problems(argc > 1 ? std::atoi(argv[1]) : 400, argc > 2 ? std::atoll(argv[2]) : 1);
  check_activations();
  check_nan_and_infinity();
  check_subnormals();
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
