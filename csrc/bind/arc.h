// From tensors to a problem: the checks and the translation that the CPU and the CUDA binding of ARC share.
#pragma once

#include <tuple>

#include "../common/arc.h"
#include "tensors.h"

namespace vitadapter::bind {

// The tensors and settings that both directions share, in the order of the schemas.
struct ArcArguments {
  Tensor x, basis, rescale;
  OptionalTensor bias, seed;
  double dropout;
  ScalarType compute;
  bool allow_tf32;

  int64_t dim() const { return x.size(x.dim() - 1); }
  int64_t rank() const { return basis.size(1); }
  int64_t rows() const { return x.numel() / dim(); }
};

// `others` are tensors beside the shared ones, whose shapes the caller checks.
inline void check(const ArcArguments& a, const std::vector<NamedTensor>& others) {
  check_rows("arc", a.x);
  VA_CHECK(a.basis.dim() == 2, "arc: basis has shape ", shape_text(a.basis), "; expected (dim, rank)");
  check_shape("arc", {"basis", a.basis}, {a.dim(), a.rank()}, "(dim, rank)");
  check_shape("arc", {"rescale", a.rescale}, {a.rank()}, "(rank,)");
  std::vector<NamedTensor> tensors{{"x", a.x}, {"basis", a.basis}, {"rescale", a.rescale}};
  check_optional("arc", "bias", a.bias, {a.dim()}, "(dim,)", tensors);
  for (const NamedTensor& each : others) tensors.push_back(each);
  check_devices_and_dtypes("arc", tensors, a.compute);
  check_probability("arc", "dropout", a.dropout);
  if (a.dropout > 0) check_seed("arc", a.seed, a.x);
}

// Fills what both directions share; `a` must outlive the problem.
inline void describe(const ArcArguments& a, ArcProblem& p) {
  p.rows = a.rows();
  p.dim = a.dim();
  p.rank = a.rank();
  p.x = operand(a.x);
  p.basis = operand(a.basis);
  p.rescale = operand(a.rescale);
  p.dropout = {seed_data(a.seed), Stream::kDropout, a.dropout};
  p.compute = dtype_of(a.compute);
  p.allow_tf32 = a.allow_tf32;
}

inline ArcArguments packed(ArcArguments a) {
  a.x = packed(a.x);
  a.basis = packed(a.basis);
  a.rescale = packed(a.rescale);
  a.bias = packed(a.bias);
  return a;
}

// (y, hidden): Backend::forward(x, problem) runs a problem whose tensors are contiguous and checked.
template <typename Backend>
std::tuple<Tensor, Tensor> arc_forward(Tensor x, Tensor basis, Tensor rescale, OptionalTensor bias, OptionalTensor seed,
                                       double dropout, ScalarType compute, bool allow_tf32, bool save_hidden) {
  ArcArguments a{x, basis, rescale, bias, seed, dropout, compute, allow_tf32};
  check(a, {});
  a = packed(a);
  Tensor y = empty(a.x, a.x.sizes(), a.x.scalar_type());
  Tensor hidden = empty_hidden(a.x, a.rank(), save_hidden);

  ArcForward problem;
  describe(a, problem);
  problem.bias = operand(a.bias);
  problem.y = result(y);
  problem.hidden = save_hidden ? hidden.mutable_data_ptr() : nullptr;
  if (problem.rows > 0) Backend::forward(a.x, problem);
  return {y, hidden};
}

// The gradients of x, basis, rescale and bias; empty where `needs` lacks their bit (x is the lowest).
template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> arc_backward(Tensor grad, Tensor x, Tensor hidden, Tensor basis,
                                                        Tensor rescale, OptionalTensor bias, OptionalTensor seed,
                                                        double dropout, ScalarType compute, bool allow_tf32,
                                                        int64_t needs) {
  ArcArguments a{x, basis, rescale, bias, seed, dropout, compute, allow_tf32};
  check(a, {{"grad", grad}, {"hidden", hidden}});
  check_grad_and_hidden("arc", grad, hidden, x, a.rows() * a.rank(), true);
  a = packed(a);
  const Tensor g = packed(grad), saved = packed(hidden);

  ArcBackward problem;
  describe(a, problem);
  problem.grad = operand(g);
  problem.hidden = saved.const_data_ptr();
  std::tuple grads{empty_gradient(a.x, a.x, needs, 0, problem.x_grad),
                   empty_gradient(a.x, a.basis, needs, 1, problem.basis_grad),
                   empty_gradient(a.x, a.rescale, needs, 2, problem.rescale_grad),
                   empty_gradient(a.x, a.bias, needs, 3, problem.bias_grad)};
  Backend::backward(a.x, problem);
  return grads;
}

}  // namespace vitadapter::bind
