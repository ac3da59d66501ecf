// From tensors to a problem: the checks and the translation that the CPU and the CUDA binding of the consolidator
// share.
#pragma once

#include "../common/consolidator.h"
#include "tensors.h"

namespace vitadapter::bind {

using TensorList = std::vector<Tensor>;

// The tensors and settings that both directions share, in the order of the schemas.
struct ConsolidatorArguments {
  Tensor x;
  TensorList weights, biases;  // of each branch; biases: none, or one each
  OptionalTensor seed;
  bool shuffle;
  double drop_path;
  std::optional<int64_t> samples;  // without, an index of x's first dimension is one
  ScalarType compute;

  int64_t in() const { return x.size(x.dim() - 1); }
  int64_t out() const { return weights[0].size(0); }
  int64_t rows() const { return x.numel() / in(); }
  int64_t sample_count() const { return samples ? *samples : x.dim() > 1 ? x.size(0) : 1; }
  std::vector<int64_t> out_sizes() const {
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = out();
    return sizes;
  }
};

inline void check_branches(const TensorList& weights, int64_t in) {
  VA_CHECK(in > 0, "consolidator: there are no inputs; expected at least 1");
  VA_CHECK(!weights.empty() && weights.size() <= size_t(kMaxBranches), "consolidator: there are ", weights.size(),
           " branches; from 1 to ", kMaxBranches, " are accepted");
  for (const Tensor& weight : weights) {
    const bool matrix = weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) > 0;
    VA_CHECK(matrix && weight.size(0) == weights[0].size(0) && in % weight.size(1) == 0 &&
                 weight.size(0) % (in / weight.size(1)) == 0,
             "consolidator: a weight has shape ", shape_text(weight), " for ", in, " inputs",
             matrix ? joined(" and ", weights[0].size(0), " outputs") : "",
             "; expected (out, in / groups), with groups that divide in and out");
  }
}

// `others` are tensors beside the shared ones, whose shapes the caller checks.
inline void check(const ConsolidatorArguments& a, const std::vector<NamedTensor>& others) {
  check_rows("consolidator", a.x);
  check_branches(a.weights, a.in());
  VA_CHECK(a.biases.empty() || a.biases.size() == a.weights.size(), "consolidator: there are ", a.biases.size(),
           " biases; expected none, or one for each of ", a.weights.size(), " branches");
  std::vector<NamedTensor> tensors{{"x", a.x}};
  for (const Tensor& weight : a.weights) tensors.push_back({"a weight", weight});
  for (const Tensor& bias : a.biases) {
    check_shape("consolidator", {"a bias", bias}, {a.out()}, "(out,)");
    tensors.push_back({"a bias", bias});
  }
  for (const NamedTensor& each : others) tensors.push_back(each);
  check_devices_and_dtypes("consolidator", tensors, a.compute);
  check_probability("consolidator", "drop_path", a.drop_path);
  if (a.samples) {
    VA_CHECK(*a.samples > 0 && a.rows() % *a.samples == 0, "consolidator: samples is ", *a.samples,
             "; it must divide the ", a.rows(), " rows of x");
  }
  if (a.drop_path > 0) check_seed("consolidator", a.seed, a.x);
}

template <typename Sizes>
void check_sizes(NamedTensor named, const Sizes& expected) {
  VA_CHECK(has_shape(named.tensor, expected), "consolidator: ", named.name, " has shape ", shape_text(named.tensor),
           "; expected ", shape_text(expected));
}

inline ConsolidatorBranch describe_branch(const Tensor& weight, int64_t in) {
  ConsolidatorBranch branch;
  branch.weight = operand(weight);
  branch.group_in = weight.size(1);
  branch.groups = in / branch.group_in;
  branch.group_out = weight.size(0) / branch.groups;
  return branch;
}

// Fills what both directions share; `a` must outlive the problem.
inline void describe(const ConsolidatorArguments& a, ConsolidatorProblem& p) {
  p.rows = a.rows();
  p.in = a.in();
  p.out = a.out();
  p.rows_per_sample = a.sample_count() > 0 ? p.rows / a.sample_count() : 1;
  p.x = operand(a.x);
  p.branches = int(a.weights.size());
  for (int i = 0; i < p.branches; ++i) {
    p.branch[i] = describe_branch(a.weights[i], p.in);
    if (!a.biases.empty()) p.branch[i].bias = operand(a.biases[i]);
  }
  p.shuffle = a.shuffle;
  p.drop_path = {seed_data(a.seed), Stream::kDropPath, a.drop_path};
  p.compute = dtype_of(a.compute);
}

inline ConsolidatorArguments packed(ConsolidatorArguments a) {
  a.x = packed(a.x);
  for (Tensor& each : a.weights) each = packed(each);
  for (Tensor& each : a.biases) each = packed(each);
  return a;
}

// y: Backend::forward(x, problem) runs a problem whose tensors are contiguous and checked.
template <typename Backend>
Tensor consolidator_forward(Tensor x, OptionalTensor base, TensorList weights, TensorList biases, OptionalTensor seed,
                            bool shuffle, double drop_path, std::optional<int64_t> samples, ScalarType compute) {
  ConsolidatorArguments a{x, weights, biases, seed, shuffle, drop_path, samples, compute};
  std::vector<NamedTensor> others;
  if (base) others.push_back({"base", *base});
  check(a, others);
  const std::vector<int64_t> sizes = a.out_sizes();
  if (base) check_sizes({"base", *base}, sizes);
  a = packed(a);
  const OptionalTensor onto = packed(base);
  Tensor y = empty(a.x, sizes, base ? base->scalar_type() : x.scalar_type());

  ConsolidatorForward problem;
  describe(a, problem);
  problem.base = operand(onto);
  problem.y = result(y);
  if (problem.rows > 0) Backend::forward(a.x, problem);
  return y;
}

// What `needs` asks for, lowest bit first: x's gradient, the weights', the biases', and the sum of grad (float32, or
// float64 where x is that). Returned in a list: x's, the sum, each weight's, each bias'; empty where not asked for.
template <typename Backend>
TensorList consolidator_backward(Tensor grad, Tensor x, OptionalTensor x_grad_base, TensorList weights,
                                 TensorList biases, OptionalTensor seed, bool shuffle, double drop_path,
                                 std::optional<int64_t> samples, ScalarType compute, int64_t needs) {
  ConsolidatorArguments a{x, weights, biases, seed, shuffle, drop_path, samples, compute};
  std::vector<NamedTensor> others{{"grad", grad}};
  if (x_grad_base) others.push_back({"x_grad_base", *x_grad_base});
  check(a, others);
  check_sizes({"grad", grad}, a.out_sizes());
  if (x_grad_base) check_sizes({"x_grad_base", *x_grad_base}, x.sizes());
  a = packed(a);
  const Tensor g = packed(grad);
  const OptionalTensor onto = packed(x_grad_base);

  ConsolidatorBackward problem;
  describe(a, problem);
  problem.grad = operand(g);
  problem.x_grad_base = operand(onto);
  const bool needs_sum = needs >> 3 & 1;
  TensorList grads{empty_gradient(a.x, a.x, needs, 0, problem.x_grad),
                   empty(a.x, std::vector<int64_t>{needs_sum ? a.out() : 0}, hidden_dtype(a.x))};
  if (needs_sum) problem.grad_sum = result(grads[1]);
  for (int i = 0; i < problem.branches; ++i) {
    grads.push_back(empty_gradient(a.x, a.weights[i], needs, 1, problem.weight_grad[i]));
  }
  for (size_t i = 0; i < a.biases.size(); ++i) {
    grads.push_back(empty_gradient(a.x, a.biases[i], needs, 2, problem.bias_grad[i]));
  }
  Backend::backward(a.x, problem);
  return grads;
}

// weight + Σ_i G_i in `dtype`: Backend::weight(like, problem) runs it.
template <typename Backend>
Tensor consolidator_weight(Tensor weight, TensorList weights, bool shuffle, ScalarType dtype) {
  VA_CHECK(weight.dim() == 2, "consolidator: weight has shape ", shape_text(weight), "; expected (out, in)");
  check_branches(weights, weight.size(1));
  VA_CHECK(weights[0].size(0) == weight.size(0), "consolidator: weight has shape ", shape_text(weight),
           " and a branch's weight ", shape_text(weights[0]), "; expected as many outputs");
  std::vector<NamedTensor> tensors{{"weight", weight}};
  for (const Tensor& each : weights) tensors.push_back({"a branch's weight", each});
  check_devices_and_dtypes("consolidator", tensors, dtype);
  weight = packed(weight);
  for (Tensor& each : weights) each = packed(each);
  Tensor sum = empty(weight, weight.sizes(), dtype);

  ConsolidatorWeight problem;
  problem.out = weight.size(0);
  problem.in = weight.size(1);
  problem.weight = operand(weight);
  problem.branches = int(weights.size());
  for (int i = 0; i < problem.branches; ++i) problem.branch[i] = describe_branch(weights[i], problem.in);
  problem.shuffle = shuffle;
  problem.result = result(sum);
  Backend::weight(weight, problem);
  return sum;
}

}  // namespace vitadapter::bind
