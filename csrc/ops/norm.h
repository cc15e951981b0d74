// RMSNorm and LayerNorm of a row, with the residual addition in front of them, and the way back. A
// row stays in the L1 cache between the passes.
#pragma once

#include "ops/row_kernels.h"
#include "simd/target.h"
#include "simd/vectors.h"

#include <cmath>
#include <cstdint>

PROTOTOK_TARGET_BEGIN

// The mean of a row where it is taken off (LayerNorm), else 0, and 1 / sqrt(mean square about it +
// eps).
template <class T>
[[gnu::always_inline]] inline NormStatistics norm_statistics(const T* x, std::int64_t count, bool centred, float eps) {
  const float share = 1.0f / float(count);
  float mean = 0.0f;
  if (centred) {
    Floats total = {};
    for (std::int64_t i = 0; i < count; i += kLanes) total += load_some(x + i, count - i);
    mean = lane_sum<kLanes>(total) * share;
  }
  Floats squares = {};
  for (std::int64_t i = 0; i < count; i += kLanes) {
    // The missing lanes at the mean, where they add nothing.
    const Floats distance = load_some(x + i, count - i, mean) - mean;
    squares += distance * distance;
  }
  return {mean, 1.0f / std::sqrt(lane_sum<kLanes>(squares) * share + eps)};
}

// `bias` may be null; `normed` may be `x`.
template <class X, class W, class Out>
[[gnu::always_inline]] inline void normalize_row(const X* x, const NormStatistics& statistics, const W* weight,
                          const W* bias, Out* normed, std::int64_t count) {
  const float mean = statistics.mean, inverse = statistics.inverse;
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const std::int64_t left = count - i;
    Floats value = (load_some(x + i, left) - mean) * inverse * load_some(weight + i, left);
    if (bias != nullptr) value += load_some(bias + i, left);
    store_some(normed + i, left, value);
  }
}

template <class T>
inline NormStatistics residual_norm_row(const T* x, const T* delta, T* sum, T* normed,
                                        const T* weight, const T* bias, std::int64_t count,
                                        float eps) {
  // The statistics are those of the sum as it is stored, so that a norm of the stored stream
  // (another one over the same stream, or a check) sees the same numbers.
  const T* stream = x;
  if (delta != nullptr) {
    stream = sum;
    for (std::int64_t i = 0; i < count; i += kLanes) {
      const std::int64_t left = count - i;
      store_some(sum + i, left, load_some(x + i, left) + load_some(delta + i, left));
    }
  }
  const NormStatistics statistics = norm_statistics(stream, count, bias != nullptr, eps);
  normalize_row(stream, statistics, weight, bias, normed, count);
  return statistics;
}

// The gradient of a norm's input x is (g - shift - (x - mean) pull) inverse, where g is that of the
// normed x times the weight.
struct NormGradient {
  float mean, inverse, pull, shift;

  Floats at(Floats g, Floats x) const { return (g - shift - (x - mean) * pull) * inverse; }
};

template <class G, class X, class W>
[[gnu::always_inline]] inline NormGradient norm_gradient(const G* grad_normed, const X* x,
                                                         const W* weight, std::int64_t count,
                                                         NormStatistics statistics, bool centred) {
  const float mean = statistics.mean, inverse = statistics.inverse;
  Floats along = {}, total = {};
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const std::int64_t left = count - i;
    const Floats g = load_some(grad_normed + i, left) * load_some(weight + i, left);
    along += g * (load_some(x + i, left) - mean);
    total += g;
  }
  const float share = 1.0f / float(count);
  return {mean, inverse, lane_sum<kLanes>(along) * share * inverse * inverse,
          centred ? lane_sum<kLanes>(total) * share : 0.0f};
}

// d loss / d sum = what arrives along the residual, where there is any, + what arrives through the
// norm.
template <class T>
inline void residual_norm_backward_row(const T* grad_sum, const T* grad_normed, const T* sum,
                                       const T* weight, T* grad, std::int64_t count,
                                       NormStatistics statistics, bool centred) {
  const NormGradient gradient =
      norm_gradient(grad_normed, sum, weight, count, statistics, centred);
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const std::int64_t left = count - i;
    const Floats g = load_some(grad_normed + i, left) * load_some(weight + i, left);
    Floats value = gradient.at(g, load_some(sum + i, left));
    if (grad_sum != nullptr) value += load_some(grad_sum + i, left);
    store_some(grad + i, left, value);
  }
}

// to += the gradient of x.
template <class X>
inline void add_norm_gradient(const float* grad_normed, const X* x, const bf16* weight, float* to,
                              std::int64_t count, NormStatistics statistics, bool centred) {
  const NormGradient gradient = norm_gradient(grad_normed, x, weight, count, statistics, centred);
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const std::int64_t left = count - i;
    const Floats g = load_some(grad_normed + i, left) * load_some(weight + i, left);
    store_some(to + i, left, gradient.at(g, load_some(x + i, left)) + load_some(to + i, left));
  }
}

PROTOTOK_TARGET_END
