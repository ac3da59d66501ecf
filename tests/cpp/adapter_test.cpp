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
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/memory.h"
#include "cuda/adapter.h"

using namespace vitadapter;

namespace {

using Doubles = std::vector<double>;

// Activations and their slopes are this close to float64, times max(1, |u|) (csrc/cpu/simd/activation.h).
constexpr double kActivationError = 2.5e-7;

std::mt19937_64 generator;
int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
template <typename T>
T pick(std::initializer_list<T> choices) {
  return choices.begin()[draw(0, int64_t(choices.size()) - 1)];
}

template <int kThreads>
void thread_pool(int64_t begin, int64_t end, int64_t, cpu::RangeFunction function, void* context) {
  std::vector<std::thread> threads;
  auto bound = [&](int64_t t) { return begin + (end - begin) * t / kThreads; };
  for (int64_t t = 1; t < kThreads; ++t) {
    if (bound(t) < bound(t + 1)) threads.emplace_back(function, bound(t), bound(t + 1), context);
  }
  // The caller takes part, as in PyTorch's pool: what it has in its workspace must outlive that.
  if (begin < bound(1)) function(begin, bound(1), context);
  for (std::thread& thread : threads) thread.join();
}

// A tensor in its own dtype at the end of a heap block. Some begin at an address that is aligned to their elements and
// to nothing more, as views do.
struct Buffer {
  DType dtype = DType::kFloat32;
  int64_t count = 0;
  std::unique_ptr<char[]> block;
  char* bytes = nullptr;

  Buffer() = default;
  Buffer(DType dtype, int64_t count) : dtype(dtype), count(count) {
    const int64_t skipped = draw(0, 1) * element_size(dtype);
    block.reset(new char[skipped + count * element_size(dtype)]);
    bytes = block.get() + skipped;
  }

  static Buffer random(DType dtype, int64_t count, double spread = 1) {
    Buffer buffer(dtype, count);
    std::normal_distribution<double> normal(0, spread);
    for (int64_t i = 0; i < count; ++i) store(buffer.result(), i, normal(generator));
    return buffer;
  }
  // Whole numbers so small that hardly a product or sum of them is ever rounded.
  static Buffer whole(DType dtype, int64_t count) {
    Buffer buffer(dtype, count);
    for (int64_t i = 0; i < count; ++i) store(buffer.result(), i, double(draw(-1, 1)));
    return buffer;
  }
  static Buffer poisoned(DType dtype, int64_t count) {
    Buffer buffer(dtype, count);
    for (int64_t i = 0; i < count; ++i) store(buffer.result(), i, std::numeric_limits<double>::quiet_NaN());
    return buffer;
  }
  Operand operand() const { return {bytes, dtype}; }
  Result result() { return {bytes, dtype}; }
  double at(int64_t i) const { return load<double>(operand(), i); }
  bool same_bits(const Buffer& other) const {
    return count == other.count && (count == 0 || !memcmp(bytes, other.bytes, count * element_size(dtype)));
  }
};

struct Case {
  int64_t seed = 0;
  Buffer x, residual, down, down_bias, up, up_bias, scale, grad;
  bool separate_residual = false;
  AdapterForward forward;    // without outputs
  AdapterBackward backward;  // without hidden and outputs
};

// Of what the kernels cut into pieces there shall be whole pieces, several of them, and every remainder: rows in tiles,
// blocks and chunks; dim and rank in vectors, panels, strips and runs. One case in 20 is large enough for many chunks.
void draw_sizes(AdapterProblem& p) {
  const bool large = draw(0, 19) == 0;
  p.rows_per_sample = pick<int64_t>({1, 3, 7, 33});
  int64_t work = 0;
  do {
    const int64_t rows = large        ? pick<int64_t>({97, 200, 400, 800, 800, 1600})
                         : draw(0, 9) ? draw(1, 70)
                                      : pick<int64_t>({0, 97, 200, 400});
    p.rows = (rows + p.rows_per_sample - 1) / p.rows_per_sample * p.rows_per_sample;
    p.dim = draw(0, 2) ? pick<int64_t>({1, 2, 7, 8, 24, 32, 33, 48, 64, 96, 130, 192, 200, 384}) : draw(1, 100);
    p.rank = draw(0, 2) ? draw(0, 20) : pick<int64_t>({31, 32, 33, 50, 64, 65, 130, 260});
    work = p.rows * p.dim * p.rank;
  } while (large ? work < 1'000'000 || work > 4'000'000 : work > 300'000);
}

std::unique_ptr<Case> draw_case() {
  auto c = std::make_unique<Case>();
  AdapterProblem p;
  const bool wide = draw(0, 4) == 0;
  const DType low = pick({DType::kBFloat16, DType::kFloat16});
  const DType full = wide ? DType::kFloat64 : DType::kFloat32;
  auto any = [&] { return wide || draw(0, 1) ? full : low; };
  const DType x_dtype = any();
  p.compute = wide ? full : x_dtype == low || draw(0, 1) ? low : full;
  draw_sizes(p);
  // Then nothing is in doubt, however long the sums: a kernel that rounds its operands must not hide an error behind
  // it.
  const bool whole = !wide && p.compute == low && draw(0, 1);
  auto numbers = [&](DType dtype, int64_t count, double spread = 1) {
    return whole ? Buffer::whole(dtype, count) : Buffer::random(dtype, count, spread);
  };
  p.activation = whole ? pick({Activation::kRelu, Activation::kIdentity}) : Activation(draw(0, kActivations - 1));
  c->seed = int64_t(generator());
  auto probability = [&] { return whole ? pick({0.0, 0.5, 0.75}) : pick({0.0, 0.0, 0.3, 0.9}); };
  p.dropout = {&c->seed, Stream::kDropout, probability()};
  p.dropout_out = {&c->seed, Stream::kDropoutOut, probability()};
  p.drop_path = {&c->seed, Stream::kDropPath, probability()};

  c->x = numbers(x_dtype, p.rows * p.dim);
  c->separate_residual = draw(0, 1);
  if (c->separate_residual) c->residual = numbers(any(), p.rows * p.dim);
  c->down = numbers(any(), p.rank * p.dim, 1 / std::sqrt(double(p.dim)));
  c->up = numbers(any(), p.dim * p.rank);
  p.x = c->x.operand();
  p.down = c->down.operand();
  p.up = c->up.operand();
  if (draw(0, 1)) {
    c->up_bias = numbers(any(), p.dim);
    p.up_bias = c->up_bias.operand();
  }
  const int64_t scale_kind = draw(0, 2);
  if (scale_kind) {
    p.scale_is_channel = scale_kind == 2;
    c->scale = numbers(any(), p.scale_is_channel ? p.dim : 1);
    p.scale = c->scale.operand();
  } else {
    p.scale_value = pick({1.0, whole ? -0.5 : -0.3});
  }
  static_cast<AdapterProblem&>(c->forward) = p;
  static_cast<AdapterProblem&>(c->backward) = p;
  if (draw(0, 1)) {
    c->down_bias = numbers(any(), p.rank);
    c->forward.down_bias = c->down_bias.operand();
  }
  c->forward.residual = c->separate_residual ? c->residual.operand() : p.x;
  const DType y = c->separate_residual && c->residual.dtype != x_dtype ? full : x_dtype;
  c->grad = numbers(y, p.rows * p.dim);
  c->backward.grad = c->grad.operand();
  c->backward.residual_is_x = !c->separate_residual;
  return c;
}

// Everything an implementation writes; absent ones have no bytes.
struct Outputs {
  Buffer hidden, y, x_grad, down_grad, down_bias_grad, up_grad, up_bias_grad, scale_grad;

  Outputs(const Case& c, int needs) {
    const AdapterProblem& p = c.forward;
    const DType wide = p.x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    hidden = Buffer::poisoned(wide, p.rows * p.rank);
    y = Buffer::poisoned(c.grad.dtype, p.rows * p.dim);
    auto like = [&](int bit, const Buffer& of, Buffer& out) {
      if (of.bytes && (needs >> bit & 1)) out = Buffer::poisoned(of.dtype, of.count);
    };
    like(0, c.x, x_grad);
    like(1, c.down, down_grad);
    like(2, c.down_bias, down_bias_grad);
    like(3, c.up, up_grad);
    like(4, c.up_bias, up_bias_grad);
    like(5, c.scale, scale_grad);
  }
  AdapterForward forward(const Case& c) {
    AdapterForward p = c.forward;
    p.y = y.result();
    p.hidden = hidden.bytes;
    return p;
  }
  AdapterBackward backward(const Case& c) {
    AdapterBackward p = c.backward;
    p.hidden = hidden.bytes;
    p.x_grad = x_grad.result();
    p.down_grad = down_grad.result();
    p.down_bias_grad = down_bias_grad.result();
    p.up_grad = up_grad.result();
    p.up_bias_grad = up_bias_grad.result();
    p.scale_grad = scale_grad.result();
    return p;
  }
  std::vector<std::pair<const char*, const Buffer*>> all() const {
    return {{"hidden", &hidden},
            {"y", &y},
            {"x_grad", &x_grad},
            {"down_grad", &down_grad},
            {"down_bias_grad", &down_bias_grad},
            {"up_grad", &up_grad},
            {"up_bias_grad", &up_bias_grad},
            {"scale_grad", &scale_grad}};
  }
};

// What a kernel may round to the compute dtype beyond x, down, up and g, where it multiplies faster for it.
enum class Rounds {
  kOperands,  // nothing
  kGrad,      // g after dropout and scale instead of before
  kMiddle,    // that, scale ∘ up, z, and gh where it goes on (its own sum, g_down_bias, has it as it was)
};

// The definition in csrc/common/adapter.h, in float64 and in the order of Outputs::all(). Next to every sum stands the
// sum of its terms' magnitudes, carried through the activation by its slope: errors of float32's sums are measured
// against that. `doubts` is by how much a kernel's other roundings may move the sum: 0 where the compute dtype holds
// all that is rounded.
struct Exact {
  std::vector<Doubles> values, magnitudes, doubts;
};

// How good sums are: off by at most this part of the terms' magnitudes, and a little where all terms are tiny.
double sum_unit(DType dtype) { return dtype == DType::kFloat64 ? 1e-13 : 1e-5; }
double sum_error(DType dtype, double magnitude) { return sum_unit(dtype) * (magnitude + 1e-3); }

bool is_curved(Activation activation) {
  return activation == Activation::kGelu || activation == Activation::kGeluTanh || activation == Activation::kSilu;
}

// What the activation adds to the error of its own value, and to that of its slope where u is off as sums are. As
// magnitudes, so in sum_unit()s.
double value_magnitude(const AdapterProblem& p, double u) {
  return is_curved(p.activation) ? kActivationError / 1e-5 * std::max(1.0, std::abs(u)) : 0;
}
double slope_magnitude(const AdapterProblem& p, double u, double magnitude) {
  // No activation bends by more than about 1.
  if (is_curved(p.activation)) return value_magnitude(p, u) + magnitude;
  // The others have one edge: around 0 it may be either slope.
  const bool at_edge = u != 0 && std::abs(u) <= sum_error(p.x.dtype, magnitude);
  return at_edge && p.activation != Activation::kIdentity ? 1 / sum_unit(p.x.dtype) : 0;
}

// How far `value`, itself off by up to `error`, comes to lie from `from` when it is rounded.
double doubt_of(double from, double value, double error, DType compute) {
  return std::max(std::abs(rounded(value + error, compute) - from), std::abs(rounded(value - error, compute) - from));
}

Exact exact(const Case& c, Rounds rounds) {
  const AdapterForward& p = c.forward;
  const int64_t rows = p.rows, dim = p.dim, rank = p.rank;
  Exact e;
  for (int64_t size : {rows * rank, rows * dim, rows * dim, rank * dim, rank, dim * rank, dim,
                       p.scale_is_channel ? dim : int64_t(1)}) {
    e.values.emplace_back(size);
    e.magnitudes.emplace_back(size);
    e.doubts.emplace_back(size);
  }
  enum { kHidden, kY, kX, kDown, kDownBias, kUp, kUpBias, kScale };
  auto add_with = [&](int output, int64_t index, double term, double magnitude, double doubt) {
    e.values[output][index] += term;
    e.magnitudes[output][index] += magnitude;
    e.doubts[output][index] += doubt;
  };
  auto add = [&](int output, int64_t index, double term, double doubt = 0) {
    add_with(output, index, term, std::abs(term), doubt);
  };
  auto operands = [&](const Buffer& b) {
    Doubles values(b.count);
    for (int64_t i = 0; i < b.count; ++i) values[i] = rounded(b.at(i), p.compute);
    return values;
  };
  // The doubt of `from` if a kernel rounds `value` in its stead.
  auto doubt = [&](Rounds least, double from, double value) {
    return rounds < least ? 0 : doubt_of(from, value, 1e-6 * std::abs(value), p.compute);
  };
  const Doubles x = operands(c.x), down = operands(c.down), up = operands(c.up), grad = operands(c.grad);
  Doubles scaled_up_doubt(dim * rank);
  for (int64_t i = 0; i < dim * rank; ++i) {
    const double scale = p.scale_at<double>(i / rank);
    scaled_up_doubt[i] = doubt(Rounds::kMiddle, scale * up[i], scale * c.up.at(i));
  }
  Doubles z(rank), z_magnitude(rank), z_doubt(rank), gh(rank), gh_magnitude(rank), gh_doubt(rank);
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t j = 0; j < rank; ++j) {
      const int64_t i = n * rank + j;
      if (c.down_bias.bytes) add(kHidden, i, c.down_bias.at(j));
      for (int64_t d = 0; d < dim; ++d) add(kHidden, i, x[n * dim + d] * down[j * dim + d]);
      const Activated<double> act = activate(p.activation, e.values[kHidden][i]);
      const double mask = p.dropout.at<double>(n, j);
      z[j] = act.value * mask;
      z_magnitude[j] = std::abs(act.value) + std::abs(act.slope) * e.magnitudes[kHidden][i];
      z_magnitude[j] = (z_magnitude[j] + value_magnitude(p, e.values[kHidden][i])) * mask;
      z_doubt[j] = rounds < Rounds::kMiddle ? 0 : doubt_of(z[j], z[j], sum_error(p.x.dtype, z_magnitude[j]), p.compute);
      gh[j] = gh_magnitude[j] = gh_doubt[j] = 0;
    }
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t i = n * dim + d;
      const double mask = p.dropout_out.at<double>(n, d) * p.sample_factor<double>(n), scale = p.scale_at<double>(d);
      const double g = grad[i] * mask, wide_g = c.grad.at(i) * mask;
      const double g_doubt = doubt(Rounds::kGrad, g, wide_g);
      const double scaled_g_doubt =
          std::max(std::abs(scale) * g_doubt, doubt(Rounds::kGrad, scale * g, scale * wide_g));
      const int64_t scale_index = p.scale_is_channel ? d : 0;
      add(kY, i, c.separate_residual ? c.residual.at(i) : c.x.at(i));
      if (c.up_bias.bytes) {
        add(kY, i, mask * scale * c.up_bias.at(d));
        add(kScale, scale_index, g * c.up_bias.at(d), g_doubt * std::abs(c.up_bias.at(d)));
      }
      add(kUpBias, d, scale * g, std::abs(scale) * g_doubt);
      for (int64_t j = 0; j < rank; ++j) {
        const double up_dj = up[d * rank + j];
        auto add_z = [&](int output, int64_t index, double factor, double factor_doubt) {
          const double size = std::abs(factor);
          add_with(output, index, factor * z[j], size * z_magnitude[j],
                   (size + factor_doubt) * z_doubt[j] + factor_doubt * std::abs(z[j]));
        };
        add_z(kY, i, mask * scale * up_dj, 0);
        add_z(kScale, scale_index, g * up_dj, g_doubt * std::abs(up_dj));
        add_z(kUp, d * rank + j, scale * g, std::abs(scale) * g_doubt);
        gh[j] += g * scale * up_dj;
        gh_magnitude[j] += std::abs(g * scale * up_dj);
        gh_doubt[j] += scaled_g_doubt * std::abs(up_dj) + (std::abs(g) + g_doubt) * scaled_up_doubt[d * rank + j];
      }
      if (!c.separate_residual) add(kX, i, c.grad.at(i));
    }
    for (int64_t j = 0; j < rank; ++j) {
      const double hidden = e.values[kHidden][n * rank + j], magnitude = e.magnitudes[kHidden][n * rank + j];
      const double slope = activate(p.activation, hidden).slope, mask = p.dropout.at<double>(n, j);
      gh[j] *= slope * mask;
      gh_magnitude[j] *= (std::abs(slope) + slope_magnitude(p, hidden, magnitude)) * mask;
      gh_doubt[j] *= std::abs(slope) * mask;
      add_with(kDownBias, j, gh[j], gh_magnitude[j], gh_doubt[j]);
      if (rounds == Rounds::kMiddle) {
        gh_doubt[j] = doubt_of(gh[j], gh[j], gh_doubt[j] + sum_error(p.x.dtype, gh_magnitude[j]), p.compute);
      }
      auto add_through = [&](int output, int64_t index, double other) {
        const double size = std::abs(other);
        add_with(output, index, gh[j] * other, gh_magnitude[j] * size, gh_doubt[j] * size);
      };
      for (int64_t d = 0; d < dim; ++d) {
        add_through(kX, n * dim + d, down[j * dim + d]);
        add_through(kDown, j * dim + d, x[n * dim + d]);
      }
    }
  }
  return e;
}

// Half a unit in the last place, relative.
double epsilon(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return 0x1p-24;
    case DType::kBFloat16: return 0x1p-8;
    case DType::kFloat16: return 0x1p-11;
    default: return 0x1p-53;
  }
}

int failures = 0;

void compare(const char* kernel, int number, const Case& c, const Outputs& outputs, const Exact& e) {
  size_t output = 0;
  for (auto [name, buffer] : outputs.all()) {
    const Doubles &values = e.values[output], &magnitudes = e.magnitudes[output], &doubts = e.doubts[output];
    ++output;
    for (int64_t i = 0; i < buffer->count && buffer->bytes; ++i) {
      const double error = std::abs(buffer->at(i) - values[i]);
      // float16's subnormals are 2^-24 apart.
      const double bound = sum_error(c.x.dtype, magnitudes[i]) + doubts[i] +
                           1.01 * epsilon(buffer->dtype) * (std::abs(values[i]) + doubts[i]) +
                           (buffer->dtype == DType::kFloat16 ? 0x1p-25 : 0);
      // float16 ends at 65504, and a NaN must fail.
      if (error <= bound || (buffer->dtype == DType::kFloat16 && std::abs(values[i]) > 65000)) continue;
      std::printf("%s, case %d (%ld rows, dim %ld, rank %ld): %s[%ld] is %g, expected %g, error %g > %g\n", kernel,
                  number, long(c.forward.rows), long(c.forward.dim), long(c.forward.rank), name, long(i), buffer->at(i),
                  values[i], error, bound);
      ++failures;
      break;
    }
  }
}

void expect_same_bits(const char* kernel, int number, const char* name, const Buffer& one, const Buffer& other,
                      const char* between) {
  if (one.same_bits(other)) return;
  std::printf("%s, case %d: %s differs %s\n", kernel, number, name, between);
  ++failures;
}

// What a kernel leaves in this thread's workspaces, the next one must not read.
void poison_workspaces() {
  constexpr int64_t kBytes = 4 << 20;
  for (cpu::Slot slot : {cpu::Slot::kThread, cpu::Slot::kCall}) memset(cpu::workspace(slot, kBytes), 0xff, kBytes);
}

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
    // Each from a seed of its own: a case is the same whatever ran before it.
    generator.seed(uint64_t(seed) * 1'000'003 + uint64_t(number));
    const auto c = draw_case();
    const int needs = draw(0, 1) ? 0b111111 : int(draw(0, 0b111111));
    std::map<Rounds, Exact> expected;
    auto expect = [&](Rounds rounds) -> const Exact& {
      if (!expected.count(rounds)) expected[rounds] = exact(*c, rounds);
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
  Buffer x(DType::kBFloat16, kRows * kDim), first(DType::kBFloat16, kDim);
  for (int64_t i = 0; i < x.count; ++i) store(x.result(), i, double(1 + i % 127) * 0x1p-133);
  for (int64_t d = 0; d < kDim; ++d) store(first.result(), d, d == 0 ? 1.0 : 0.0);
  for (cpu::Level level : cpu::supported_levels()) {
    Buffer y = Buffer::poisoned(x.dtype, x.count), hidden = Buffer::poisoned(DType::kFloat32, kRows);
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
