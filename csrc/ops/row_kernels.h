// What the CPU does beside large matrix products: passes over a row of logits, of AdamW, of a norm
// or of an activation, and attention of one key-value head.
// Letters: V vocabulary, D coordinates a row, N positions, F constant positions in front of them, H
// heads, K key-value heads, c head size.
#pragma once

#include "simd/bf16.h"

#include <cstdint>

namespace prototok {

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

struct NormStatistics {
  float mean;     // 0 without a bias: RMSNorm
  float inverse;  // 1 / sqrt(mean square about `mean` + eps)
};

enum class Activation { silu, gelu, gelu_tanh, relu };

struct ActivationShape {
  std::int64_t inner;
  Activation kind;
  bool gated;  // a row holds what is activated, then what it multiplies
};

// Cosines and sines of the positions, (>= N, >= rotary / 2), rows `row` apart.
struct RotaryTable {
  const float* cos;
  const float* sin;
  std::int64_t row;
  std::int64_t rotary;  // r, the leading part of a head that is rotated
};

struct AttentionShape {
  std::int64_t length, heads, kv_heads, size, rotary;
  std::int64_t window;      // positions a query sees, its own included; at least 1
  float scaling;            // of the logits
  const float* cos;         // (>= N, >= r / 2), rows `table_row` apart
  const float* sin;
  std::int64_t table_row;
  // F constant positions that stand before the first, whose rows the tables leave out: their keys,
  // rotated, and their values, (2, K, F, c) of the tensors' type. No gradient goes to them.
  std::int64_t front = 0;
  const void* front_kv = nullptr;
  std::int64_t first = 0;  // forward: queries in front of it are left out

  RotaryTable table() const { return {cos, sin, table_row, rotary}; }
};

// One set per instruction set. `gradient` may be null (not wanted) or equal `logits` (in place).
struct RowKernels {
  HeadResult (*head_f32)(const float* logits, float* gradient, std::int64_t vocabulary,
                         std::int64_t target, float token_weight, float temperature);
  HeadResult (*head_bf16)(const bf16* logits, bf16* gradient, std::int64_t vocabulary,
                          std::int64_t target, float token_weight, float temperature);
  void (*adamw)(float* param, const float* grad, float* exp_avg, float* exp_avg_sq,
                std::int64_t count, const AdamWCoefficients& coefficients);
  // sum = x + delta, or x itself where delta is null and `sum` is not written; normed is LayerNorm
  // of the sum where there is a bias and RMSNorm where there is none.
  NormStatistics (*residual_norm_f32)(const float* x, const float* delta, float* sum, float* normed,
                                      const float* weight, const float* bias, std::int64_t count,
                                      float eps);
  NormStatistics (*residual_norm_bf16)(const bf16* x, const bf16* delta, bf16* sum, bf16* normed,
                                       const bf16* weight, const bf16* bias, std::int64_t count,
                                       float eps);
  // The gradient of x and of delta, which is the same; `grad_sum` may be null. `centred`: LayerNorm.
  void (*residual_norm_backward_f32)(const float* grad_sum, const float* grad_normed,
                                     const float* sum, const float* weight, float* grad,
                                     std::int64_t count, NormStatistics statistics, bool centred);
  void (*residual_norm_backward_bf16)(const bf16* grad_sum, const bf16* grad_normed,
                                      const bf16* sum, const bf16* weight, bf16* grad,
                                      std::int64_t count, NormStatistics statistics, bool centred);
  // z and grad_z have 2 * inner elements a row where gated, else inner; bias like z, or null.
  void (*activation_f32)(const float* z, const float* bias, float* out,
                         const ActivationShape& shape);
  void (*activation_bf16)(const bf16* z, const bf16* bias, bf16* out, const ActivationShape& shape);
  void (*activation_backward_f32)(const float* grad, const float* z, const float* bias,
                                  float* grad_z, const ActivationShape& shape);
  void (*activation_backward_bf16)(const bf16* grad, const bf16* z, const bf16* bias, bf16* grad_z,
                                   const ActivationShape& shape);
  // One row (N, (H + 2 K) c) of the stacked product: the H / K query heads of one key-value head.
  void (*attention_f32)(const AttentionShape& shape, const float* qkv, float* out,
                        std::int64_t kv_head);
  void (*attention_bf16)(const AttentionShape& shape, const bf16* qkv, bf16* out,
                         std::int64_t kv_head);
  void (*attention_backward_f32)(const AttentionShape& shape, const float* qkv,
                                 const float* grad_out, float* grad_qkv, std::int64_t kv_head);
  void (*attention_backward_bf16)(const AttentionShape& shape, const bf16* qkv,
                                  const bf16* grad_out, bf16* grad_qkv, std::int64_t kv_head);
};

}  // namespace prototok
