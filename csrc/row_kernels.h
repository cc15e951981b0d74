// The memory-bound passes on the CPU, over a row of logits and over a row of AdamW.
// Letters: V vocabulary, D coordinates a row.
#pragma once

#include <cstdint>

namespace prototok {

// bfloat16 as it lies in memory: the upper half of a float.
struct bf16 {
  std::uint16_t bits;
};

struct HeadResult {
  float loss;              // nats
  std::int64_t predicted;  // argmax; the lowest index among equals
  float margin;            // target logit minus the best other logit
};

struct AdamWCoefficients {
  float beta2;
  float one_minus_beta1, one_minus_beta2;  // rounded from double, not as 1.0f - beta
  float eps;
  float decay;              // 1 - lr * weight_decay
  float rate;               // lr / (1 - beta1^step)
  float inverse_root_bias;  // 1 / sqrt(1 - beta2^step)
};

// One set per instruction set. `gradient` may be null (not wanted) or equal `logits` (in place).
struct RowKernels {
  HeadResult (*head_f32)(const float* logits, float* gradient, std::int64_t vocabulary,
                         std::int64_t target, float token_weight, float temperature);
  HeadResult (*head_bf16)(const bf16* logits, bf16* gradient, std::int64_t vocabulary,
                          std::int64_t target, float token_weight, float temperature);
  void (*adamw)(float* param, const float* grad, float* exp_avg, float* exp_avg_sq,
                std::int64_t count, const AdamWCoefficients& coefficients);
};

const RowKernels& baseline_kernels();
#if defined(__x86_64__)
const RowKernels& avx2_kernels();
const RowKernels& avx512_kernels();
#endif

}  // namespace prototok
