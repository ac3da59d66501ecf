// Which problems do the adapter kernels' tests run, what is right for each, and how far may a kernel be from it? For
// every test program in C++: cases drawn at random or made to order, the definition in plain float64 loops, the bounds.
// Built with AddressSanitizer, a test sees every access past a buffer: it ends where its block of the heap ends.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <random>
#include <utility>
#include <vector>

#include "common/adapter.h"

namespace vitadapter::test {

using Doubles = std::vector<double>;

// Activations and their slopes are this close to float64, times max(1, |u|) (csrc/cpu/simd/activation.h).
constexpr double kActivationError = 2.5e-7;

// ---- chance

inline std::mt19937_64 generator;
// Each case from a seed of its own: it is the same whatever ran before it.
inline void begin_case(int64_t seed, int number) { generator.seed(uint64_t(seed) * 1'000'003 + uint64_t(number)); }
inline int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
template <typename T>
T pick(std::initializer_list<T> choices) {
  return choices.begin()[draw(0, int64_t(choices.size()) - 1)];
}

// ---- cases

// A tensor in its own dtype at the end of a heap block. It begins at an address aligned to 16 bytes; with
// `odd_addresses`, half of them begin at one that is aligned to their elements and to nothing more, as views do.
struct Buffer {
  static constexpr std::align_val_t kAlignment{16};
  struct Free {
    void operator()(char* block) const { ::operator delete[](block, kAlignment); }
  };

  DType dtype = DType::kFloat32;
  int64_t count = 0;
  std::unique_ptr<char, Free> block;
  char* bytes = nullptr;

  Buffer() = default;
  Buffer(DType dtype, int64_t count, bool odd_addresses) : dtype(dtype), count(count) {
    const int64_t skipped = odd_addresses ? draw(0, 1) * element_size(dtype) : 0;
    block.reset(static_cast<char*>(::operator new[](skipped + count * element_size(dtype), kAlignment)));
    bytes = block.get() + skipped;
  }

  static Buffer random(DType dtype, int64_t count, bool odd_addresses, double spread) {
    Buffer buffer(dtype, count, odd_addresses);
    std::normal_distribution<double> normal(0, spread);
    for (int64_t i = 0; i < count; ++i) store(buffer.result(), i, normal(generator));
    return buffer;
  }
  // Whole numbers so small that hardly a product or sum of them is ever rounded.
  static Buffer whole(DType dtype, int64_t count, bool odd_addresses) {
    Buffer buffer(dtype, count, odd_addresses);
    for (int64_t i = 0; i < count; ++i) store(buffer.result(), i, double(draw(-1, 1)));
    return buffer;
  }
  static Buffer poisoned(DType dtype, int64_t count, bool odd_addresses) {
    Buffer buffer(dtype, count, odd_addresses);
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

// All of a case but its numbers, named as in AdapterProblem. A tensor is there in its dtype; an optional one may be
// absent.
struct CaseOptions {
  int64_t rows = 1, dim = 1, rank = 1;
  int64_t rows_per_sample = 1;
  DType x = DType::kFloat32, down = DType::kFloat32, up = DType::kFloat32;
  std::optional<DType> residual;  // absent: x itself
  std::optional<DType> down_bias, up_bias;
  std::optional<DType> scale;  // absent: scale_value
  bool scale_is_channel = false;
  double scale_value = 1;
  DType compute = DType::kFloat32;
  bool allow_tf32 = false;
  Activation activation = Activation::kGelu;
  double dropout = 0, dropout_out = 0, drop_path = 0;
  // With relu or identity, a scale_value that is a power of 2, and probabilities of 0, 0.5 and 0.75 nothing is then in
  // doubt, however long the sums: a kernel that rounds its operands must not hide an error behind it.
  bool whole_numbers = false;
  bool odd_addresses = false;  // see Buffer; of the outputs too
};

struct Case {
  CaseOptions options;
  int64_t seed = 0;
  Buffer x, residual, down, down_bias, up, up_bias, scale, grad;
  AdapterForward forward;    // without outputs
  AdapterBackward backward;  // without hidden and outputs
};

// Of what the kernels cut into pieces there shall be whole pieces, several of them, and every remainder: rows in tiles,
// blocks and chunks; dim and rank in vectors, panels, strips and runs. One case in 20 is large enough for many chunks.
inline void draw_sizes(CaseOptions& o) {
  const bool large = draw(0, 19) == 0;
  o.rows_per_sample = pick<int64_t>({1, 3, 7, 33});
  int64_t work = 0;
  do {
    const int64_t rows = large        ? pick<int64_t>({97, 200, 400, 800, 800, 1600})
                         : draw(0, 9) ? draw(1, 70)
                                      : pick<int64_t>({0, 97, 200, 400});
    o.rows = (rows + o.rows_per_sample - 1) / o.rows_per_sample * o.rows_per_sample;
    o.dim = draw(0, 2) ? pick<int64_t>({1, 2, 7, 8, 24, 32, 33, 48, 64, 96, 130, 192, 200, 384}) : draw(1, 100);
    o.rank = draw(0, 2) ? draw(0, 20) : pick<int64_t>({31, 32, 33, 50, 64, 65, 130, 260});
    work = o.rows * o.dim * o.rank;
  } while (large ? work < 1'000'000 || work > 4'000'000 : work > 300'000);
}

inline CaseOptions draw_options() {
  CaseOptions o;
  const bool wide = draw(0, 4) == 0;
  const DType low = pick({DType::kBFloat16, DType::kFloat16});
  const DType full = wide ? DType::kFloat64 : DType::kFloat32;
  auto any = [&] { return wide || draw(0, 1) ? full : low; };
  auto perhaps = [&]() -> std::optional<DType> {
    if (draw(0, 1)) return any();
    return std::nullopt;
  };
  o.x = any();
  o.compute = wide ? full : o.x == low || draw(0, 1) ? low : full;
  draw_sizes(o);
  o.whole_numbers = !wide && o.compute == low && draw(0, 1);
  o.activation =
      o.whole_numbers ? pick({Activation::kRelu, Activation::kIdentity}) : Activation(draw(0, kActivations - 1));
  auto probability = [&] { return o.whole_numbers ? pick({0.0, 0.5, 0.75}) : pick({0.0, 0.0, 0.3, 0.9}); };
  o.dropout = probability();
  o.dropout_out = probability();
  o.drop_path = probability();
  o.residual = perhaps();
  o.down = any();
  o.up = any();
  o.up_bias = perhaps();
  const int64_t scale_kind = draw(0, 2);
  if (scale_kind) {
    o.scale = any();
    o.scale_is_channel = scale_kind == 2;
  } else {
    o.scale_value = pick({1.0, o.whole_numbers ? -0.5 : -0.3});
  }
  o.down_bias = perhaps();
  o.allow_tf32 = draw(0, 1);
  o.odd_addresses = true;
  return o;
}

inline std::unique_ptr<Case> make_case(const CaseOptions& o) {
  auto c = std::make_unique<Case>();
  c->options = o;
  c->seed = int64_t(generator());
  auto numbers = [&](DType dtype, int64_t count, double spread = 1) {
    return o.whole_numbers ? Buffer::whole(dtype, count, o.odd_addresses)
                           : Buffer::random(dtype, count, o.odd_addresses, spread);
  };
  auto optional_numbers = [&](std::optional<DType> dtype, int64_t count) {
    return dtype ? numbers(*dtype, count) : Buffer();
  };
  c->x = numbers(o.x, o.rows * o.dim);
  c->residual = optional_numbers(o.residual, o.rows * o.dim);
  c->down = numbers(o.down, o.rank * o.dim, 1 / std::sqrt(double(o.dim)));
  c->up = numbers(o.up, o.dim * o.rank);
  c->up_bias = optional_numbers(o.up_bias, o.dim);
  c->scale = optional_numbers(o.scale, o.scale_is_channel ? o.dim : 1);
  c->down_bias = optional_numbers(o.down_bias, o.rank);
  // y's: where x and the residual differ, the smallest that holds both.
  const bool wide = o.x == DType::kFloat64 || o.residual == DType::kFloat64;
  const DType y = o.residual.value_or(o.x) == o.x ? o.x : wide ? DType::kFloat64 : DType::kFloat32;
  c->grad = numbers(y, o.rows * o.dim);

  AdapterProblem p;
  p.rows = o.rows;
  p.dim = o.dim;
  p.rank = o.rank;
  p.rows_per_sample = o.rows_per_sample;
  p.x = c->x.operand();
  p.down = c->down.operand();
  p.up = c->up.operand();
  p.up_bias = c->up_bias.operand();
  p.scale = c->scale.operand();
  p.scale_is_channel = o.scale_is_channel;
  p.scale_value = o.scale_value;
  p.activation = o.activation;
  p.dropout = {&c->seed, Stream::kDropout, o.dropout};
  p.dropout_out = {&c->seed, Stream::kDropoutOut, o.dropout_out};
  p.drop_path = {&c->seed, Stream::kDropPath, o.drop_path};
  p.compute = o.compute;
  p.allow_tf32 = o.allow_tf32;
  static_cast<AdapterProblem&>(c->forward) = p;
  static_cast<AdapterProblem&>(c->backward) = p;
  c->forward.down_bias = c->down_bias.operand();
  c->forward.residual = o.residual ? c->residual.operand() : p.x;
  c->backward.grad = c->grad.operand();
  c->backward.residual_is_x = !o.residual;
  return c;
}

// Everything an implementation writes; absent ones have no bytes.
struct Outputs {
  Buffer hidden, y, x_grad, down_grad, down_bias_grad, up_grad, up_bias_grad, scale_grad;

  Outputs(const Case& c, int needs) {
    const AdapterProblem& p = c.forward;
    const DType wide = p.x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    auto make = [&](DType dtype, int64_t count) { return Buffer::poisoned(dtype, count, c.options.odd_addresses); };
    hidden = make(wide, p.rows * p.rank);
    y = make(c.grad.dtype, p.rows * p.dim);
    auto like = [&](int bit, const Buffer& of, Buffer& out) {
      if (of.bytes && (needs >> bit & 1)) out = make(of.dtype, of.count);
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

// ---- what is right

// In which precision do products take their operands? What a dtype holds, or TF32: float32 with 10 bits of mantissa.
enum class Precision { kFloat32, kBFloat16, kFloat16, kFloat64, kTf32 };

// Of kernels without tensor cores.
inline Precision precision_of(const AdapterProblem& p) {
  switch (p.compute) {
    case DType::kFloat32: return Precision::kFloat32;
    case DType::kBFloat16: return Precision::kBFloat16;
    case DType::kFloat16: return Precision::kFloat16;
    default: return Precision::kFloat64;
  }
}
// Of kernels with them, whose float32 products are TF32's where that is allowed.
inline Precision tensor_core_precision(const AdapterProblem& p) {
  const bool tf32 = p.allow_tf32 && p.compute == DType::kFloat32;
  return tf32 ? Precision::kTf32 : precision_of(p);
}

inline double round_to(double value, Precision precision) {
  switch (precision) {
    case Precision::kFloat32: return rounded(value, DType::kFloat32);
    case Precision::kBFloat16: return rounded(value, DType::kBFloat16);
    case Precision::kFloat16: return rounded(value, DType::kFloat16);
    case Precision::kFloat64: return value;
    case Precision::kTf32: break;
  }
  // As cvt.rna.tf32.f32 does: to nearest, ties away from zero. A carry out of the mantissa is right as it is.
  const float full = float(value);
  return std::isfinite(full) ? double(float_of((bits_of(full) + 0x1000u) & ~0x1fffu)) : double(full);
}

// What a kernel may round to its operands' precision beyond x, down, up and g, where it multiplies faster for it.
enum class Rounds {
  kOperands,  // nothing
  kGrad,      // g after dropout and scale instead of before
  kMiddle,    // that, scale ∘ up, z, and gh where it goes on (its own sum, g_down_bias, has it as it was)
};

// The definition in csrc/common/adapter.h, in float64 and in the order of Outputs::all(). Next to every sum stands the
// sum of its terms' magnitudes, carried through the activation by its slope: errors of float32's sums are measured
// against that. `doubts` is by how much a kernel's other roundings may move the sum: 0 where the operands' precision
// holds all that is rounded.
struct Exact {
  std::vector<Doubles> values, magnitudes, doubts;
};

// How good sums are: off by at most this part of the terms' magnitudes, and a little where all terms are tiny.
inline double sum_unit(DType dtype) { return dtype == DType::kFloat64 ? 1e-13 : 1e-5; }
inline double sum_error(DType dtype, double magnitude) { return sum_unit(dtype) * (magnitude + 1e-3); }

inline bool is_curved(Activation activation) {
  return activation == Activation::kGelu || activation == Activation::kGeluTanh || activation == Activation::kSilu;
}

// What the activation adds to the error of its own value, and to that of its slope where u is off as sums are. As
// magnitudes, so in sum_unit()s.
inline double value_magnitude(const AdapterProblem& p, double u) {
  return is_curved(p.activation) ? kActivationError / 1e-5 * std::max(1.0, std::abs(u)) : 0;
}
inline double slope_magnitude(const AdapterProblem& p, double u, double magnitude) {
  // No activation bends by more than about 1.
  if (is_curved(p.activation)) return value_magnitude(p, u) + magnitude;
  // The others have one edge: around 0 it may be either slope.
  const bool at_edge = u != 0 && std::abs(u) <= sum_error(p.x.dtype, magnitude);
  return at_edge && p.activation != Activation::kIdentity ? 1 / sum_unit(p.x.dtype) : 0;
}

// How far `value`, itself off by up to `error`, comes to lie from `from` when it is rounded.
inline double doubt_of(double from, double value, double error, Precision precision) {
  return std::max(std::abs(round_to(value + error, precision) - from),
                  std::abs(round_to(value - error, precision) - from));
}

// Without `backward`, the gradients are left at 0.
inline Exact exact(const Case& c, Precision precision, Rounds rounds, bool backward = true) {
  // These are the sums' own: a kernel that rounds to them changes nothing that the bounds of sums do not know of.
  if (precision == Precision::kFloat32 || precision == Precision::kFloat64) rounds = Rounds::kOperands;
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
    for (int64_t i = 0; i < b.count; ++i) values[i] = round_to(b.at(i), precision);
    return values;
  };
  // The doubt of `from` if a kernel rounds `value` in its stead.
  auto doubt = [&](Rounds least, double from, double value) {
    return rounds < least ? 0 : doubt_of(from, value, 1e-6 * std::abs(value), precision);
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
      z_doubt[j] = rounds < Rounds::kMiddle ? 0 : doubt_of(z[j], z[j], sum_error(p.x.dtype, z_magnitude[j]), precision);
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
      add(kY, i, c.residual.bytes ? c.residual.at(i) : c.x.at(i));
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
        if (!backward) continue;
        add_z(kScale, scale_index, g * up_dj, g_doubt * std::abs(up_dj));
        add_z(kUp, d * rank + j, scale * g, std::abs(scale) * g_doubt);
        gh[j] += g * scale * up_dj;
        gh_magnitude[j] += std::abs(g * scale * up_dj);
        gh_doubt[j] += scaled_g_doubt * std::abs(up_dj) + (std::abs(g) + g_doubt) * scaled_up_doubt[d * rank + j];
      }
      if (!c.residual.bytes) add(kX, i, c.grad.at(i));
    }
    for (int64_t j = 0; j < rank && backward; ++j) {
      const double hidden = e.values[kHidden][n * rank + j], magnitude = e.magnitudes[kHidden][n * rank + j];
      const double slope = activate(p.activation, hidden).slope, mask = p.dropout.at<double>(n, j);
      gh[j] *= slope * mask;
      gh_magnitude[j] *= (std::abs(slope) + slope_magnitude(p, hidden, magnitude)) * mask;
      gh_doubt[j] *= std::abs(slope) * mask;
      add_with(kDownBias, j, gh[j], gh_magnitude[j], gh_doubt[j]);
      if (rounds == Rounds::kMiddle) {
        gh_doubt[j] = doubt_of(gh[j], gh[j], gh_doubt[j] + sum_error(p.x.dtype, gh_magnitude[j]), precision);
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
inline double epsilon(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return 0x1p-24;
    case DType::kBFloat16: return 0x1p-8;
    case DType::kFloat16: return 0x1p-11;
    default: return 0x1p-53;
  }
}

inline int failures = 0;

inline void compare(const char* kernel, int number, const Case& c, const Outputs& outputs, const Exact& e) {
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

inline void expect_same_bits(const char* kernel, int number, const char* name, const Buffer& one, const Buffer& other,
                             const char* between) {
  if (one.same_bits(other)) return;
  std::printf("%s, case %d: %s differs %s\n", kernel, number, name, between);
  ++failures;
}

}  // namespace vitadapter::test
