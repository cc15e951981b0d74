// The first block of [e, m, …, m] with a sequential residual, from its attention's logits and its
// spanning vectors on (docs/kernels.md): scan, combination and the MLP whose first half has low rank.
// bf16, for processors with AVX-512 BF16; a thread takes a text at a time.
// Letters: R texts, N positions, H heads, S = H + 2 spanning vectors, d hidden size, I inner size of
// the MLP, W what its first product gives: I, gated 2 I.
#pragma once

#include "packed_product.h"
#include "row_kernels.h"

#include <cstdint>
#include <mutex>

namespace prototok {

struct AffineLayerModel {
  std::int64_t hidden, heads;
  ActivationShape activation;
  bool centred;          // LayerNorm
  float eps;
  const bf16* norm;      // (d,)
  const bf16* up;        // (W, d)
  const bf16* down;      // (d, I)
  const bf16* down_bias;  // (d,); null = none
};

// Of all texts, or of one; in the backward direction with the gradients.
struct AffineTexts {
  const float* a;     // (R, H, N), of m to m at distance i
  const float* b;     // (R, H, N), of m at position i to e
  const bf16* span;   // (R, S, d)
  const bf16* bias;   // (W,), in front of the activation; null = none
  float* saved;       // (R, saved_floats)
  bf16* out;          // (R, N, d)
  const bf16* grad;   // (R, N, d), of `out`
  float* grad_a;      // (R, H, N)
  float* grad_b;      // (R, H, N)
  bf16* grad_span;    // (R, S, d)
};

class AffineLayer {
 public:
  // The weights must live as long. Throws std::invalid_argument for odd sizes and for a processor
  // without AVX-512 BF16.
  explicit AffineLayer(const AffineLayerModel& model);

  std::int64_t saved_floats(std::int64_t length) const;  // of a text
  void forward(const AffineTexts& texts, std::int64_t rows, std::int64_t length, int threads) const;
  void backward(const AffineTexts& texts, std::int64_t rows, std::int64_t length, int threads);

 private:
  template <class Body>
  void each_text(const AffineTexts& texts, std::int64_t rows, std::int64_t length, int threads,
                 const Body& body) const;

  AffineLayerModel model_;
  PackedMatrix up_, down_, up_back_, down_back_;
  std::once_flag packed_backward_;
};

// Numbers of one text, and floats from row to row of its matrices, padded to vectors or panels.
struct AffineSizes {
  std::int64_t length, heads, span, hidden, wide;    // N, H, S, d, W
  std::int64_t coef_row, head_row, hidden_row, wide_row;
  AffineSizes(const AffineLayerModel& model, std::int64_t length);
  std::int64_t saved_floats() const;
  std::int64_t scratch_floats() const;  // in either direction
};

// One text, with what a thread needs beside it.
struct AffineText {
  const AffineLayerModel& model;
  AffineTexts text;
  std::int64_t length;
  const bf16* up;    // PackedMatrix::data(), of this direction
  const bf16* down;
  float* scratch;
};

#if defined(__x86_64__)
void affine_forward_avx512bf16(const AffineText& text);
void affine_backward_avx512bf16(const AffineText& text);
#endif

}  // namespace prototok
