// One text of first_layer.h in either direction, stage by stage as first_layer.py has them.
//
// A position is a combination of S vectors by its row of `coef` (N, S): [0, 1, 0 …] at position 0,
// [1, 0, w_i1 … w_iH] behind it; behind a prefix both bases count its first vector, and the weights
// of e, of all m and of the prefix's other vectors follow, H of each. Of the two vectors m comes
// first. What has one, two or S rows is small enough for fp32; what enters a product with a weight
// is rounded to bf16.
#pragma once

#include "engines/first_layer.h"
#include "engines/first_layer_pass.h"
#include "engines/first_layer_scan.h"
#include "engines/first_layer_span.h"
#include "ops/activation.h"
#include "ops/norm.h"
#include "products/packed_product.h"
#include "products/tile.h"
#include "simd/arena.h"
#include "simd/target.h"
#include "simd/vectors.h"

#include <cstdint>

PROTOTOK_TARGET_BEGIN

// to (rows, width) = rows of coef times the spanning vectors: the text's own, then the constants.
inline void combine(const FirstLayerPass& p, std::int64_t rows, std::int64_t width,
                    const float* coef, const float* own, const float* fixed, std::int64_t row,
                    float* to) {
  const FirstLayerSizes& size = p.size;
  product(rows, width, {coef, size.coef_row, 1}, own, row, to, row, size.own, false);
  if (size.fixed > 0)
    product(rows, width, {coef + size.own, size.coef_row, 1}, fixed, row, to, row, size.fixed,
            true);
}

// to (rows, S) = [to +] rows (rows, width) times the spanning vectors transposed.
inline void against_span(const FirstLayerPass& p, std::int64_t rows, std::int64_t width,
                         const float* from, const float* own, const float* fixed,
                         std::int64_t row, float* to, bool add) {
  const FirstLayerSizes& size = p.size;
  all_dots(rows, from, row, size.own, own, row, to, size.coef_row, width, add);
  if (size.fixed > 0)
    all_dots(rows, from, row, size.fixed, fixed, row, to + size.own, size.coef_row, width, add);
}

// Takes their means off the text's own vectors where the model's norms are LayerNorms.
inline void centre_rows(const FirstLayerPass& p, float* rows) {
  if (!p.model.centred) return;
  const std::int64_t d = p.size.hidden;
  for (std::int64_t s = 0; s < p.size.own; ++s, rows += p.size.hidden_row) {
    Floats total = {};
    for (std::int64_t t = 0; t < d; t += kLanes) total += load_some(rows + t, d - t);
    const float mean = lane_sum<kLanes>(total) / float(d);
    for (std::int64_t t = 0; t < d; t += kLanes)
      store_some(rows + t, d - t, load_some(rows + t, d - t) - mean);
  }
}

// What the norm in front of the MLP scales, (S, d).
inline void centred_span(const FirstLayerPass& p, float* centred) {
  const std::int64_t own = p.size.own * p.size.hidden_row;
  copy_scaled(p.saved.span, centred, own, 1.0f);
  centre_rows(p, centred);
  copy_scaled(p.model.front.centred, centred + own, p.size.fixed * p.size.hidden_row, 1.0f);
}

// to (own, d) = rows times the weight of the norm in front of the MLP; rows lie to_row apart there.
template <class To>
inline void scale_by_norm(const FirstLayerPass& p, const float* rows, To* to, std::int64_t to_row) {
  const std::int64_t d = p.size.hidden;
  for (std::int64_t s = 0; s < p.size.own; ++s)
    for (std::int64_t t = 0; t < d; t += kLanes)
      store_some(to + s * to_row + t, d - t,
                 load(rows + s * p.size.hidden_row + t) * load_some(p.model.norm + t, d - t));
}

// Rows i … i + tile - 1 of coef * rms_inverse, and of what the MLP's first product makes of them.
inline void scaled_tile(const FirstLayerPass& p, std::int64_t i, std::int64_t tile, float* scaled,
                        float* z) {
  const std::int64_t C = p.size.coef_row, Z = p.size.wide_row;
  for (std::int64_t r = i; r < i + tile; ++r)
    copy_scaled(p.saved.coef + r * C, scaled + r * C, C, p.saved.rms_inverse[r]);
  combine(p, tile, padded(p.size.wide), scaled + i * C, p.saved.projected,
          p.model.front.projected, Z, z);
}

struct AffineMlpScratch {
  float *centred, *scaled;  // (S, d), (N, S)
  float *x, *z;             // a tile of (N, d) and of (N, W)
  bf16 *normed, *inner;     // (own, d), (N, I)
  AffineMlpScratch(Arena& arena, const FirstLayerPass& p)
      : centred(arena.take<float>(p.size.span * p.size.hidden_row)),
        scaled(arena.take<float>(p.size.length * p.size.coef_row)),
        x(arena.take<float>(kTileRows * p.size.hidden_row)),
        z(arena.take<float>(kTileRows * p.size.wide_row)),
        normed(arena.take<bf16>(p.size.own * p.size.hidden)),
        inner(arena.take<bf16>(p.size.length * p.model.activation.inner)) {}
};

// out = x + mlp(x) for x = coef span: the MLP's first product is of S vectors instead of N.
inline void affine_mlp(const FirstLayerPass& p) {
  const FirstLayerModel& model = p.model;
  const FirstLayerSizes& size = p.size;
  const FirstLayerSaved& saved = p.saved;
  const std::int64_t N = size.length, d = size.hidden, I = model.activation.inner;
  const std::int64_t C = size.coef_row, D = size.hidden_row, Z = size.wide_row;
  const Scratch<AffineMlpScratch> scratch(p);
  const auto [centred, scaled, x, z, normed, inner] = *scratch;
  centred_span(p, centred);
  scale_by_norm(p, centred, normed, d);
  packed_sum({normed, p.products.up.data(), saved.projected, nullptr, size.own, d, d,
              size.wide, size.own < kTilesFrom});
  for (std::int64_t i = 0; i < N; i += kTileRows) {
    const std::int64_t tile = least(kTileRows, N - i);
    combine(p, tile, padded(d), saved.coef + i * C, saved.span, model.front.fixed, D, x);
    for (std::int64_t r = 0; r < tile; ++r)
      saved.rms_inverse[i + r] = norm_statistics(x + r * D, d, model.centred, model.eps).inverse;
    copy_rows(x, D, p.text.out + i * d, d, tile, d);
    scaled_tile(p, i, tile, scaled, z);
    for (std::int64_t r = 0; r < tile; ++r)
      activation_row(z + r * Z, model.up_bias, inner + (i + r) * I, model.activation);
  }
  packed_product({inner, p.products.down.data(), model.down_bias, p.text.out, N, I, d, true,
                  N < kTilesFrom});
}

struct AffineMlpBackwardScratch {
  float *scaled, *z;                // (N, S), a tile of (N, W)
  float* grad_projected;            // (own, W)
  bf16 *narrow, *grad_inner;        // (own, W), (N, I)
  AffineMlpBackwardScratch(Arena& arena, const FirstLayerPass& p)
      : scaled(arena.take<float>(p.size.length * p.size.coef_row)),
        z(arena.take<float>(kTileRows * p.size.wide_row)),
        grad_projected(arena.take<float>(p.size.own * p.size.wide_row)),
        narrow(arena.take<bf16>(p.size.own * p.size.wide)),
        grad_inner(arena.take<bf16>(p.size.length * p.model.activation.inner)) {}
};

// The gradients of scaled = coef * rms_inverse (N, S) and of the text's own centred vectors (own, d)
// through the MLP's products alone.
inline void affine_mlp_backward(const FirstLayerPass& p, float* grad_scaled, float* grad_centred) {
  const FirstLayerModel& model = p.model;
  const FirstLayerSizes& size = p.size;
  const std::int64_t N = size.length, own = size.own, d = size.hidden, W = size.wide;
  const std::int64_t C = size.coef_row, D = size.hidden_row, Z = size.wide_row;
  const std::int64_t I = model.activation.inner;
  const Scratch<AffineMlpBackwardScratch> scratch(p);
  const auto [scaled, z, grad_projected, narrow, grad_inner] = *scratch;
  packed_product({p.text.grad, p.products.down.data(), nullptr, grad_inner, N, d, I, false,
                  N < kTilesFrom});
  clear(grad_scaled, N * C);
  clear(grad_projected, own * Z);
  for (std::int64_t i = 0; i < N; i += kTileRows) {
    const std::int64_t tile = least(kTileRows, N - i);
    scaled_tile(p, i, tile, scaled, z);
    for (std::int64_t r = 0; r < tile; ++r) {
      float* row = z + r * Z;
      activation_backward_row(grad_inner + (i + r) * I, row, model.up_bias, row, model.activation);
    }
    against_span(p, tile, padded(W), z, p.saved.projected, model.front.projected, Z,
                 grad_scaled + i * C, false);
    all_products(own, padded(W), {scaled + i * C, 1, C}, z, Z, grad_projected, Z, tile, true);
  }
  copy_rows(grad_projected, Z, narrow, W, own, W);
  packed_sum({narrow, p.products.up.data(), grad_centred, nullptr, own, W, W, d, own < kTilesFrom});
  scale_by_norm(p, grad_centred, grad_centred, D);
}

struct AffineNormBackwardScratch {
  float *centred, *gram, *pulled;  // (S, d), (S, S), (N, S)
  AffineNormBackwardScratch(Arena& arena, const FirstLayerPass& p)
      : centred(arena.take<float>(p.size.span * p.size.hidden_row)),
        gram(arena.take<float>(p.size.span * p.size.coef_row)),
        pulled(arena.take<float>(p.size.length * p.size.coef_row)) {}
};

// grad_coef: from the gradient of scaled to that of coef; grad_span: from that of the centred span
// to that of the span. <coef_i, ∂coef_i> is rms_inverse_i times its gradient, and |x_i|^2 is coef_i
// Gram coef_i, which carries that on without another look at x.
inline void affine_norm_backward(const FirstLayerPass& p, float* grad_coef, float* grad_span) {
  const FirstLayerSizes& size = p.size;
  const std::int64_t N = size.length, S = size.span, d = size.hidden;
  const std::int64_t C = size.coef_row, D = size.hidden_row;
  const Scratch<AffineNormBackwardScratch> scratch(p);
  const auto [centred, gram, pulled] = *scratch;
  centred_span(p, centred);
  clear(gram, S * C);
  all_dots(S, centred, D, S, centred, D, gram, C, padded(d), false);
  for (std::int64_t i = 0; i < N; ++i) {
    const float inverse = p.saved.rms_inverse[i];
    const float* coef = p.saved.coef + i * C;
    float* grad = grad_coef + i * C;
    Floats along = {};
    for (std::int64_t s = 0; s < C; s += kLanes) {
      const Floats of_coef = load(grad + s) * inverse;
      store(grad + s, of_coef);
      along += of_coef * load(coef + s);
    }
    // Negative: what the norm takes off.
    copy_scaled(coef, pulled + i * C, C, -lane_sum<kLanes>(along) * inverse * inverse / float(d));
  }
  all_products(N, padded(S), {pulled, C, 1}, gram, C, grad_coef, C, S, true);
  all_products(size.own, padded(S), {pulled, 1, C}, p.saved.coef, C, gram, C, N, false);
  all_products(size.own, padded(d), {gram, C, 1}, centred, D, grad_span, D, S, true);
  centre_rows(p, grad_span);
}

struct CombinedBackwardScratch {
  float* grad;  // (N, d)
  CombinedBackwardScratch(Arena& arena, const FirstLayerSizes& size)
      : grad(arena.take<float>(size.length * size.hidden_row)) {}
};

// Adds to the gradients of coef and span what comes along the residual: x = coef span.
inline void combined_backward(const FirstLayerPass& p, float* grad_coef, float* grad_span) {
  const FirstLayerSizes& size = p.size;
  const std::int64_t N = size.length, d = size.hidden;
  const std::int64_t C = size.coef_row, D = size.hidden_row;
  const Scratch<CombinedBackwardScratch> scratch(size);
  float* grad = scratch->grad;
  clear(grad, N * D);
  copy_rows(p.text.grad, d, grad, D, N, d);
  against_span(p, N, padded(d), grad, p.saved.span, p.model.front.fixed, D, grad_coef, true);
  all_products(size.own, padded(d), {p.saved.coef, 1, C}, grad, D, grad_span, D, N, true);
}

struct ScanScratch {
  PairLogits logits;
  ScanScratch(Arena& arena, const FirstLayerSizes& size)
      : logits{{arena.take<float>(size.length * size.head_row),
                arena.take<float>(size.length * size.head_row)},
               arena.take<float>(size.front * size.length * size.head_row)} {}
};

inline void first_layer_forward(const FirstLayerText& call) {
  const FirstLayerPass p(call);
  const Scratch<ScanScratch> scan(p.size);
  span_of_pair(p);
  distance_logits(p, scan->logits);
  if (p.size.front > 0)
    scan_behind_prefix(p.size, scan->logits, p.saved);
  else
    affine_scan(p.size, scan->logits.pair[0], scan->logits.pair[1], p.saved);
  affine_mlp(p);
}

struct FirstLayerGradients {
  float *coef, *span;  // (N, S), (own, d)
  FirstLayerGradients(Arena& arena, const FirstLayerSizes& size)
      : coef(arena.take<float>(size.length * size.coef_row)),
        span(arena.take<float>(size.own * size.hidden_row)) {}
};

inline void first_layer_backward(const FirstLayerText& call) {
  const FirstLayerPass p(call);
  const Scratch<FirstLayerGradients> grad(p.size);
  const Scratch<ScanScratch> scan(p.size);
  affine_mlp_backward(p, grad->coef, grad->span);
  affine_norm_backward(p, grad->coef, grad->span);
  combined_backward(p, grad->coef, grad->span);
  if (p.size.front > 0)
    scan_behind_prefix_backward(p.size, p.saved, grad->coef, scan->logits);
  else
    affine_scan_backward(p.size, p.saved, grad->coef, scan->logits.pair[0], scan->logits.pair[1]);
  span_of_pair_backward(p, grad->span, scan->logits);
}

PROTOTOK_TARGET_END
