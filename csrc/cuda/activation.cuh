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

// gelu_tanh and silu are u · s(v), with the logistic function s and v = u · (linear + cubic · u²): (1 + tanh w) / 2 is
// s(2w). One loop for both, as a loop over registers is long.
struct Gate {
  float linear, cubic;

  VA_DEVICE explicit Gate(Activation activation)
      : linear(activation == Activation::kSilu ? 1.0f : 1.59576912f),
        cubic(activation == Activation::kSilu ? 0.0f : 0.0713548163f) {}
  // Bounded, as 0 · ∞ is no number.
  VA_DEVICE static float square(float u) { return std::fmin(u * u, 1e30f); }
  VA_DEVICE float argument(float u) const { return u * (linear + cubic * square(u)); }
  VA_DEVICE float slope(float u) const { return linear + 3.0f * cubic * square(u); }
};

// Replaces values(i) by act(values(i)) for i in [0, kCount).
template <int kCount, typename Values>
VA_DEVICE void activate_all(Activation activation, const Values& values) {
  const auto each = [&](auto act) {
    VA_UNROLL
    for (int i = 0; i < kCount; ++i) values(i) = act(values(i));
  };
  switch (activation) {
    case Activation::kGelu: return each([](float u) { return gelu(u); });
    case Activation::kGeluTanh:
    case Activation::kSilu: {
      const Gate gate(activation);
      return each([&](float u) { return u * logistic(gate.argument(u)); });
    }
    // Not `u > 0 ? u : 0`: a NaN must pass through.
    case Activation::kRelu: return each([](float u) { return u <= 0.0f ? 0.0f : u; });
    case Activation::kLeakyRelu: return each([](float u) { return u <= 0.0f ? 0.01f * u : u; });
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
    case Activation::kGeluTanh:
    case Activation::kSilu: {
      const Gate gate(activation);
      return each([&](float u) { return gated(u, gate.argument(u), gate.slope(u)); });
    }
    case Activation::kRelu:
      return each([](float u) { return u <= 0.0f ? Activated<float>{0.0f, 0.0f} : Activated<float>{u, 1.0f}; });
    case Activation::kLeakyRelu:
      return each([](float u) { return u <= 0.0f ? Activated<float>{0.01f * u, 0.01f} : Activated<float>{u, 1.0f}; });
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
