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
#include <string>
#include <utility>
#include <vector>

#include "common/adapter.h"

namespace vitadapter::test {

// For loops that would take most of a test's time, and in which no kernel runs.
#define VA_UNSANITIZED [[gnu::no_sanitize("address", "undefined")]]

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

// Which gradients are asked for; of a tensor that is not there there is none.
enum Needs {
  kXGrad = 1,
  kDownGrad = 2,
  kDownBiasGrad = 4,
  kUpGrad = 8,
  kUpBiasGrad = 16,
  kScaleGrad = 32,
  kAllGrads = 63,
};

// Everything an implementation writes; absent ones have no bytes.
struct Outputs {
  Buffer hidden, y, x_grad, down_grad, down_bias_grad, up_grad, up_bias_grad, scale_grad;

  Outputs(const Case& c, int needs) {
    const AdapterProblem& p = c.forward;
    const DType wide = p.x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    auto make = [&](DType dtype, int64_t count) { return Buffer::poisoned(dtype, count, c.options.odd_addresses); };
    hidden = make(wide, p.rows * p.rank);
    y = make(c.grad.dtype, p.rows * p.dim);
    auto like = [&](Needs need, const Buffer& of, Buffer& out) {
      if (of.bytes && (needs & need)) out = make(of.dtype, of.count);
    };
    like(kXGrad, c.x, x_grad);
    like(kDownGrad, c.down, down_grad);
    like(kDownBiasGrad, c.down_bias, down_bias_grad);
    like(kUpGrad, c.up, up_grad);
    like(kUpBiasGrad, c.up_bias, up_bias_grad);
    like(kScaleGrad, c.scale, scale_grad);
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
template <typename Problem>
Precision precision_of(const Problem& p) {
  switch (p.compute) {
    case DType::kFloat32: return Precision::kFloat32;
    case DType::kBFloat16: return Precision::kBFloat16;
    case DType::kFloat16: return Precision::kFloat16;
    default: return Precision::kFloat64;
  }
}
// Of kernels with them, whose float32 products are TF32's where that is allowed; in vain where x is no float32 to begin
// with.
template <typename Problem>
Precision tensor_core_precision(const Problem& p) {
  const bool tf32 = p.allow_tf32 && p.compute == DType::kFloat32 && p.x.dtype == DType::kFloat32;
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
  kOperands,    // nothing
  kGrad,        // g after dropout and scale instead of before
  kMiddle,      // that, scale ∘ up, z, and gh where it goes on (its own sum, g_down_bias, has it as it was)
  kHiddenGrad,  // that, and gh in its own sum too, as plain PyTorch does; but g only in products, not in its sum
};

// A sum in float64. Next to it stands the sum of its terms' magnitudes, carried through the activation by its slope:
// errors of float32's sums are measured against that. `doubt` is by how much a kernel's other roundings may move the
// sum: 0 where the operands' precision holds all that is rounded.
struct Sum {
  double value = 0, magnitude = 0, doubt = 0;

  VA_UNSANITIZED void add(double term, double term_doubt = 0) {
    value += term;
    magnitude += std::abs(term);
    doubt += term_doubt;
  }
  // factor · sum, where the factor may be off by factor_doubt.
  VA_UNSANITIZED void add_times(double factor, double factor_doubt, const Sum& sum) {
    const double size = std::abs(factor);
    value += factor * sum.value;
    magnitude += size * sum.magnitude;
    doubt += (size + factor_doubt) * sum.doubt + factor_doubt * std::abs(sum.value);
  }
};

// What the definition in csrc/common/adapter.h says, output by output in the order of Outputs::all().
using Exact = std::vector<std::vector<Sum>>;

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

// In loops three deep, which are most of some tests' time.
VA_UNSANITIZED inline Exact exact(const Case& c, Precision precision, Rounds rounds) {
  // These are the sums' own: a kernel that rounds to them changes nothing that the bounds of sums do not know of.
  if (precision == Precision::kFloat32 || precision == Precision::kFloat64) rounds = Rounds::kOperands;
  const AdapterForward& p = c.forward;
  const int64_t rows = p.rows, dim = p.dim, rank = p.rank;
  enum { kHidden, kY, kX, kDown, kDownBias, kUp, kUpBias, kScale };
  Exact e;
  for (int64_t size : {rows * rank, rows * dim, rows * dim, rank * dim, rank, dim * rank, dim,
                       p.scale_is_channel ? dim : int64_t(1)}) {
    e.emplace_back(size);
  }
  auto operands = [&](const Buffer& b, Precision to) {
    Doubles values(b.count);
    for (int64_t i = 0; i < b.count; ++i) values[i] = round_to(b.at(i), to);
    return values;
  };
  // The doubt of `from` if a kernel rounds `value` in its stead.
  auto doubt = [&](Rounds least, double from, double value, Precision to) {
    return rounds < least ? 0 : doubt_of(from, value, 1e-6 * std::abs(value), to);
  };
  // TF32 is for products. Outside of them, in the sum of g' and in up ∘ G, operands are in the compute dtype.
  const Precision outside = precision_of(p);
  const Doubles x = operands(c.x, precision), down = operands(c.down, precision), up = operands(c.up, precision),
                grad = operands(c.grad, precision), outside_up = operands(c.up, outside);
  Doubles scaled_up_doubt(dim * rank);
  for (int64_t i = 0; i < dim * rank; ++i) {
    const double scale = p.scale_at<double>(i / rank);
    // Not in float16, where it may be too small for any number.
    if (precision != Precision::kFloat16)
      scaled_up_doubt[i] = doubt(Rounds::kMiddle, scale * up[i], scale * c.up.at(i), precision);
  }
  std::vector<Sum> z_row(rank), gh_row(rank);
  Sum *const z = z_row.data(), *const gh = gh_row.data();
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t j = 0; j < rank; ++j) {
      const double *const x_n = x.data() + n * dim, *const down_j = down.data() + j * dim;
      Sum hidden;
      if (c.down_bias.bytes) hidden.add(c.down_bias.at(j));
      for (int64_t d = 0; d < dim; ++d) hidden.add(x_n[d] * down_j[d]);
      const Activated<double> act = activate(p.activation, hidden.value);
      const double mask = p.dropout.at<double>(n, j);
      const double magnitude =
          std::abs(act.value) + std::abs(act.slope) * hidden.magnitude + value_magnitude(p, hidden.value);
      z[j] = {act.value * mask, magnitude * mask};
      if (rounds >= Rounds::kMiddle) {
        z[j].doubt = doubt_of(z[j].value, z[j].value, sum_error(p.x.dtype, z[j].magnitude), precision);
      }
      gh[j] = {};
      e[kHidden][n * rank + j] = hidden;
    }
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t i = n * dim + d;
      const double mask = p.dropout_out.at<double>(n, d) * p.sample_factor<double>(n), scale = p.scale_at<double>(d);
      const double g = grad[i] * mask, wide_g = c.grad.at(i) * mask;
      const double g_doubt = doubt(Rounds::kGrad, g, wide_g, precision);
      const double scaled_g_doubt =
          std::max(std::abs(scale) * g_doubt, doubt(Rounds::kGrad, scale * g, scale * wide_g, precision));
      const bool sums_wide = rounds == Rounds::kHiddenGrad;
      const double summed_g = sums_wide ? wide_g : round_to(c.grad.at(i), outside) * mask;
      const double summed_g_doubt = sums_wide ? 0 : doubt(Rounds::kGrad, summed_g, wide_g, outside);
      Sum y, scale_sum = e[kScale][p.scale_is_channel ? d : 0];
      y.add(c.residual.bytes ? c.residual.at(i) : c.x.at(i));
      if (c.up_bias.bytes) {
        const double bias = c.up_bias.at(d);
        y.add(mask * scale * bias);
        scale_sum.add(summed_g * bias, summed_g_doubt * std::abs(bias));
      }
      e[kUpBias][d].add(scale * summed_g, std::abs(scale) * summed_g_doubt);
      const double *const up_d = up.data() + d * rank, *const outside_up_d = outside_up.data() + d * rank;
      const double* const up_doubt_d = scaled_up_doubt.data() + d * rank;
      Sum* const up_sums = e[kUp].data() + d * rank;
      for (int64_t j = 0; j < rank; ++j) {
        y.add_times(mask * scale * up_d[j], 0, z[j]);
        scale_sum.add_times(g * outside_up_d[j], g_doubt * std::abs(outside_up_d[j]), z[j]);
        up_sums[j].add_times(scale * g, std::abs(scale) * g_doubt, z[j]);
        gh[j].add(g * scale * up_d[j], scaled_g_doubt * std::abs(up_d[j]) + (std::abs(g) + g_doubt) * up_doubt_d[j]);
      }
      e[kScale][p.scale_is_channel ? d : 0] = scale_sum;
      e[kY][i] = y;
      if (!c.residual.bytes) e[kX][i].add(c.grad.at(i));
    }
    for (int64_t j = 0; j < rank; ++j) {
      const Sum& hidden = e[kHidden][n * rank + j];
      const double slope = activate(p.activation, hidden.value).slope, mask = p.dropout.at<double>(n, j);
      gh[j].value *= slope * mask;
      gh[j].magnitude *= (std::abs(slope) + slope_magnitude(p, hidden.value, hidden.magnitude)) * mask;
      gh[j].doubt *= std::abs(slope) * mask;
      const Sum unrounded = gh[j];
      if (rounds >= Rounds::kMiddle) {
        gh[j].doubt =
            doubt_of(gh[j].value, gh[j].value, gh[j].doubt + sum_error(p.x.dtype, gh[j].magnitude), precision);
      }
      e[kDownBias][j].add_times(1, 0, rounds == Rounds::kHiddenGrad ? gh[j] : unrounded);
      const double *const x_n = x.data() + n * dim, *const down_j = down.data() + j * dim;
      Sum *const x_sums = e[kX].data() + n * dim, *const down_sums = e[kDown].data() + j * dim;
      for (int64_t d = 0; d < dim; ++d) {
        x_sums[d].add_times(down_j[d], 0, gh[j]);
        down_sums[d].add_times(x_n[d], 0, gh[j]);
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

template <typename Problem>
std::string sizes_of(const Problem& p) {
  const auto text = [](const char* name, int64_t size) { return std::string(", ") + name + std::to_string(size); };
  const std::string rows = std::to_string(p.rows) + " rows";
  if constexpr (requires { p.rank; }) return rows + text("dim ", p.dim) + text("rank ", p.rank);
  if constexpr (requires { p.branches; }) {
    return rows + text("in ", p.in) + text("out ", p.out) + text("groups ", p.branch[0].groups);
  }
}

template <typename AnyCase, typename AnyOutputs>
void compare(const char* kernel, int number, const AnyCase& c, const AnyOutputs& outputs, const Exact& e) {
  size_t output = 0;
  for (auto [name, buffer] : outputs.all()) {
    const std::vector<Sum>& sums = e[output++];
    for (int64_t i = 0; i < buffer->count && buffer->bytes; ++i) {
      const Sum& sum = sums[i];
      const double error = std::abs(buffer->at(i) - sum.value);
      // float16's subnormals are 2^-24 apart.
      const double bound = sum_error(c.x.dtype, sum.magnitude) + sum.doubt +
                           1.01 * epsilon(buffer->dtype) * (std::abs(sum.value) + sum.doubt) +
                           (buffer->dtype == DType::kFloat16 ? 0x1p-25 : 0);
      // float16 ends at 65504, and a NaN must fail.
      if (error <= bound || (buffer->dtype == DType::kFloat16 && std::abs(sum.value) > 65000)) continue;
      std::printf("%s, case %d (%s): %s[%ld] is %g, expected %g, error %g > %g\n", kernel, number,
                  sizes_of(c.forward).c_str(), name, long(i), buffer->at(i), sum.value, error, bound);
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
