// The activations of the bottleneck and their derivatives, in float and double.
#pragma once

#include <cmath>

#include "dtype.h"

namespace vitadapter {

// The order is that of ACTIVATIONS in vitadapter_ext/ops/adapter.py.
enum class Activation : int { kGelu, kGeluTanh, kRelu, kLeakyRelu, kSilu, kIdentity };
constexpr int kActivations = 6;

template <typename T>
struct Activated {
  T value;
  T slope;
};

// act(u) and act'(u); the slope of relu and leaky_relu at 0 is that of the negative side, as in PyTorch.
template <typename T>
VA_HOST_DEVICE inline Activated<T> activate(Activation activation, T u) {
  switch (activation) {
    case Activation::kGelu: {
      const T cdf = T(0.5) * std::erfc(-u * T(0.70710678118654752440));
      const T density = T(0.39894228040143267794) * std::exp(T(-0.5) * u * u);
      return {u * cdf, cdf + u * density};
    }
    case Activation::kGeluTanh: {
      constexpr T kScale = T(0.79788456080286535588), kCubic = T(0.044715);
      const T t = std::tanh(kScale * (u + kCubic * u * u * u));
      const T inner_slope = kScale * (T(1) + T(3) * kCubic * u * u);
      return {T(0.5) * u * (T(1) + t), T(0.5) * (T(1) + t) + T(0.5) * u * (T(1) - t * t) * inner_slope};
    }
    case Activation::kRelu:
      // Not `u > 0 ? u : 0`: a NaN must pass through.
      return u <= T(0) ? Activated<T>{T(0), T(0)} : Activated<T>{u, T(1)};
    case Activation::kLeakyRelu: return u <= T(0) ? Activated<T>{T(0.01) * u, T(0.01)} : Activated<T>{u, T(1)};
    case Activation::kSilu: {
      const T s = T(1) / (T(1) + std::exp(-u));
      return {u * s, s * (T(1) + u * (T(1) - s))};
    }
    default: return {u, T(1)};
  }
}

}  // namespace vitadapter
