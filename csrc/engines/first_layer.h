// The first block of [e, m, m, …, m] with a sequential residual in closed form (docs/kernels.md),
// from e and m to the block's output and back. bf16, for processors with products of its
// pairs; a thread takes a text at a time.
// Letters: R texts, N positions, H heads, K key-value heads, c head size, Q = (H + 2 K) c,
// d hidden size, I inner size of the MLP, W what its first product gives: I, gated 2 I; P vectors
// of a constant prefix; S spanning vectors: H + 2 of a text, behind a prefix 2 H + 2 and
// F = H (P - 1) constants.
#pragma once

#include "ops/row_kernels.h"
#include "products/packed_matrix.h"
#include "simd/arena.h"

#include <cstdint>
#include <memory>
#include <mutex>

namespace prototok {

struct Kernels;
struct FirstLayerSizes;

// What a prefix is to the block. Values are counted from those of its first vector.
struct FirstLayerPrefix {
  std::int64_t length;     // P
  const bf16* kv;          // (2, K, P, c): keys, rotated to 0 … P - 1, and values
  const float* shift;      // (d,): what the first vector's values give alone, with the bias
  const float* fixed;      // (F, d): the spanning vectors of the others, H of each
  const float* centred;    // (F, d): the same without their means where there are LayerNorms
  const float* projected;  // (F, W): the first product of the MLP, of `centred` behind its norm
};

// The same laid out as a text's own vectors are.
struct FirstLayerFront {
  std::int64_t length = 0;    // 0: there is no prefix, and what follows is null
  float* keys = nullptr;      // (P, K, c)
  float* values = nullptr;    // (K, c), of the first vector
  float* shift = nullptr;     // (d,)
  float* fixed = nullptr;     // (F, d)
  float* centred = nullptr;   // (F, d)
  float* projected = nullptr;  // (F, W)
  FirstLayerFront() = default;
  FirstLayerFront(Arena& arena, const FirstLayerSizes& size);
};

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
  FirstLayerFront front{};
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
  const float* cos;   // (>= P + N, rotary), the halves of a row alike
  const float* sin;
  std::int64_t rotary;

  // From the row of a position on.
  RotaryTable table(std::int64_t position = 0) const {
    return {cos + position * rotary, sin + position * rotary, rotary, rotary};
  }
};

// Numbers of one text, and floats from row to row of its matrices, padded to vectors or panels.
struct FirstLayerSizes {
  std::int64_t length, heads, hidden, wide, stacked, mixed;  // N, H, d, W, Q, H c
  std::int64_t front, own, fixed, span;  // P, S of the text, F, S of both
  std::int64_t coef_row, head_row, hidden_row, wide_row, stacked_row, mixed_row, table_row;
  FirstLayerSizes(const FirstLayerModel& model, std::int64_t length);
};

// What the way back needs of the way there.
struct FirstLayerSaved {
  float* coef;                 // (N, S)
  float* shares;               // (N, H): exp a_i of the sum up to it
  float* rms_inverse;          // (N,)
  float* span;                 // (own, d): base of m, base of e, one U a head; behind a prefix one
                               // of e a head, one of m a head
  float* projected;            // (own, W): the first product of the MLP, of the spanning vectors
  float* qkv;                  // (2, Q)
  NormStatistics* statistics;  // (2,)
  FirstLayerSaved(Arena& arena, const FirstLayerSizes& size);
};

// The products of one direction.
struct FirstLayerProducts {
  PackedMatrix qkv, out, up, down;
};

struct FirstLayerPacked {
  FirstLayerProducts forward, backward;
  std::once_flag with_backward;
};

class FirstLayer {
 public:
  // The weights must live as long. Throws std::invalid_argument for odd sizes and for a processor
  // without products of pairs.
  explicit FirstLayer(const FirstLayerModel& model);
  // The same behind a prefix, which is copied, with the same packed weights.
  FirstLayer(const FirstLayer& bare, const FirstLayerPrefix& prefix);

  const FirstLayerModel& model() const { return model_; }
  std::int64_t wide() const { return FirstLayerSizes(model_, 1).wide; }
  std::int64_t saved_floats(std::int64_t length) const;  // of a text
  void forward(const FirstLayerTexts& texts, std::int64_t rows, std::int64_t length,
               int threads) const;
  void backward(const FirstLayerTexts& texts, std::int64_t rows, std::int64_t length,
                int threads) const;

 private:
  template <class Body>
  void each_text(const FirstLayerTexts& texts, std::int64_t rows, std::int64_t length, int threads,
                 const Body& body) const;

  const Kernels& kernels_;
  FirstLayerModel model_;
  std::shared_ptr<FirstLayerPacked> packed_;
  AlignedBytes front_;  // where model_.front lies
};

// One text.
struct FirstLayerText {
  const FirstLayerModel& model;
  const FirstLayerProducts& products;
  FirstLayerTexts text;
  std::int64_t length;
};

}  // namespace prototok
