// Activations of an MLP, gated or not, with the bias in front of them, a row at a time.
#pragma once

#include "ops/row_kernels.h"
#include "simd/exp.h"
#include "simd/target.h"
#include "simd/vectors.h"

#include <cstdint>

PROTOTOK_TARGET_BEGIN

inline Floats magnitude(Floats x) { return x < 0.0f ? -x : x; }

struct ValueAndSlope {
  Floats value, slope;
};

// The standard normal distribution function and exp(-x^2 / 2). With z = |x| / sqrt(2) and
// t = 1 / (1 + z / 2), erfc(z) exp(z^2) / t is a polynomial of t to 5e-8 (a fit of our own).
[[gnu::always_inline]] inline void normal_distribution(Floats x, Floats& below, Floats& power) {
  const Floats size = magnitude(x);
  power = exp2_of(size * size * -0.7213475204444817f);
  const Floats t = reciprocal(size * 0.35355339059327373f + 1.0f);
  Floats p = splat(-0.058809056878089905f);
  p = p * t + 0.2833007574081421f;
  p = p * t - 0.48454704880714417f;
  p = p * t + 0.2750130891799927f;
  p = p * t - 0.024506473913788795f;
  p = p * t + 0.20178264379501343f;
  p = p * t + 0.24333456158638f;
  p = p * t + 0.28234320878982544f;
  p = p * t + 0.2820882797241211f;
  const Floats tail = p * t * power * 0.5f;
  below = x < 0.0f ? tail : 1.0f - tail;
}

template <Activation kKind>
[[gnu::always_inline]] inline ValueAndSlope value_and_slope(Floats x) {
  // Further out sigmoids are nothing, and the products of x and nothing their limits.
  if constexpr (kKind == Activation::silu) {
    const Floats kept = no_less(x, -80.0f);
    Floats rest;
    const Floats s = sigmoid(kept, rest);
    return {kept * s, s * (1.0f + kept * rest)};
  } else if constexpr (kKind == Activation::gelu) {
    Floats below, power;
    normal_distribution(x, below, power);
    return {x * below, below + x * power * 0.3989422804014327f};
  } else if constexpr (kKind == Activation::gelu_tanh) {
    // (1 + tanh u) / 2 = sigmoid(2 u)
    // Beyond 100 the sigmoid has its limits, and the slope must not become 0 times infinity.
    const Floats kept = no_less(x, -12.0f);
    const Floats squared = kept * kept, square = squared < 1e4f ? squared : splat(1e4f);
    const Floats u = kept * (square * 0.07135481627159236f + 1.5957691216057308f);
    Floats rest;
    const Floats s = sigmoid(no_less(u, -80.0f), rest);
    return {kept * s, s + kept * s * rest * (square * 0.21406444881477708f + 1.5957691216057308f)};
  } else {
    const Floats one = x > 0.0f ? splat(1.0f) : splat(0.0f);
    return {x > 0.0f ? x : (x != x ? x : splat(0.0f)), one};
  }
}

template <Activation kKind, class Z, class T>
inline void activation_of_row(const Z* z, const T* bias, T* out, std::int64_t inner, bool gated) {
  for (std::int64_t i = 0; i < inner; i += kLanes) {
    const std::int64_t left = inner - i;
    Floats x = load_some(z + i, left);
    if (bias != nullptr) x += load_some(bias + i, left);
    Floats value = value_and_slope<kKind>(x).value;
    if (gated) {
      Floats up = load_some(z + inner + i, left);
      if (bias != nullptr) up += load_some(bias + inner + i, left);
      value *= up;
    }
    store_some(out + i, left, value);
  }
}

template <class Z, class T>
inline void activation_row(const Z* z, const T* bias, T* out, const ActivationShape& shape) {
  const std::int64_t I = shape.inner;
  const bool gated = shape.gated;
  switch (shape.kind) {
    case Activation::silu: return activation_of_row<Activation::silu>(z, bias, out, I, gated);
    case Activation::gelu: return activation_of_row<Activation::gelu>(z, bias, out, I, gated);
    case Activation::gelu_tanh:
      return activation_of_row<Activation::gelu_tanh>(z, bias, out, I, gated);
    case Activation::relu: return activation_of_row<Activation::relu>(z, bias, out, I, gated);
  }
}

// `grad_z` may be `z`.
template <Activation kKind, class Z, class T>
inline void activation_backward_of_row(const T* grad, const Z* z, const T* bias, Z* grad_z,
                                std::int64_t inner, bool gated) {
  for (std::int64_t i = 0; i < inner; i += kLanes) {
    const std::int64_t left = inner - i;
    Floats x = load_some(z + i, left), g = load_some(grad + i, left);
    if (bias != nullptr) x += load_some(bias + i, left);
    const ValueAndSlope act = value_and_slope<kKind>(x);
    if (gated) {
      Floats up = load_some(z + inner + i, left);
      if (bias != nullptr) up += load_some(bias + inner + i, left);
      store_some(grad_z + inner + i, left, g * act.value);
      g *= up;
    }
    store_some(grad_z + i, left, g * act.slope);
  }
}

template <class Z, class T>
inline void activation_backward_row(const T* grad, const Z* z, const T* bias, Z* grad_z,
                             const ActivationShape& shape) {
  const std::int64_t I = shape.inner;
  const bool gated = shape.gated;
  switch (shape.kind) {
    case Activation::silu:
      return activation_backward_of_row<Activation::silu>(grad, z, bias, grad_z, I, gated);
    case Activation::gelu:
      return activation_backward_of_row<Activation::gelu>(grad, z, bias, grad_z, I, gated);
    case Activation::gelu_tanh:
      return activation_backward_of_row<Activation::gelu_tanh>(grad, z, bias, grad_z, I, gated);
    case Activation::relu:
      return activation_backward_of_row<Activation::relu>(grad, z, bias, grad_z, I, gated);
  }
}

PROTOTOK_TARGET_END
