// The first block of [e, m, m, …, m] with a sequential residual in closed form (docs/kernels.md),
// from e and m to the block's output and back. bf16, for processors with AVX-512 BF16; a thread
// takes a text at a time.
// Letters: R texts, N positions, H heads, K key-value heads, c head size, Q = (H + 2 K) c,
// S = H + 2 spanning vectors, d hidden size, I inner size of the MLP, W what its first product
// gives: I, gated 2 I.
#pragma once

#include "ops/row_kernels.h"
#include "products/packed_matrix.h"
#include "simd/arena.h"

#include <cstdint>
#include <mutex>

namespace prototok {

struct Kernels;

struct FirstLayerModel {
  std::int64_t hidden, heads, kv_heads, head_size;
  ActivationShape activation;
  bool centred;  // LayerNorms
  float eps, scaling;
  // Null = none, of everything that may be missing.
  const bf16* input_norm;       // (d,)
  const bf16* input_norm_bias;  // (d,), not null where centred
  const bf16* qkv;              // (Q, d)
  const bf16* qkv_bias;         // (Q,)
  const bf16* q_norm;           // (c,)
  const bf16* k_norm;           // (c,)
  const bf16* out;              // (d, H c)
  const bf16* out_bias;         // (d,)
  const bf16* norm;             // (d,), in front of the MLP
  const bf16* up;               // (W, d)
  const bf16* up_bias;          // (W,), with what the norm's own bias makes behind the product
  const bf16* down;             // (d, I)
  const bf16* down_bias;        // (d,)
};

// Of all texts, or of one.
struct FirstLayerTexts {
  const float* e;     // (R, d)
  const float* m;     // (R, d)
  float* saved;       // (R, saved_floats)
  bf16* out;          // (R, N, d), forward
  const bf16* grad;   // (R, N, d) of `out`, backward, and so are the next
  float* grad_e;      // (R, d)
  float* grad_m;      // (R, d)
  const float* cos;   // (>= N, rotary), the halves of a row alike
  const float* sin;
  std::int64_t rotary;

  RotaryTable table() const { return {cos, sin, rotary, rotary}; }
};

// Numbers of one text, and floats from row to row of its matrices, padded to vectors or panels.
struct FirstLayerSizes {
  std::int64_t length, heads, span, hidden, wide, stacked, mixed;  // N, H, S, d, W, Q, H c
  std::int64_t coef_row, head_row, hidden_row, wide_row, stacked_row, mixed_row, table_row;
  FirstLayerSizes(const FirstLayerModel& model, std::int64_t length);
};

// What the way back needs of the way there.
struct FirstLayerSaved {
  float* coef;                 // (N, S)
  float* shares;               // (N, H): exp a_i of the sum up to it
  float* rms_inverse;          // (N,)
  float* span;                 // (S, d): base of m, base of e, one U a head
  float* projected;            // (S, W): the first product of the MLP, of the spanning vectors
  float* qkv;                  // (2, Q)
  NormStatistics* statistics;  // (2,)
  FirstLayerSaved(Arena& arena, const FirstLayerSizes& size);
};

// The products of one direction.
struct FirstLayerProducts {
  PackedMatrix qkv, out, up, down;
};

class FirstLayer {
 public:
  // The weights must live as long. Throws std::invalid_argument for odd sizes and for a processor
  // without AVX-512 BF16.
  explicit FirstLayer(const FirstLayerModel& model);

  const FirstLayerModel& model() const { return model_; }
  std::int64_t saved_floats(std::int64_t length) const;  // of a text
  void forward(const FirstLayerTexts& texts, std::int64_t rows, std::int64_t length,
               int threads) const;
  void backward(const FirstLayerTexts& texts, std::int64_t rows, std::int64_t length, int threads);

 private:
  template <class Body>
  void each_text(const FirstLayerTexts& texts, std::int64_t rows, std::int64_t length, int threads,
                 const Body& body) const;

  const Kernels& kernels_;
  FirstLayerModel model_;
  FirstLayerProducts forward_, backward_;
  std::once_flag packed_backward_;
};

// One text.
struct FirstLayerText {
  const FirstLayerModel& model;
  const FirstLayerProducts& products;
  FirstLayerTexts text;
  std::int64_t length;
};

}  // namespace prototok
