// The consolidator op in CUDA, as simply as it can be said: one thread an output element, one sum a thread, no shared
// memory, no barrier, every dtype. It is slow, and it stays: it serves what the fast kernels do not, and the tests hold
// both against the same float64 loops.
//
// Traffic: every thread reads its own operands, and a gradient that sums rows is found by one thread.
#include "consolidator.h"
#include "for_each.cuh"
#include "simple_terms.cuh"

namespace vitadapter::cuda {
namespace {

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
    store(p.weight_grad[number], index, sum_in_runs<T>(p.rows, [&](int64_t row) {
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
    store(result, output, sum_in_runs<T>(p.rows, [&](int64_t row) {
            return (number < 0 ? T(1) : p.template keep<T>(row, number)) * load<T>(p.grad, row * p.out + output);
          }));
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

#define VA_INSTANTIATE(T)                                                           \
  template void consolidator_forward_simple<T>(const ConsolidatorForward&, Stream); \
  template void consolidator_backward_simple<T>(const ConsolidatorBackward&, Stream)
VA_INSTANTIATE(float);
VA_INSTANTIATE(double);
#undef VA_INSTANTIATE

}  // namespace vitadapter::cuda
