// The consolidator op in CUDA, as simply as it can be said: one thread an output element, one sum a thread, no shared
// memory, no barrier, every dtype. It is slow, and it stays: the fast kernels are tested against it.
//
// Traffic: every thread reads its own operands. A gradient that sums rows is found by one thread, in runs of 64 rows
// that are added in float64, so float32 stays good over a hundred thousand rows. The order depends on the shape only.
#include "consolidator.h"
#include "for_each.cuh"

namespace vitadapter::cuda {
namespace {

constexpr int64_t kRun = 64;

// The sum of term(row) over all rows, in runs.
template <typename T, typename Term>
VA_HOST_DEVICE T sum_of_rows(int64_t rows, const Term& term) {
  double total = 0;
  VA_ROLL
  for (int64_t begin = 0; begin < rows; begin += kRun) {
    const int64_t end = begin + kRun < rows ? begin + kRun : rows;
    T run = 0;
    VA_ROLL
    for (int64_t row = begin; row < end; ++row) run += term(row);
    total += run;
  }
  return T(total);
}

// An operand of a product, in the compute dtype.
template <typename T>
VA_HOST_DEVICE T load_operand(const ConsolidatorProblem& p, Operand operand, int64_t index) {
  return rounded(load<T>(operand, index), p.compute);
}

template <typename T>
struct ConsolidatorOutput {
  ConsolidatorForward p;
  VA_HOST_DEVICE void operator()(int64_t index) const {
    const int64_t row = index / p.out, output = index % p.out;
    T sum = p.base.data ? load<T>(p.base, index) : T(0);
    VA_ROLL
    for (int i = 0; i < p.branches; ++i) {
      const ConsolidatorBranch& b = p.branch[i];
      const int64_t first = output / b.group_out * b.group_in;
      T product = b.bias.data ? load<T>(b.bias, output) : T(0);
      VA_ROLL
      for (int64_t s = 0; s < b.group_in; ++s) {
        product += load_operand<T>(p, b.weight, output * b.group_in + s) *
                   load_operand<T>(p, p.x, row * p.in + b.source(first + s, p.shuffle));
      }
      sum += p.template keep<T>(row, i) * product;
    }
    store(p.y, index, sum);
  }
};

template <typename T>
struct ConsolidatorInputGrad {
  ConsolidatorBackward p;
  VA_HOST_DEVICE void operator()(int64_t index) const {
    const int64_t row = index / p.in, source = index % p.in;
    T sum = p.x_grad_base.data ? load<T>(p.x_grad_base, index) : T(0);
    VA_ROLL
    for (int i = 0; i < p.branches; ++i) {
      const ConsolidatorBranch& b = p.branch[i];
      const int64_t place = b.place(source, p.shuffle), first = place / b.group_in * b.group_out;
      T product = 0;
      VA_ROLL
      for (int64_t output = first; output < first + b.group_out; ++output) {
        product += load_operand<T>(p, b.weight, output * b.group_in + place % b.group_in) *
                   load_operand<T>(p, p.grad, row * p.out + output);
      }
      sum += p.template keep<T>(row, i) * product;
    }
    store(p.x_grad, index, sum);
  }
};

template <typename T>
struct ConsolidatorWeightGrad {
  ConsolidatorBackward p;
  int number;  // of the branch
  VA_HOST_DEVICE void operator()(int64_t index) const {
    const ConsolidatorBranch& b = p.branch[number];
    const int64_t output = index / b.group_in;
    const int64_t source = b.source(output / b.group_out * b.group_in + index % b.group_in, p.shuffle);
    store(p.weight_grad[number], index, sum_of_rows<T>(p.rows, [&](int64_t row) {
            return p.template keep<T>(row, number) * load_operand<T>(p, p.grad, row * p.out + output) *
                   load_operand<T>(p, p.x, row * p.in + source);
          }));
  }
};

// Σ g, with a branch's drop-path or without one.
template <typename T>
struct ConsolidatorGradSum {
  ConsolidatorBackward p;
  Result result;
  int number;  // of the branch, or -1
  VA_HOST_DEVICE void operator()(int64_t output) const {
    store(result, output, sum_of_rows<T>(p.rows, [&](int64_t row) {
            return (number < 0 ? T(1) : p.template keep<T>(row, number)) * load<T>(p.grad, row * p.out + output);
          }));
  }
};

template <typename T>
struct ConsolidatorWeightSum {
  ConsolidatorWeight p;
  VA_HOST_DEVICE void operator()(int64_t index) const {
    store(p.result, index, p.template at<T>(index / p.in, index % p.in));
  }
};

}  // namespace

template <typename T>
void consolidator_forward_simple(const ConsolidatorForward& p, Stream stream) {
  for_each(stream, p.rows * p.out, ConsolidatorOutput<T>{p});
}

template <typename T>
void consolidator_backward_simple(const ConsolidatorBackward& p, Stream stream) {
  if (p.x_grad.data) for_each(stream, p.rows * p.in, ConsolidatorInputGrad<T>{p});
  if (p.grad_sum.data) for_each(stream, p.out, ConsolidatorGradSum<T>{p, p.grad_sum, -1});
  for (int i = 0; i < p.branches; ++i) {
    if (p.weight_grad[i].data) for_each(stream, p.out * p.branch[i].group_in, ConsolidatorWeightGrad<T>{p, i});
    if (p.bias_grad[i].data) for_each(stream, p.out, ConsolidatorGradSum<T>{p, p.bias_grad[i], i});
  }
}

template <typename T>
void consolidator_weight(const ConsolidatorWeight& p, Stream stream) {
  for_each(stream, p.out * p.in, ConsolidatorWeightSum<T>{p});
}

#define VA_INSTANTIATE(T)                                                             \
  template void consolidator_forward_simple<T>(const ConsolidatorForward&, Stream);   \
  template void consolidator_backward_simple<T>(const ConsolidatorBackward&, Stream); \
  template void consolidator_weight<T>(const ConsolidatorWeight&, Stream)
VA_INSTANTIATE(float);
VA_INSTANTIATE(double);
#undef VA_INSTANTIATE

}  // namespace vitadapter::cuda
