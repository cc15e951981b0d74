// The CPU operations over whole tensors: plain pointers and sizes, contiguous rows.
// Letters: R rows, V vocabulary, D coordinates a row.
#pragma once

#include "ops/row_kernels.h"

#include <cstdint>

namespace prototok {

enum class Element { f32, bf16 };

struct Head {
  const void* logits;         // (R, V)
  void* gradient;             // (R, V), may be `logits`; null when not wanted
  const std::int64_t* targets;  // (R,) in [0, V)
  const float* token_weight;  // (R,); null = ones
  float temperature;
  std::int64_t rows, vocabulary;
  Element element;
  float* loss;               // (R,)
  std::int64_t* predicted;   // (R,)
  float* margin;             // (R,)
};

// Throws std::out_of_range when a target is not in [0, V).
void check_targets(const Head& head);

// Throws as `check_targets` does, with nothing written.
void head(const Head& head, const RowKernels& kernels, int threads);

struct AdamW {
  float* param;               // (R, D), and so are the next three
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
  std::int64_t* step;         // (R,) updates done so far
  const float* lr;            // (R,)
  const std::uint8_t* active;  // (R,) 0 or 1; the other rows are not touched
  std::int64_t rows, coordinates;
  double beta1, beta2, eps, weight_decay;
};

void adamw(const AdamW& adamw, const RowKernels& kernels, int threads);

struct ResidualNorm {
  const void* x;       // (R, D), and so are delta, sum, normed
  const void* delta;   // null = nothing to add
  void* sum;           // null exactly where delta is
  void* normed;
  const void* weight;  // (D,)
  const void* bias;    // (D,); null = RMSNorm
  float* statistics;   // (R, 2), the mean and the inverse deviation of each row
  std::int64_t rows, coordinates;
  float eps;
  Element element;
};

void residual_norm(const ResidualNorm& norm, const RowKernels& kernels, int threads);

struct ResidualNormBackward {
  const void* grad_sum;     // (R, D); null = none
  const void* grad_normed;  // (R, D)
  const void* sum;          // (R, D)
  const void* weight;       // (D,)
  const float* statistics;  // (R, 2)
  void* grad;               // (R, D)
  std::int64_t rows, coordinates;
  bool centred;  // LayerNorm
  Element element;
};

void residual_norm_backward(const ResidualNormBackward& norm, const RowKernels& kernels,
                            int threads);

struct ActivationPass {
  const void* grad;  // (R, I); null = forward
  const void* z;     // (R, I), gated (R, 2 I)
  const void* bias;  // (I,), gated (2 I,); null = none
  void* out;         // forward (R, I), backward like z
  std::int64_t rows;
  ActivationShape shape;
  Element element;
};

void activation(const ActivationPass& pass, const RowKernels& kernels, int threads);

struct Attention {
  const void* qkv;       // (B, N, (H + 2 K) c)
  const void* grad_out;  // (B, N, H c); null = forward
  void* out;             // forward (B, N, H c), backward like qkv
  std::int64_t rows;     // B
  AttentionShape shape;
  Element element;
};

void attention(const Attention& attention, const RowKernels& kernels, int threads);

}  // namespace prototok
