// An update of AdamW.
#pragma once

#include "ops/row_kernels.h"
#include "simd/target.h"

#include <cmath>
#include <cstdint>

PROTOTOK_TARGET_BEGIN

inline void adamw_row(float* __restrict param, const float* __restrict grad, float* __restrict exp_avg,
               float* __restrict exp_avg_sq, std::int64_t count, const AdamWCoefficients& k) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float g = grad[i];
    const float m = exp_avg[i] + k.one_minus_beta1 * (g - exp_avg[i]);
    const float v = k.beta2 * exp_avg_sq[i] + k.one_minus_beta2 * g * g;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    param[i] = k.decay * param[i] - k.rate * m / (std::sqrt(v) * k.inverse_root_bias + k.eps);
  }
}

PROTOTOK_TARGET_END
