// Are the adapter kernels right, without Python? Random problems against plain float64 loops, for the portable CPU
// kernel and for the simple CUDA kernel compiled as C++. Built with AddressSanitizer and UBSan: every buffer has
// exactly its size, and outputs are poisoned with NaN.
//
//   adapter_test [cases = 400] [seed = 1]
#include "cpu/adapter.h"

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cuda/adapter.h"

using namespace vitadapter;

namespace {

using Doubles = std::vector<double>;

std::mt19937_64 generator;
int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
template <typename T>
T pick(std::initializer_list<T> choices) {
  return choices.begin()[draw(0, int64_t(choices.size()) - 1)];
}

template <int kThreads>
void thread_pool(int64_t begin, int64_t end, int64_t, cpu::RangeFunction function, void* context) {
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < kThreads; ++t) {
    const int64_t from = begin + (end - begin) * t / kThreads, to = begin + (end - begin) * (t + 1) / kThreads;
    if (from < to) threads.emplace_back(function, from, to, context);
  }
  for (std::thread& thread : threads) thread.join();
}

// A tensor in its own dtype, in a heap block of exactly its size.
struct Buffer {
  DType dtype = DType::kFloat32;
  int64_t count = 0;
  std::unique_ptr<char[]> bytes;

  Buffer() = default;
  Buffer(DType dtype, int64_t count) : dtype(dtype), count(count), bytes(new char[count * element_size(dtype)]) {}

  static Buffer random(DType dtype, int64_t count, double spread = 1) {
    Buffer buffer(dtype, count);
    std::normal_distribution<double> normal(0, spread);
    for (int64_t i = 0; i < count; ++i) store(buffer.result(), i, normal(generator));
    return buffer;
  }
  static Buffer poisoned(DType dtype, int64_t count) {
    Buffer buffer(dtype, count);
    for (int64_t i = 0; i < count; ++i) store(buffer.result(), i, std::numeric_limits<double>::quiet_NaN());
    return buffer;
  }
  Operand operand() const { return {bytes.get(), dtype}; }
  Result result() { return {bytes.get(), dtype}; }
  double at(int64_t i) const { return load<double>(operand(), i); }
  bool same_bits(const Buffer& other) const {
    return count == other.count && (count == 0 || !memcmp(bytes.get(), other.bytes.get(), count * element_size(dtype)));
  }
};

struct Case {
  int64_t seed = 0;
  Buffer x, residual, down, down_bias, up, up_bias, scale, grad;
  bool separate_residual = false;
  AdapterForward forward;    // without outputs
  AdapterBackward backward;  // without hidden and outputs
};

std::unique_ptr<Case> draw_case() {
  auto c = std::make_unique<Case>();
  AdapterProblem p;
  const bool wide = draw(0, 4) == 0;
  const DType low = pick({DType::kBFloat16, DType::kFloat16});
  const DType full = wide ? DType::kFloat64 : DType::kFloat32;
  auto any = [&] { return wide || draw(0, 1) ? full : low; };
  const DType x_dtype = any();
  p.compute = wide ? full : x_dtype == low || draw(0, 1) ? low : full;
  const int64_t samples = draw(0, 5) * pick<int64_t>({1, 1, 20});
  p.rows_per_sample = pick<int64_t>({1, 3, 7, 33});
  p.rows = samples * p.rows_per_sample;
  p.dim = pick<int64_t>({1, 2, 7, 8, 24, 33, 96, 130});
  p.rank = pick<int64_t>({0, 1, 3, 5, 8, 16, 50});
  p.activation = Activation(draw(0, kActivations - 1));
  c->seed = int64_t(generator());
  auto probability = [&] { return pick({0.0, 0.0, 0.3, 0.9}); };
  p.dropout = {&c->seed, Stream::kDropout, probability()};
  p.dropout_out = {&c->seed, Stream::kDropoutOut, probability()};
  p.drop_path = {&c->seed, Stream::kDropPath, probability()};

  c->x = Buffer::random(x_dtype, p.rows * p.dim);
  c->separate_residual = draw(0, 1);
  if (c->separate_residual) c->residual = Buffer::random(any(), p.rows * p.dim);
  c->down = Buffer::random(any(), p.rank * p.dim, 1 / std::sqrt(double(p.dim)));
  c->up = Buffer::random(any(), p.dim * p.rank);
  p.x = c->x.operand();
  p.down = c->down.operand();
  p.up = c->up.operand();
  if (draw(0, 1)) {
    c->up_bias = Buffer::random(any(), p.dim);
    p.up_bias = c->up_bias.operand();
  }
  const int64_t scale_kind = draw(0, 2);
  if (scale_kind) {
    p.scale_is_channel = scale_kind == 2;
    c->scale = Buffer::random(any(), p.scale_is_channel ? p.dim : 1);
    p.scale = c->scale.operand();
  } else {
    p.scale_value = pick({1.0, -0.3});
  }
  static_cast<AdapterProblem&>(c->forward) = p;
  static_cast<AdapterProblem&>(c->backward) = p;
  if (draw(0, 1)) {
    c->down_bias = Buffer::random(any(), p.rank);
    c->forward.down_bias = c->down_bias.operand();
  }
  c->forward.residual = c->separate_residual ? c->residual.operand() : p.x;
  const DType y = c->separate_residual && c->residual.dtype != x_dtype ? full : x_dtype;
  c->grad = Buffer::random(y, p.rows * p.dim);
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
    p.hidden = hidden.bytes.get();
    return p;
  }
  AdapterBackward backward(const Case& c) {
    AdapterBackward p = c.backward;
    p.hidden = hidden.bytes.get();
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

// The definition in csrc/common/adapter.h, in float64 and in the order of Outputs::all(). Next to every sum stands the
// sum of its terms' magnitudes, carried through the activation by its slope: rounding errors are measured against that.
struct Exact {
  std::vector<Doubles> values, magnitudes;
};

Exact exact(const Case& c) {
  const AdapterForward& p = c.forward;
  const int64_t rows = p.rows, dim = p.dim, rank = p.rank;
  Exact e;
  for (int64_t size : {rows * rank, rows * dim, rows * dim, rank * dim, rank, dim * rank, dim,
                       p.scale_is_channel ? dim : int64_t(1)}) {
    e.values.emplace_back(size);
    e.magnitudes.emplace_back(size);
  }
  auto add_with = [&](int output, int64_t index, double term, double magnitude) {
    e.values[output][index] += term;
    e.magnitudes[output][index] += magnitude;
  };
  auto add = [&](int output, int64_t index, double term) { add_with(output, index, term, std::abs(term)); };
  enum { kHidden, kY, kX, kDown, kDownBias, kUp, kUpBias, kScale };
  auto operand = [&](const Buffer& b, int64_t i) { return rounded(b.at(i), p.compute); };
  Doubles gh(rank), gh_magnitude(rank), z(rank), z_magnitude(rank);
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t j = 0; j < rank; ++j) {
      if (c.down_bias.bytes) add(kHidden, n * rank + j, c.down_bias.at(j));
      for (int64_t d = 0; d < dim; ++d)
        add(kHidden, n * rank + j, operand(c.x, n * dim + d) * operand(c.down, j * dim + d));
      const Activated<double> act = activate(p.activation, e.values[kHidden][n * rank + j]);
      const double mask = p.dropout.at<double>(n, j);
      z[j] = act.value * mask;
      z_magnitude[j] = (std::abs(act.value) + std::abs(act.slope) * e.magnitudes[kHidden][n * rank + j]) * mask;
      gh[j] = gh_magnitude[j] = 0;
    }
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t i = n * dim + d;
      const double mask = p.dropout_out.at<double>(n, d) * p.sample_factor<double>(n);
      const double scale = p.scale_at<double>(d), g = operand(c.grad, i) * mask;
      const int64_t scale_index = p.scale_is_channel ? d : 0;
      add(kY, i, c.separate_residual ? c.residual.at(i) : c.x.at(i));
      if (c.up_bias.bytes) {
        add(kY, i, mask * scale * c.up_bias.at(d));
        add(kScale, scale_index, g * c.up_bias.at(d));
      }
      add(kUpBias, d, scale * g);
      for (int64_t j = 0; j < rank; ++j) {
        const double up = operand(c.up, d * rank + j);
        auto add_z = [&](int output, int64_t index, double factor) {
          add_with(output, index, factor * z[j], std::abs(factor) * z_magnitude[j]);
        };
        add_z(kY, i, mask * scale * up);
        add_z(kScale, scale_index, g * up);
        add_z(kUp, d * rank + j, scale * g);
        gh[j] += g * scale * up;
        gh_magnitude[j] += std::abs(g * scale * up);
      }
      if (!c.separate_residual) add(kX, i, c.grad.at(i));
    }
    for (int64_t j = 0; j < rank; ++j) {
      const double slope = activate(p.activation, e.values[kHidden][n * rank + j]).slope;
      const double mask = p.dropout.at<double>(n, j);
      gh[j] *= slope * mask;
      // No activation bends by more than about 1: that is how far an error of `hidden` moves the slope.
      gh_magnitude[j] *= (std::abs(slope) + e.magnitudes[kHidden][n * rank + j]) * mask;
      auto add_through = [&](int output, int64_t index, double other) {
        add_with(output, index, gh[j] * other, gh_magnitude[j] * std::abs(other));
      };
      add_through(kDownBias, j, 1);
      for (int64_t d = 0; d < dim; ++d) {
        add_through(kX, n * dim + d, operand(c.down, j * dim + d));
        add_through(kDown, j * dim + d, operand(c.x, n * dim + d));
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
  const double sums = c.x.dtype == DType::kFloat64 ? 1e-13 : 1e-5;
  size_t output = 0;
  for (auto [name, buffer] : outputs.all()) {
    const Doubles &values = e.values[output], &magnitudes = e.magnitudes[output];
    ++output;
    for (int64_t i = 0; i < buffer->count && buffer->bytes; ++i) {
      const double error = std::abs(buffer->at(i) - values[i]);
      // float16's subnormals are 2^-24 apart.
      const double bound = sums * (magnitudes[i] + 1e-3) + 1.01 * epsilon(buffer->dtype) * std::abs(values[i]) +
                           (buffer->dtype == DType::kFloat16 ? 0x1p-25 : 0);
      // float16 ends at 65504, and a NaN must fail.
      if (error <= bound || (buffer->dtype == DType::kFloat16 && std::abs(values[i]) > 65000)) continue;
      std::printf("%s, case %d (%ld rows, dim %ld, rank %ld): %s[%ld] is %g, expected %g, error %g > %g\n", kernel,
                  number, long(c.x.count / c.forward.dim), long(c.forward.dim), long(c.forward.rank), name, long(i),
                  buffer->at(i), values[i], error, bound);
      ++failures;
      break;
    }
  }
}

template <typename T>
void run(int number, const Case& c, int needs) {
  const Exact e = exact(c);
  Outputs portable(c, needs), threaded(c, needs), simple(c, needs);

  cpu::adapter_forward<T>(portable.forward(c), thread_pool<1>);
  cpu::adapter_backward<T>(portable.backward(c), thread_pool<1>);
  compare("portable CPU kernel", number, c, portable, e);

  cpu::adapter_forward<T>(threaded.forward(c), thread_pool<3>);
  cpu::adapter_backward<T>(threaded.backward(c), thread_pool<3>);
  for (size_t i = 0; i < portable.all().size(); ++i) {
    if (portable.all()[i].second->same_bits(*threaded.all()[i].second)) continue;
    std::printf("case %d: %s differs between 1 and 3 threads\n", number, portable.all()[i].first);
    ++failures;
  }

  const AdapterForward forward = simple.forward(c);
  cuda::adapter_forward_simple<T>(forward, static_cast<T*>(forward.hidden), nullptr);
  const AdapterBackward backward = simple.backward(c);
  std::vector<T> hidden_grad(backward.rows * backward.rank, T(NAN)), up_product(backward.dim * backward.rank, T(NAN)),
      grad_sum(backward.dim, T(NAN));
  cuda::adapter_backward_simple<T>(backward, hidden_grad.data(), up_product.data(), grad_sum.data(), nullptr);
  compare("simple CUDA kernel", number, c, simple, e);
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 400;
  generator.seed(argc > 2 ? std::atoll(argv[2]) : 1);
  for (int number = 0; number < cases; ++number) {
    const auto c = draw_case();
    const int needs = draw(0, 1) ? 0b111111 : int(draw(0, 0b111111));
    c->x.dtype == DType::kFloat64 ? run<double>(number, *c, needs) : run<float>(number, *c, needs);
  }
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures ? 1 : 0;
}
