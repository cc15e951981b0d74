// What the first block makes of e and m alone, each weight read once: q, k and v, and the vectors
// that span its output; and the gradients of e and m from theirs. first_layer.py has the same in
// torch.
#pragma once

#include "engines/first_layer_logits.h"
#include "engines/first_layer_pass.h"
#include "ops/norm.h"
#include "products/packed_product.h"
#include "simd/arena.h"
#include "simd/target.h"
#include "simd/vectors.h"

#include <cstdint>

PROTOTOK_TARGET_BEGIN

inline void add_row(float* to, const bf16* row, std::int64_t count) {
  if (row == nullptr) return;
  for (std::int64_t t = 0; t < count; t += kLanes)
    store_some(to + t, count - t, load_some(to + t, count - t) + load_some(row + t, count - t));
}

struct SpanScratch {
  bf16 *x, *normed;  // (2, d)
  bf16* mixed;       // (2, H c), later one head
  SpanScratch(Arena& arena, const FirstLayerSizes& size)
      : x(arena.take<bf16>(2 * size.hidden)),
        normed(arena.take<bf16>(2 * size.hidden)),
        mixed(arena.take<bf16>(2 * size.mixed)) {}
};

// The spanning vectors behind a prefix: every base counts its first vector in full, and the values of
// e and m are steps away from that one. x (2, d), mixed a head.
inline void steps_from_prefix(const FirstLayerPass& p, const bf16* x, bf16* mixed) {
  const FirstLayerSizes& size = p.size;
  const FirstLayerFront& front = p.model.front;
  const std::int64_t d = size.hidden, D = size.hidden_row, c = p.model.head_size;
  clear(p.saved.span, 2 * D);
  for (int vector = 0; vector < 2; ++vector) {
    float* base = p.saved.span + vector * D;
    copy_scaled(front.shift, base, d, 1.0f);
    add_row(base, x + vector * d, d);
  }
  for (std::int64_t h = 0; h < size.heads; ++h)
    for (int vector = 0; vector < 2; ++vector) {
      const float *value = p.qkv(vector) + p.values() + p.kv(h), *from = front.values + p.kv(h);
      for (std::int64_t t = 0; t < c; ++t) store_one(mixed + t, value[t] - from[t]);
      packed_sum({mixed, p.products.out.data() + h * c * kPanel,
                  p.saved.span + p.step(vector, h) * D, nullptr, 1, c, size.mixed, d,
                  true});
    }
}

// q, k and v of the two vectors, and the spanning vectors.
inline void span_of_pair(const FirstLayerPass& p) {
  const FirstLayerModel& model = p.model;
  const FirstLayerSizes& size = p.size;
  const FirstLayerSaved& saved = p.saved;
  const std::int64_t d = size.hidden, D = size.hidden_row, c = model.head_size;
  const Scratch<SpanScratch> scratch(size);
  const auto [x, normed, mixed] = *scratch;
  for (int vector = 0; vector < 2; ++vector) {
    copy_scaled(p.vector(vector), x + vector * d, d, 1.0f);
    saved.statistics[vector] = residual_norm_row<bf16>(
        x + vector * d, nullptr, nullptr, normed + vector * d, model.input_norm,
        model.input_norm_bias, d, model.eps);
  }
  packed_sum({normed, p.products.qkv.data(), saved.qkv, nullptr, 2, d, d, size.stacked, true});
  for (int vector = 0; vector < 2; ++vector) {
    add_row(p.qkv(vector), model.qkv_bias, size.stacked);
    for (std::int64_t h = 0; h < size.heads; ++h)
      copy_scaled(p.qkv(vector) + p.values() + p.kv(h), mixed + vector * size.mixed + h * c, c,
                  1.0f);
  }
  if (size.front > 0) return steps_from_prefix(p, x, mixed);
  const bf16* out = p.products.out.data();
  packed_sum({mixed, out, saved.span, nullptr, 2, size.mixed, size.mixed, d, true});
  for (int vector = 0; vector < 2; ++vector) {
    add_row(saved.span + vector * D, x + vector * d, d);
    add_row(saved.span + vector * D, model.out_bias, d);
  }
  for (std::int64_t h = 0; h < size.heads; ++h) {
    const std::int64_t value = p.values() + p.kv(h);
    for (std::int64_t t = 0; t < c; ++t)
      store_one(mixed + t, p.qkv(1)[value + t] - p.qkv(0)[value + t]);
    packed_sum({mixed, out + h * c * kPanel, saved.span + (2 + h) * D, nullptr, 1, c, size.mixed,
                d, true});
  }
}

struct SpanBackwardScratch {
  bf16* narrow;        // (own, d), later one vector
  float* grad_mixed;   // (own, H c)
  float* grad_qkv;     // (2, Q)
  bf16* narrow_qkv;    // (2, Q)
  float* grad_normed;  // (2, d)
  SpanBackwardScratch(Arena& arena, const FirstLayerSizes& size)
      : narrow(arena.take<bf16>(size.own * size.hidden)),
        grad_mixed(arena.take<float>(size.own * size.mixed_row)),
        grad_qkv(arena.take<float>(2 * size.stacked_row)),
        narrow_qkv(arena.take<bf16>(2 * size.stacked)),
        grad_normed(arena.take<float>(2 * size.hidden_row)) {}
};

// Adds to grad_qkv (2, Q) what the gradients of steps_from_prefix say of the values, by the panels
// that hold the head's part of the product.
inline void steps_from_prefix_backward(const FirstLayerPass& p, const float* grad_span,
                                       const SpanBackwardScratch& scratch) {
  const FirstLayerSizes& size = p.size;
  const std::int64_t d = size.hidden, D = size.hidden_row, c = p.model.head_size;
  for (std::int64_t h = 0; h < size.heads; ++h) {
    const std::int64_t begin = h * c / kPanel * kPanel, width = panels_padded((h + 1) * c - begin);
    for (int vector = 0; vector < 2; ++vector)
      copy_scaled(grad_span + p.step(vector, h) * D, scratch.narrow + vector * d, d, 1.0f);
    packed_sum({scratch.narrow, p.products.out.data() + begin * d, scratch.grad_mixed, nullptr, 2,
                d, d, width, true});
    for (int vector = 0; vector < 2; ++vector) {
      const float* grad = scratch.grad_mixed + vector * width + (h * c - begin);
      float* to = scratch.grad_qkv + vector * size.stacked_row + p.values() + p.kv(h);
      for (std::int64_t t = 0; t < c; ++t) to[t] += grad[t];
    }
  }
}

// Adds to grad_qkv (2, Q) what the gradients of the spanning vectors (S, d) say of the values.
inline void values_backward(const FirstLayerPass& p, const float* grad_span,
                            const SpanBackwardScratch& scratch) {
  const FirstLayerModel& model = p.model;
  const FirstLayerSizes& size = p.size;
  const std::int64_t d = size.hidden, D = size.hidden_row, c = model.head_size;
  const auto [narrow, grad_mixed, grad_qkv, narrow_qkv, grad_normed] = scratch;
  copy_rows(grad_span, D, narrow, d, size.span, d);
  packed_sum({narrow, p.products.out.data(), grad_mixed, nullptr, size.span, d, d, size.mixed,
              size.span < kTilesFrom});
  float *of_m = grad_qkv + p.values(), *of_e = of_m + size.stacked_row;
  for (std::int64_t h = 0; h < size.heads; ++h)
    for (std::int64_t t = 0; t < c; ++t) {
      const float* grad = grad_mixed + h * c + t;
      const float of_difference = grad[(2 + h) * size.mixed_row];
      of_m[p.kv(h) + t] += grad[0] - of_difference;
      of_e[p.kv(h) + t] += grad[size.mixed_row] + of_difference;
    }
}

// The gradients of e and m from those of the spanning vectors (S, d) and of the logits.
inline void span_of_pair_backward(const FirstLayerPass& p, const float* grad_span,
                                  const PairLogits& grad_logits) {
  const FirstLayerModel& model = p.model;
  const FirstLayerSizes& size = p.size;
  const std::int64_t d = size.hidden, D = size.hidden_row;
  const Scratch<SpanBackwardScratch> scratch(size);
  const auto [narrow, grad_mixed, grad_qkv, narrow_qkv, grad_normed] = *scratch;
  clear(grad_qkv, 2 * size.stacked_row);
  if (size.front > 0)
    steps_from_prefix_backward(p, grad_span, *scratch);
  else
    values_backward(p, grad_span, *scratch);
  distance_logits_backward(p, grad_logits, grad_qkv);
  copy_rows(grad_qkv, size.stacked_row, narrow_qkv, size.stacked, 2, size.stacked);
  packed_sum({narrow_qkv, p.products.qkv.data(), grad_normed, nullptr, 2, size.stacked,
              size.stacked, d, true});
  for (int vector = 0; vector < 2; ++vector) {
    // The norm read the vector as it was rounded.
    copy_scaled(p.vector(vector), narrow, d, 1.0f);
    copy_scaled(grad_span + vector * D, p.grad_vector(vector), d, 1.0f);
    add_norm_gradient(grad_normed + vector * D, narrow, model.input_norm, p.grad_vector(vector), d,
                      p.saved.statistics[vector], model.centred);
  }
}

PROTOTOK_TARGET_END
