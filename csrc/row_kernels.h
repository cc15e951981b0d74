// The memory-bound passes on the CPU: over a row of logits, over a row of AdamW, and over a weight
// matrix that few rows are multiplied with.
// Letters: V vocabulary, D coordinates a row, R rows, I inputs, O outputs.
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

struct MatvecShape {
  std::int64_t rows, inputs, outputs, stride;
  bool add;
};

// One set per instruction set. `gradient` may be null (not wanted) or equal `logits` (in place).
struct RowKernels {
  HeadResult (*head_f32)(const float* logits, float* gradient, std::int64_t vocabulary,
                         std::int64_t target, float token_weight, float temperature);
  HeadResult (*head_bf16)(const bf16* logits, bf16* gradient, std::int64_t vocabulary,
                          std::int64_t target, float token_weight, float temperature);
  void (*adamw)(float* param, const float* grad, float* exp_avg, float* exp_avg_sq,
                std::int64_t count, const AdamWCoefficients& coefficients);
  // out[r, o] = inputs[r] . weight[o] for o in [begin, end), each with its bias and, with `add`,
  // what out held; `out` has `stride` elements a row. Sums are fp32.
  void (*matvec_f32)(const float* weight, const float* inputs, const float* bias, float* out,
                     const MatvecShape& shape, std::int64_t begin, std::int64_t end);
  void (*matvec_bf16)(const bf16* weight, const float* inputs, const bf16* bias, bf16* out,
                      const MatvecShape& shape, std::int64_t begin, std::int64_t end);
};

const RowKernels& baseline_kernels();
#if defined(__x86_64__)
const RowKernels& avx2_kernels();
const RowKernels& avx512_kernels();
#endif

}  // namespace prototok
