// Which problems do the tests of the consolidator run, and what is right for each? As adapter_cases.h, whose chance,
// buffers, sums and bounds these are.
#pragma once

#include <deque>

#include "adapter_cases.h"
#include "common/consolidator.h"

namespace vitadapter::test {

// All of a case but its numbers, named as in ConsolidatorProblem.
struct ConsolidatorOptions {
  int64_t rows = 1, in = 1, out = 1, rows_per_sample = 1;
  std::vector<int64_t> groups{1};  // of each branch
  DType x = DType::kFloat32, compute = DType::kFloat32;
  DType weights[2] = {DType::kFloat32, DType::kFloat32};  // of every other branch
  std::optional<DType> bias, base, x_grad_base;           // absent ones have no value
  bool shuffle = true;
  double drop_path = 0;
  bool whole_numbers = false, odd_addresses = false;  // see CaseOptions
};

struct ConsolidatorCase {
  ConsolidatorOptions options;
  int64_t seed = 0;
  Buffer x, base, grad, x_grad_base;
  std::vector<Buffer> weights, biases;
  ConsolidatorForward forward;    // without y
  ConsolidatorBackward backward;  // without results

  int branches() const { return int(options.groups.size()); }
};

inline std::unique_ptr<ConsolidatorCase> make_consolidator_case(const ConsolidatorOptions& o) {
  auto c = std::make_unique<ConsolidatorCase>();
  c->options = o;
  c->seed = int64_t(generator());
  auto numbers = [&](std::optional<DType> dtype, int64_t count, double spread = 1) {
    return !dtype            ? Buffer()
           : o.whole_numbers ? Buffer::whole(*dtype, count, o.odd_addresses)
                             : Buffer::random(*dtype, count, o.odd_addresses, spread);
  };
  c->x = numbers(o.x, o.rows * o.in);
  c->base = numbers(o.base, o.rows * o.out);
  c->grad = numbers(o.base.value_or(o.x), o.rows * o.out);
  c->x_grad_base = numbers(o.x_grad_base, o.rows * o.in);

  ConsolidatorProblem p;
  p.rows = o.rows;
  p.in = o.in;
  p.out = o.out;
  p.rows_per_sample = o.rows_per_sample;
  p.x = c->x.operand();
  p.branches = c->branches();
  for (int i = 0; i < p.branches; ++i) {
    ConsolidatorBranch& b = p.branch[i];
    b.groups = o.groups[size_t(i)];
    b.group_in = o.in / b.groups;
    b.group_out = o.out / b.groups;
    c->weights.push_back(numbers(o.weights[i % 2], o.out * b.group_in, 1 / std::sqrt(double(b.group_in))));
    c->biases.push_back(numbers(o.bias, o.out));
    b.weight = c->weights.back().operand();
    b.bias = c->biases.back().operand();
  }
  p.shuffle = o.shuffle;
  p.drop_path = {&c->seed, Stream::kDropPath, o.drop_path};
  p.compute = o.compute;
  static_cast<ConsolidatorProblem&>(c->forward) = p;
  static_cast<ConsolidatorProblem&>(c->backward) = p;
  c->forward.base = c->base.operand();
  c->backward.grad = c->grad.operand();
  c->backward.x_grad_base = c->x_grad_base.operand();
  return c;
}

// Of any dtypes that may meet, for kernels that take all. The groups divide in and out.
inline ConsolidatorOptions draw_consolidator_options() {
  ConsolidatorOptions o;
  const bool wide = draw(0, 4) == 0;
  const DType low = pick({DType::kBFloat16, DType::kFloat16}), full = wide ? DType::kFloat64 : DType::kFloat32;
  auto any = [&] { return wide || draw(0, 1) ? full : low; };
  auto perhaps = [&]() -> std::optional<DType> {
    if (draw(0, 1)) return any();
    return std::nullopt;
  };
  o.x = any();
  o.compute = wide ? full : o.x == low || draw(0, 1) ? low : full;
  o.weights[0] = any();
  o.weights[1] = any();
  o.bias = perhaps();
  o.base = perhaps();
  o.x_grad_base = perhaps();
  o.rows_per_sample = pick<int64_t>({1, 3, 7});
  o.rows = draw(0, draw(0, 9) ? 30 : 300) / o.rows_per_sample * o.rows_per_sample;
  const int64_t groups = pick<int64_t>({1, 2, 6, 12, 32, 48});
  o.in = groups * pick<int64_t>({1, 2, 3, 4, 5, 8});
  o.out = groups * pick<int64_t>({1, 2, 3, 6, 7, 8});
  const int64_t branches = draw(0, 9) ? draw(1, 4) : kMaxBranches;
  o.groups.clear();
  while (int64_t(o.groups.size()) < branches) {
    const int64_t other = draw(0, 1) ? groups : draw(1, groups);
    if (groups % other == 0) o.groups.push_back(other);
  }
  o.shuffle = draw(0, 3);
  o.whole_numbers = !wide && o.compute == low && draw(0, 1);
  o.drop_path = o.whole_numbers ? pick({0.0, 0.5, 0.75}) : pick({0.0, 0.3, 0.9});
  o.odd_addresses = true;
  return o;
}

// Which gradients are asked for: the bits of the op.
enum ConsolidatorNeeds { kInputGrad = 1, kWeightGrads = 2, kBiasGrads = 4, kGradSum = 8, kAllConsolidatorGrads = 15 };

// Everything an implementation writes; absent ones have no bytes.
struct ConsolidatorOutputs {
  Buffer y, x_grad, grad_sum;
  std::deque<Buffer> weight_grads, bias_grads;

  ConsolidatorOutputs(const ConsolidatorCase& c, int needs) {
    auto make = [&](bool asked, DType dtype, int64_t count) {
      return asked ? Buffer::poisoned(dtype, count, c.options.odd_addresses) : Buffer();
    };
    y = make(true, c.grad.dtype, c.grad.count);
    x_grad = make(needs & kInputGrad, c.x.dtype, c.x.count);
    const DType wide = c.x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    grad_sum = make(needs & kGradSum, wide, c.options.out);
    for (const Buffer& each : c.weights) weight_grads.push_back(make(needs & kWeightGrads, each.dtype, each.count));
    for (const Buffer& each : c.biases) {
      bias_grads.push_back(make(each.bytes && needs & kBiasGrads, each.dtype, each.count));
    }
  }
  ConsolidatorForward forward(const ConsolidatorCase& c) {
    ConsolidatorForward p = c.forward;
    p.y = y.result();
    return p;
  }
  ConsolidatorBackward backward(const ConsolidatorCase& c) {
    ConsolidatorBackward p = c.backward;
    p.x_grad = x_grad.result();
    p.grad_sum = grad_sum.result();
    for (size_t i = 0; i < weight_grads.size(); ++i) {
      p.weight_grad[i] = weight_grads[i].result();
      p.bias_grad[i] = bias_grads[i].result();
    }
    return p;
  }
  std::vector<std::pair<const char*, const Buffer*>> all() const {
    std::vector<std::pair<const char*, const Buffer*>> all{{"y", &y}, {"x_grad", &x_grad}, {"grad_sum", &grad_sum}};
    for (const Buffer& each : weight_grads) all.emplace_back("weight_grad", &each);
    for (const Buffer& each : bias_grads) all.emplace_back("bias_grad", &each);
    return all;
  }
};

// What the definition in csrc/common/consolidator.h says, output by output in the order of ConsolidatorOutputs::all().
// In a sum that is no product, a kernel may round g or not.
VA_UNSANITIZED inline Exact exact(const ConsolidatorCase& c) {
  const ConsolidatorForward& p = c.forward;
  const Precision precision = precision_of(p);
  const size_t branches = size_t(p.branches);
  enum { kY, kX, kSum, kWeight };
  Exact e;
  for (int64_t size : {p.rows * p.out, p.rows * p.in, p.out}) e.emplace_back(size);
  for (const Buffer& each : c.weights) e.emplace_back(each.count);
  for (size_t i = 0; i < branches; ++i) e.emplace_back(p.out);
  auto operands = [&](const Buffer& b) {
    Doubles values(size_t(b.count));
    for (int64_t i = 0; i < b.count; ++i) values[size_t(i)] = round_to(b.at(i), precision);
    return values;
  };
  const Doubles x = operands(c.x), grad = operands(c.grad);
  std::vector<Doubles> weights;
  for (const Buffer& each : c.weights) weights.push_back(operands(each));
  for (int64_t n = 0; n < p.rows; ++n) {
    for (int64_t d = 0; d < p.in && c.x_grad_base.bytes; ++d) e[kX][n * p.in + d].add(c.x_grad_base.at(n * p.in + d));
    for (int64_t o = 0; o < p.out; ++o) {
      const double wide_g = c.grad.at(n * p.out + o), g = grad[n * p.out + o];
      Sum& y = e[kY][n * p.out + o];
      if (c.base.bytes) y.add(c.base.at(n * p.out + o));
      e[kSum][o].add(wide_g, std::abs(g - wide_g));
      for (size_t i = 0; i < branches; ++i) {
        const ConsolidatorBranch& b = p.branch[i];
        const double keep = p.keep<double>(n, int(i));
        if (c.biases[i].bytes) y.add(keep * c.biases[i].at(o));
        e[kWeight + branches + i][o].add(keep * wide_g, keep * std::abs(g - wide_g));
        for (int64_t s = 0; s < b.group_in; ++s) {
          const int64_t entry = o * b.group_in + s, d = b.source(o / b.group_out * b.group_in + s, p.shuffle);
          y.add(keep * weights[i][entry] * x[n * p.in + d]);
          e[kX][n * p.in + d].add(keep * weights[i][entry] * g);
          e[kWeight + i][entry].add(keep * g * x[n * p.in + d]);
        }
      }
    }
  }
  return e;
}

// weight + Σ_i G_i of random numbers: run(problem) writes it; how many entries are wrong?
template <typename Run>
int wrong_weights(const ConsolidatorCase& c, DType dtype, const Run& run) {
  const ConsolidatorForward& p = c.forward;
  const Buffer weight = Buffer::random(c.options.weights[0], p.out * p.in, c.options.odd_addresses, 1);
  Buffer sum = Buffer::poisoned(dtype, p.out * p.in, c.options.odd_addresses);
  ConsolidatorWeight problem;
  problem.in = p.in;
  problem.out = p.out;
  problem.weight = weight.operand();
  problem.branches = p.branches;
  std::copy(p.branch, p.branch + p.branches, problem.branch);
  problem.shuffle = p.shuffle;
  problem.result = sum.result();
  run(problem);
  std::vector<Sum> expected(size_t(weight.count));
  for (int64_t i = 0; i < weight.count; ++i) expected[size_t(i)].add(weight.at(i));
  for (int i = 0; i < p.branches; ++i) {
    const ConsolidatorBranch& b = p.branch[i];
    for (int64_t o = 0; o < p.out; ++o) {
      for (int64_t s = 0; s < b.group_in; ++s) {
        const int64_t d = b.source(o / b.group_out * b.group_in + s, p.shuffle);
        expected[size_t(o * p.in + d)].add(c.weights[size_t(i)].at(o * b.group_in + s));
      }
    }
  }
  int wrong = 0;
  for (int64_t i = 0; i < sum.count; ++i) {
    const Sum& right = expected[size_t(i)];
    const double bound = sum_error(p.x.dtype, right.magnitude) + 1.01 * epsilon(dtype) * std::abs(right.value) +
                         (dtype == DType::kFloat16 ? 0x1p-25 : 0);
    wrong += !(std::abs(sum.at(i) - right.value) <= bound);
  }
  return wrong;
}

}  // namespace vitadapter::test
