// The adapter op in CUDA, as simply as it can be said: one thread an output element, one sum a thread, no shared
// memory, no barrier, no tensor core, every dtype. It is slow, and it stays: the fast kernels are tested against it.
//
// Traffic: every thread reads its own operands, so a row of x is read `rank` times and a row of y needs `rank` reads an
// element, mostly out of the cache.
#include "adapter.h"
#include "simple_terms.cuh"

namespace vitadapter::cuda {
namespace {

// z: the activated hidden layer after dropout.
template <typename T>
VA_HOST_DEVICE T hidden_output(const AdapterProblem& p, const T* hidden, int64_t row, int64_t j) {
  return activate(p.activation, hidden[row * p.rank + j]).value * p.dropout.template at<T>(row, j);
}

// g': the output's gradient behind drop-path and dropout_out.
template <typename T>
VA_HOST_DEVICE T masked_grad(const AdapterBackward& p, int64_t row, int64_t d) {
  return load_operand<T>(p, p.grad, row * p.dim + d) * p.dropout_out.template at<T>(row, d) *
         p.template sample_factor<T>(row);
}

template <typename T>
struct Hidden {
  AdapterForward p;
  T* hidden;
  VA_HOST_DEVICE void operator()(int64_t index) const {
    const int64_t row = index / p.rank, j = index % p.rank;
    const T product = sum_in_runs<T>(p.dim, [&](int64_t d) {
      return load_operand<T>(p, p.x, row * p.dim + d) * load_operand<T>(p, p.down, j * p.dim + d);
    });
    hidden[index] = product + (p.down_bias.data ? load<T>(p.down_bias, j) : T(0));
  }
};

template <typename T>
struct Output {
  AdapterForward p;
  const T* hidden;
  VA_HOST_DEVICE void operator()(int64_t index) const {
    const int64_t row = index / p.dim, d = index % p.dim;
    T out = sum_in_runs<T>(
        p.rank, [&](int64_t j) { return hidden_output(p, hidden, row, j) * load_operand<T>(p, p.up, d * p.rank + j); });
    if (p.up_bias.data) out += load<T>(p.up_bias, d);
    out *= p.dropout_out.template at<T>(row, d) * p.template sample_factor<T>(row) * p.template scale_at<T>(d);
    store(p.y, index, load<T>(p.residual, index) + out);
  }
};

template <typename T>
struct HiddenGrad {
  AdapterBackward p;
  T* hidden_grad;
  VA_HOST_DEVICE void operator()(int64_t index) const {
    const int64_t row = index / p.rank, j = index % p.rank;
    const T product = sum_in_runs<T>(p.dim, [&](int64_t d) {
      return masked_grad<T>(p, row, d) * p.template scale_at<T>(d) * load_operand<T>(p, p.up, d * p.rank + j);
    });
    const T hidden = static_cast<const T*>(p.hidden)[index];
    hidden_grad[index] = product * activate(p.activation, hidden).slope * p.dropout.template at<T>(row, j);
  }
};

template <typename T>
struct InputGrad {
  AdapterBackward p;
  const T* hidden_grad;
  VA_HOST_DEVICE void operator()(int64_t index) const {
    const int64_t row = index / p.dim, d = index % p.dim;
    const T product = sum_in_runs<T>(
        p.rank, [&](int64_t j) { return hidden_grad[row * p.rank + j] * load_operand<T>(p, p.down, j * p.dim + d); });
    store(p.x_grad, index, product + (p.residual_is_x ? load<T>(p.grad, index) : T(0)));
  }
};

template <typename T>
struct DownGrad {
  AdapterBackward p;
  const T* hidden_grad;
  VA_HOST_DEVICE void operator()(int64_t index) const {
    const int64_t j = index / p.dim, d = index % p.dim;
    store(p.down_grad, index, sum_in_runs<T>(p.rows, [&](int64_t row) {
            return hidden_grad[row * p.rank + j] * load_operand<T>(p, p.x, row * p.dim + d);
          }));
  }
};

template <typename T>
struct DownBiasGrad {
  AdapterBackward p;
  const T* hidden_grad;
  VA_HOST_DEVICE void operator()(int64_t j) const {
    store(p.down_bias_grad, j, sum_in_runs<T>(p.rows, [&](int64_t row) { return hidden_grad[row * p.rank + j]; }));
  }
};

// G = g'ᵀ · z, and with it the up-projection's gradient.
template <typename T>
struct UpProduct {
  AdapterBackward p;
  T* up_product;
  VA_HOST_DEVICE void operator()(int64_t index) const {
    const int64_t d = index / p.rank, j = index % p.rank;
    const T* hidden = static_cast<const T*>(p.hidden);
    const T product = sum_in_runs<T>(
        p.rows, [&](int64_t row) { return masked_grad<T>(p, row, d) * hidden_output(p, hidden, row, j); });
    up_product[index] = product;
    if (p.up_grad.data) store(p.up_grad, index, p.template scale_at<T>(d) * product);
  }
};

template <typename T>
struct GradSum {
  AdapterBackward p;
  T* grad_sum;
  VA_HOST_DEVICE void operator()(int64_t d) const {
    grad_sum[d] = sum_in_runs<T>(p.rows, [&](int64_t row) { return masked_grad<T>(p, row, d); });
    if (p.up_bias_grad.data) store(p.up_bias_grad, d, p.template scale_at<T>(d) * grad_sum[d]);
  }
};

template <typename T>
struct ScaleGrad {
  AdapterBackward p;
  const T *up_product, *grad_sum;
  VA_HOST_DEVICE T channel(int64_t d) const {
    const T product = sum_in_runs<T>(
        p.rank, [&](int64_t j) { return load_operand<T>(p, p.up, d * p.rank + j) * up_product[d * p.rank + j]; });
    return product + (p.up_bias.data ? load<T>(p.up_bias, d) * grad_sum[d] : T(0));
  }
  VA_HOST_DEVICE void operator()(int64_t d) const {
    store(p.scale_grad, d,
          p.scale_is_channel ? channel(d) : sum_in_runs<T>(p.dim, [&](int64_t each) { return channel(each); }));
  }
};

}  // namespace

template <typename T>
void adapter_forward_simple(const AdapterForward& p, T* hidden, Stream stream) {
  for_each(stream, p.rows * p.rank, Hidden<T>{p, hidden});
  for_each(stream, p.rows * p.dim, Output<T>{p, hidden});
}

template <typename T>
void adapter_backward_simple(const AdapterBackward& p, T* hidden_grad, T* up_product, T* grad_sum, Stream stream) {
  if (p.needs_hidden_grad()) for_each(stream, p.rows * p.rank, HiddenGrad<T>{p, hidden_grad});
  if (p.x_grad.data) for_each(stream, p.rows * p.dim, InputGrad<T>{p, hidden_grad});
  if (p.down_grad.data) for_each(stream, p.rank * p.dim, DownGrad<T>{p, hidden_grad});
  if (p.down_bias_grad.data) for_each(stream, p.rank, DownBiasGrad<T>{p, hidden_grad});
  if (p.needs_up_product()) for_each(stream, p.dim * p.rank, UpProduct<T>{p, up_product});
  if (p.needs_grad_sum()) for_each(stream, p.dim, GradSum<T>{p, grad_sum});
  if (p.scale_grad.data) {
    for_each(stream, p.scale_is_channel ? p.dim : 1, ScaleGrad<T>{p, up_product, grad_sum});
  }
}

#define VA_INSTANTIATE(T)                                                     \
  template void adapter_forward_simple<T>(const AdapterForward&, T*, Stream); \
  template void adapter_backward_simple<T>(const AdapterBackward&, T*, T*, T*, Stream)
VA_INSTANTIATE(float);
VA_INSTANTIATE(double);
#undef VA_INSTANTIATE

}  // namespace vitadapter::cuda
