// The activations and their derivatives on vectors, without libm. Against float64 (tests/cpp/adapter_test.cpp):
// gelu, gelu_tanh and silu and their slopes are within 2.5e-7 · max(1, |u|).
#pragma once

#include "../../common/activation.h"
#include "unit.h"

namespace vitadapter::cpu {
namespace {

template <class E>
struct ActivatedVector {
  typename E::Vector value, slope;
};

// The polynomial with these coefficients, the highest power's first.
template <class E, int kTerms>
VA_INLINE typename E::Vector polynomial(typename E::Vector x, const float (&coefficients)[kTerms]) {
  typename E::Vector sum = E::set(coefficients[0]);
  VA_UNROLL
  for (int i = 1; i < kTerms; ++i) sum = E::fma(sum, x, E::set(coefficients[i]));
  return sum;
}

// e^x of x ≤ 0, relative error 1.5e-7. A NaN stays one. Below -80 it stays at e^-80: what is multiplied from that is
// no subnormal number, which would take the processor twice the time.
template <class E>
VA_INLINE typename E::Vector exp_of_negative(typename E::Vector x) {
  using Vector = typename E::Vector;
  x = E::max(E::set(-80.0f), x);
  const Vector n = E::round(E::mul(x, E::set(1.44269504f)));
  // ln 2 in two parts, the first exact in few bits.
  const Vector f = E::fma(n, E::set(2.12194440e-4f), E::fma(n, E::set(-0.693359375f), x));
  constexpr float kExp[] = {1.3814541e-3f, 8.3687454e-3f, 4.1668389e-2f, 0.16666521f, 0.49999994f, 1.0f, 1.0f};
  return E::times_power_of_two(polynomial<E>(f, kExp), n);
}

// The logistic function. Its slope s(1 - s) comes from e^-|x|: 1 - s would lose digits where s is near 1.
template <class E>
VA_INLINE ActivatedVector<E> sigmoid(typename E::Vector x) {
  using Vector = typename E::Vector;
  const Vector e = exp_of_negative<E>(E::sub(E::zero(), E::abs(x)));
  const Vector upper = E::div(E::set(1.0f), E::add(E::set(1.0f), e)), lower = E::mul(e, upper);
  return {E::where_positive(x, upper, lower), E::mul(lower, upper)};
}

// With Q(a) the upper tail of the normal distribution and t = 1 / (1 + 0.3a): Q(a) = e^(-a²/2) · t · P(t), P fitted to
// a relative error of 1.1e-7 over 0 ≤ a ≤ 13 (the form of Abramowitz and Stegun 7.1.26, with three terms more).
template <class E>
VA_INLINE ActivatedVector<E> gelu(typename E::Vector u) {
  using Vector = typename E::Vector;
  const Vector density = exp_of_negative<E>(E::mul(E::mul(u, u), E::set(-0.5f)));
  const Vector t = E::div(E::set(1.0f), E::fma(E::abs(u), E::set(0.3f), E::set(1.0f)));
  constexpr float kTail[] = {0.036199816f, -0.15939914f, 0.21015461f, -0.057201073f,
                             0.13043453f,  0.099341556f, 0.12084644f, 0.1196232f};
  const Vector tail = E::mul(E::mul(polynomial<E>(t, kTail), t), density);
  const Vector cdf = E::where_positive(u, E::sub(E::set(1.0f), tail), tail);
  return {E::mul(u, cdf), E::fma(E::mul(u, E::set(0.39894228f)), density, cdf)};
}

// u · sigmoid(2v) = 0.5 · u · (1 + tanh v), with 2v = 2 · sqrt(2/π) · (u + 0.044715 u³). Beyond ±20 v stays where it
// is: its cube would leave the range of float.
template <class E>
VA_INLINE ActivatedVector<E> gelu_tanh(typename E::Vector u) {
  using Vector = typename E::Vector;
  const Vector limit = E::set(-20.0f), negative = E::sub(E::zero(), E::max(limit, u));
  const Vector near = E::sub(E::zero(), E::max(limit, negative)), square = E::mul(near, near);
  const Vector twice = E::mul(near, E::fma(square, E::set(0.071354816f), E::set(1.5957691f)));
  const Vector inner_slope = E::fma(square, E::set(0.21406445f), E::set(1.5957691f));
  const ActivatedVector<E> s = sigmoid<E>(twice);
  return {E::mul(u, s.value), E::fma(E::mul(near, s.slope), inner_slope, s.value)};
}

template <class E>
VA_INLINE ActivatedVector<E> activate_vector(Activation activation, typename E::Vector u) {
  using Vector = typename E::Vector;
  const Vector one = E::set(1.0f);
  switch (activation) {
    case Activation::kGelu: return gelu<E>(u);
    case Activation::kGeluTanh: return gelu_tanh<E>(u);
    case Activation::kRelu: return {E::where_positive(u, u, E::zero()), E::where_positive(u, one, E::zero())};
    case Activation::kLeakyRelu: {
      const Vector small = E::set(0.01f);
      return {E::where_positive(u, u, E::mul(small, u)), E::where_positive(u, one, small)};
    }
    case Activation::kSilu: {
      const ActivatedVector<E> s = sigmoid<E>(u);
      return {E::mul(u, s.value), E::fma(u, s.slope, s.value)};
    }
    default: return {u, one};
  }
}

}  // namespace
}  // namespace vitadapter::cpu
