// The activations of the bottleneck in float32, for many numbers at a time: the switch stands outside the loop, and
// each is a handful of instructions; values and slopes are within 2.5e-7 · max(1, |u|), as on the CPU. And dropout, for
// four.
#pragma once

#include <cmath>

#include "../common/activation.h"
#include "../common/philox.h"
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

// A value and the derivative there.
VA_DEVICE Activated<float> gelu_and_slope(float u) {
  const float cdf = 0.5f + 0.5f * std::erf(0.707106781f * u);
  const float density = 0.398942280f * approximate_exp2(-0.721347520f * u * u);
  return {u * cdf, cdf + u * density};
}

// For an activation u ∘ s(v(u)) with the logistic function s: its slope is s + u · s · (1 - s) · v'. 1 - s is taken
// from the exponential: from s it would have lost its digits.
VA_DEVICE Activated<float> gated(float u, float v, float slope_of_v) {
  const float e = approximate_exp2(-1.44269504f * std::abs(v)), larger = approximate_reciprocal(1.0f + e);
  const float smaller = e * larger, s = v < 0.0f ? smaller : larger;
  return {u * s, s + u * larger * smaller * slope_of_v};
}

VA_DEVICE Activated<float> gelu_tanh_and_slope(float u) {
  return gated(u, 1.59576912f * (u + 0.044715f * u * u * u), 1.59576912f + 0.214064830f * u * u);
}

VA_DEVICE Activated<float> silu_and_slope(float u) { return gated(u, u, 1.0f); }

// Multiplies grads(i) by act'(values(i)) and replaces values(i) by act(values(i)), for i in [0, kCount).
template <int kCount, typename Values, typename Grads>
VA_DEVICE void differentiate_all(Activation activation, const Values& values, const Grads& grads) {
  const auto each = [&](auto act) {
    VA_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const Activated<float> result = act(values(i));
      values(i) = result.value;
      grads(i) *= result.slope;
    }
  };
  switch (activation) {
    case Activation::kGelu: return each([](float u) { return gelu_and_slope(u); });
    case Activation::kGeluTanh: return each([](float u) { return gelu_tanh_and_slope(u); });
    case Activation::kRelu:
      return each([](float u) { return u <= 0.0f ? Activated<float>{0.0f, 0.0f} : Activated<float>{u, 1.0f}; });
    case Activation::kLeakyRelu:
      return each([](float u) { return u <= 0.0f ? Activated<float>{0.01f * u, 0.01f} : Activated<float>{u, 1.0f}; });
    case Activation::kSilu: return each([](float u) { return silu_and_slope(u); });
    case Activation::kIdentity: return;
  }
}

// Four neighbouring elements, from a multiple of four on, are one draw.
VA_DEVICE void drop_out(float (&values)[4], const Dropout& dropout, uint64_t seed, int64_t row, int column) {
  if (!dropout.active()) return;
  const Philox4 words = dropout.words(seed, row, column);
  VA_UNROLL
  for (int i = 0; i < 4; ++i) values[i] *= dropout.factor<float>(words.word[i]);
}

}  // namespace vitadapter::cuda
