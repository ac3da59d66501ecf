// From tensors to a problem: the checks and the translation that the CPU and the CUDA binding of the adapter share.
#pragma once

#include <tuple>

#include "../common/adapter.h"
#include "tensors.h"

namespace vitadapter::bind {

// The tensors and settings that both directions share, in the order of the schemas.
struct AdapterArguments {
  Tensor x, down;
  OptionalTensor down_bias;
  Tensor up;
  OptionalTensor up_bias, scale, seed;
  double scale_value;
  int64_t activation;
  double dropout, dropout_out, drop_path;
  ScalarType compute;
  bool allow_tf32;

  int64_t dim() const { return x.size(x.dim() - 1); }
  int64_t rank() const { return down.size(0); }
  int64_t rows() const { return x.numel() / dim(); }
};

// `others` are tensors beside the shared ones, whose shapes the caller checks.
inline void check(const AdapterArguments& a, const std::vector<NamedTensor>& others) {
  check_rows("adapter", a.x);
  VA_CHECK(a.down.dim() == 2, "adapter: down has shape ", shape_text(a.down), "; expected (rank, dim)");
  check_shape("adapter", {"down", a.down}, {a.rank(), a.dim()}, "(rank, dim)");
  check_shape("adapter", {"up", a.up}, {a.dim(), a.rank()}, "(dim, rank)");
  std::vector<NamedTensor> tensors{{"x", a.x}, {"down", a.down}, {"up", a.up}};
  if (a.down_bias) {
    check_shape("adapter", {"down_bias", *a.down_bias}, {a.rank()}, "(rank,)");
    tensors.push_back({"down_bias", *a.down_bias});
  }
  if (a.up_bias) {
    check_shape("adapter", {"up_bias", *a.up_bias}, {a.dim()}, "(dim,)");
    tensors.push_back({"up_bias", *a.up_bias});
  }
  if (a.scale) {
    const bool fits = a.scale->dim() == 1 && (a.scale->size(0) == 1 || a.scale->size(0) == a.dim());
    VA_CHECK(fits, "adapter: scale has shape ", shape_text(*a.scale), "; expected (1,) or (dim,) = (", a.dim(), ",)");
    tensors.push_back({"scale", *a.scale});
  }
  for (const NamedTensor& each : others) tensors.push_back(each);
  check_devices_and_dtypes("adapter", tensors, a.compute);
  VA_CHECK(a.activation >= 0 && a.activation < kActivations, "adapter: there is no activation number ", a.activation);
  check_probability("adapter", "dropout", a.dropout);
  check_probability("adapter", "dropout_out", a.dropout_out);
  check_probability("adapter", "drop_path", a.drop_path);
  if (a.dropout > 0 || a.dropout_out > 0 || a.drop_path > 0) check_seed("adapter", a.seed, a.x);
}

// Fills what both directions share; `a` must outlive the problem.
inline void describe(const AdapterArguments& a, AdapterProblem& p) {
  p.rows = a.rows();
  p.dim = a.dim();
  p.rank = a.rank();
  const int64_t samples = a.x.dim() > 1 ? a.x.size(0) : 1;
  p.rows_per_sample = samples > 0 ? p.rows / samples : 1;
  p.x = operand(a.x);
  p.down = operand(a.down);
  p.up = operand(a.up);
  p.up_bias = operand(a.up_bias);
  p.scale = operand(a.scale);
  p.scale_is_channel = a.scale && a.scale->size(0) == a.dim();
  p.scale_value = a.scale_value;
  p.activation = Activation(a.activation);
  const int64_t* seed = seed_data(a.seed);
  p.dropout = {seed, Stream::kDropout, a.dropout};
  p.dropout_out = {seed, Stream::kDropoutOut, a.dropout_out};
  p.drop_path = {seed, Stream::kDropPath, a.drop_path};
  p.compute = dtype_of(a.compute);
  p.allow_tf32 = a.allow_tf32;
}

inline AdapterArguments packed(AdapterArguments a) {
  a.x = packed(a.x);
  a.down = packed(a.down);
  a.up = packed(a.up);
  for (OptionalTensor* each : {&a.down_bias, &a.up_bias, &a.scale}) *each = packed(*each);
  return a;
}

// (y, hidden): Backend::forward(x, problem) runs a problem whose tensors are contiguous and checked.
template <typename Backend>
std::tuple<Tensor, Tensor> adapter_forward(Tensor x, OptionalTensor residual, Tensor down, OptionalTensor down_bias,
                                           Tensor up, OptionalTensor up_bias, OptionalTensor scale, OptionalTensor seed,
                                           double scale_value, int64_t activation, double dropout, double dropout_out,
                                           double drop_path, ScalarType compute, bool allow_tf32, bool save_hidden) {
  AdapterArguments a{x,           down,       down_bias, up,          up_bias,   scale,   seed,
                     scale_value, activation, dropout,   dropout_out, drop_path, compute, allow_tf32};
  std::vector<NamedTensor> others;
  if (residual) {
    VA_CHECK(has_shape(*residual, x.sizes()), "adapter: residual has shape ", shape_text(*residual), "; expected x's, ",
             shape_text(x));
    others.push_back({"residual", *residual});
  }
  check(a, others);
  a = packed(a);
  const Tensor base = residual ? packed(*residual) : a.x;
  Tensor y = empty(a.x, a.x.sizes(), promoted(a.x.scalar_type(), base.scalar_type()));
  Tensor hidden = empty_hidden(a.x, a.rank(), save_hidden);

  AdapterForward problem;
  describe(a, problem);
  problem.down_bias = operand(a.down_bias);
  problem.residual = operand(base);
  problem.y = result(y);
  problem.hidden = save_hidden ? hidden.mutable_data_ptr() : nullptr;
  if (problem.rows > 0) Backend::forward(a.x, problem);
  return {y, hidden};
}

// The gradients of x, down, down_bias, up, up_bias, scale; empty where `needs` lacks their bit (x is the lowest).
template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adapter_backward(
    Tensor grad, Tensor x, Tensor hidden, Tensor down, OptionalTensor down_bias, Tensor up, OptionalTensor up_bias,
    OptionalTensor scale, OptionalTensor seed, bool residual_is_x, double scale_value, int64_t activation,
    double dropout, double dropout_out, double drop_path, ScalarType compute, bool allow_tf32, int64_t needs) {
  AdapterArguments a{x,           down,       down_bias, up,          up_bias,   scale,   seed,
                     scale_value, activation, dropout,   dropout_out, drop_path, compute, allow_tf32};
  check(a, {{"grad", grad}, {"hidden", hidden}});
  check_grad_and_hidden("adapter", grad, hidden, x, a.rows() * a.rank(), residual_is_x);
  a = packed(a);
  const Tensor g = packed(grad), saved = packed(hidden);

  AdapterBackward problem;
  describe(a, problem);
  problem.grad = operand(g);
  problem.hidden = saved.const_data_ptr();
  problem.residual_is_x = residual_is_x;
  auto gradient = [&](int bit, const OptionalTensor& of, Result& slot) {
    return empty_gradient(a.x, of, needs, bit, slot);
  };
  std::tuple grads{gradient(0, a.x, problem.x_grad),
                   gradient(1, a.down, problem.down_grad),
                   gradient(2, a.down_bias, problem.down_bias_grad),
                   gradient(3, a.up, problem.up_grad),
                   gradient(4, a.up_bias, problem.up_bias_grad),
                   gradient(5, a.scale, problem.scale_grad)};
  Backend::backward(a.x, problem);
  return grads;
}

}  // namespace vitadapter::bind
