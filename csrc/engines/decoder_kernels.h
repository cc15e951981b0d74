// What a decoder does to few tokens, pass by pass: products that read each weight once, and the
// short passes between them. Activations are fp32; weights and cache are fp32 or bf16, and what a
// product with bf16 weights reads is rounded to bf16 first, sums are fp32.
// Letters: M tokens, I inputs, O outputs, d hidden size, c head size, T positions of the cache,
// r rotated part of a head, f width of the MLP.
#pragma once

#include "ops/row_kernels.h"
#include "products/linear_shape.h"

#include <cstdint>

namespace prototok {

// Positions a cache has room for are a multiple of this, so that a pass may read whole vectors.
constexpr std::int64_t kPositions = 64;

// One set per instruction set and element type; `void` is that type.
struct DecoderKernels {
  // LayerNorm of x (d,), or RMSNorm where `bias` is null.
  void (*norm)(const float* x, const void* weight, const void* bias, float eps, std::int64_t size,
               void* out);
  // out[m, o] = inputs[m] . weight[o] + bias[o] for o in [begin, end) and all tokens.
  void (*linear)(const void* weight, const void* bias, const void* inputs, float* out,
                 const LinearShape& shape, std::int64_t begin, std::int64_t end);
  // A head (c,) in place: RMSNorm where `norm` is not null, then the rotation.
  void (*turn)(float* head, const void* norm, float eps, std::int64_t size,
               const RotaryTable& table, std::int64_t position);
  // A key (c,) into column `position` of keys (c, T) and a value (c,) into its row of values (T, c).
  void (*keep)(const float* key, const float* value, void* keys, void* values, std::int64_t size,
               std::int64_t capacity, std::int64_t position);
  // Softmax attention of q (c,) over positions [begin, end); `scores` has room for T.
  void (*attend)(const float* q, const void* keys, const void* values, float scaling,
                 std::int64_t size, std::int64_t capacity, std::int64_t begin, std::int64_t end,
                 float* scores, void* out);
  // activation(x), or activation(x[:f]) * x[f:] where gated; out (f,).
  void (*activate)(const float* x, const ActivationShape& shape, void* out);
  // Index of the largest of x (V,), the lowest among equals.
  std::int64_t (*argmax)(const float* x, std::int64_t count);
  // Element to fp32.
  void (*widen)(const void* from, float* to, std::int64_t count);
};

}  // namespace prototok
