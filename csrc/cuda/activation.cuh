// The activations of the bottleneck in float32, for many numbers at a time: the switch stands outside the loop, and
// each is a handful of instructions. Within 2.5e-7 · max(1, |u|), as on the CPU.
#pragma once

#include <cmath>

#include "../common/activation.h"
#include "simt.cuh"

namespace vitadapter::cuda {

// 1 / (1 + e^-u)
VA_DEVICE float logistic(float u) { return approximate_reciprocal(1.0f + approximate_exp2(-1.44269504f * u)); }

VA_DEVICE float gelu(float u) { return 0.5f * u * (1.0f + std::erf(0.707106781f * u)); }

VA_DEVICE float gelu_tanh(float u) {
  // (1 + tanh v) / 2 is the logistic function of 2v.
  return u * logistic(1.59576912f * (u + 0.044715f * u * u * u));
}

// Replaces values(i) by act(values(i)) for i in [0, kCount).
template <int kCount, typename Values>
VA_DEVICE void activate_all(Activation activation, const Values& values) {
  const auto each = [&](auto act) {
    VA_UNROLL
    for (int i = 0; i < kCount; ++i) values(i) = act(values(i));
  };
  switch (activation) {
    case Activation::kGelu: return each([](float u) { return gelu(u); });
    case Activation::kGeluTanh: return each([](float u) { return gelu_tanh(u); });
    // Not `u > 0 ? u : 0`: a NaN must pass through.
    case Activation::kRelu: return each([](float u) { return u <= 0.0f ? 0.0f : u; });
    case Activation::kLeakyRelu: return each([](float u) { return u <= 0.0f ? 0.01f * u : u; });
    case Activation::kSilu: return each([](float u) { return u * logistic(u); });
    case Activation::kIdentity: return;
  }
}

}  // namespace vitadapter::cuda
