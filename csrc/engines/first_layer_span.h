// What the first block makes of e and m alone, each weight read once: q, k and v, and the vectors
// that span its output; and the gradients of e and m from theirs. first_layer.py has the same in
// torch.
#pragma once

#include "engines/first_layer.h"
#include "engines/first_layer_scan.h"
#include "ops/norm.h"
#include "ops/rotary.h"
#include "products/packed_tile.h"
#include "products/tile.h"
#include "simd/arena.h"
#include "simd/exp.h"
#include "simd/target.h"
#include "simd/vectors.h"

#include <cstdint>

PROTOTOK_TARGET_BEGIN

// A text with its sizes and the memory that both directions share. Of the two vectors m is number 0.
struct FirstLayerPass {
  const FirstLayerModel& model;
  const FirstLayerProducts& products;
  const FirstLayerTexts& text;
  FirstLayerSizes size;
  FirstLayerSaved saved;

  explicit FirstLayerPass(const FirstLayerText& call)
      : model(call.model),
        products(call.products),
        text(call.text),
        size(call.model, call.length),
        saved(saved_of(call.text, size)) {}

  const float* vector(int index) const { return index == 0 ? text.m : text.e; }
  float* grad_vector(int index) const { return index == 0 ? text.grad_m : text.grad_e; }
  float* qkv(int index) const { return saved.qkv + index * size.stacked_row; }
  // Where k and v of the key-value head of query head h begin among those of all heads.
  std::int64_t kv(std::int64_t h) const {
    return h / (model.heads / model.kv_heads) * model.head_size;
  }
  // Where keys and values begin in a stacked product.
  std::int64_t keys() const { return model.heads * model.head_size; }
  std::int64_t values() const { return (model.heads + model.kv_heads) * model.head_size; }

 private:
  static FirstLayerSaved saved_of(const FirstLayerTexts& text, const FirstLayerSizes& size) {
    Arena arena(reinterpret_cast<unsigned char*>(text.saved), bytes_of<FirstLayerSaved>(size));
    return {arena, size};
  }
};

inline void add_row(float* to, const bf16* row, std::int64_t count) {
  if (row == nullptr) return;
  for (std::int64_t t = 0; t < count; t += kLanes)
    store_some(to + t, count - t, load_some(to + t, count - t) + load_some(row + t, count - t));
}

// One query or key of two vectors as the logits take it: normed where the model does that, a key
// also turned by row 0 of the tables, which is where a scaled rotary embedding keeps its factor.
// Returns what the norm multiplied with.
inline float prepared_head(const FirstLayerPass& p, const float* from, const bf16* norm, bool turned,
                           float* to) {
  const std::int64_t c = p.model.head_size;
  NormStatistics statistics{0.0f, 1.0f};
  if (norm == nullptr) {
    copy_scaled(from, to, c, 1.0f);
  } else {
    statistics = norm_statistics(from, c, false, p.model.eps);
    normalize_row<float, bf16>(from, statistics, norm, nullptr, to, c);
  }
  if (turned) rotate_head(to, to, c, p.text.table(), 0, 1.0f, 1.0f);
  return statistics.inverse;
}

// Adds to grad_from what `grad`, of prepared_head's result, says of `from`; overwrites `grad`.
inline void prepared_head_backward(const FirstLayerPass& p, const float* from, const bf16* norm,
                                   bool turned, float inverse, float* grad, float* grad_from) {
  const std::int64_t c = p.model.head_size;
  if (turned) rotate_head(grad, grad, c, p.text.table(), 0, -1.0f, 1.0f);
  if (norm != nullptr)
    return add_norm_gradient(grad, from, norm, grad_from, c, {0.0f, inverse}, false);
  for (std::int64_t t = 0; t < c; t += kLanes)
    store_some(grad_from + t, c - t, load_some(grad_from + t, c - t) + load_some(grad + t, c - t));
}

// The queries of m and the keys of both vectors, prepared, and what their norms multiplied with.
struct PreparedHeads {
  float *queries, *keys[2];  // (H, c), (K, c)
  float *query_inverses, *key_inverses[2];

  PreparedHeads(Arena& arena, const FirstLayerSizes& size)
      : queries(arena.take<float>(size.mixed_row)),
        keys{arena.take<float>(size.mixed_row), arena.take<float>(size.mixed_row)},
        query_inverses(arena.take<float>(size.head_row)),
        key_inverses{arena.take<float>(size.head_row), arena.take<float>(size.head_row)} {}
};

inline void prepare_heads(const FirstLayerPass& p, const PreparedHeads& heads) {
  const FirstLayerModel& model = p.model;
  const std::int64_t c = model.head_size;
  for (std::int64_t h = 0; h < model.heads; ++h)
    heads.query_inverses[h] =
        prepared_head(p, p.qkv(0) + h * c, model.q_norm, false, heads.queries + h * c);
  for (int vector = 0; vector < 2; ++vector)
    for (std::int64_t k = 0; k < model.kv_heads; ++k)
      heads.key_inverses[vector][k] =
          prepared_head(p, p.qkv(vector) + p.keys() + k * c, model.k_norm, true,
                        heads.keys[vector] + k * c);
}

struct SpanScratch {
  bf16 *x, *normed;  // (2, d)
  bf16* mixed;       // (2, H c), later one head
  SpanScratch(Arena& arena, const FirstLayerSizes& size)
      : x(arena.take<bf16>(2 * size.hidden)),
        normed(arena.take<bf16>(2 * size.hidden)),
        mixed(arena.take<bf16>(2 * size.mixed)) {}
};

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
  packed_sum({normed, p.products.qkv.data(), saved.qkv, nullptr, 2, d, d, size.stacked});
  for (int vector = 0; vector < 2; ++vector) {
    add_row(p.qkv(vector), model.qkv_bias, size.stacked);
    for (std::int64_t h = 0; h < size.heads; ++h)
      copy_scaled(p.qkv(vector) + p.values() + p.kv(h), mixed + vector * size.mixed + h * c, c,
                  1.0f);
  }
  const bf16* out = p.products.out.data();
  packed_sum({mixed, out, saved.span, nullptr, 2, size.mixed, size.mixed, d});
  for (int vector = 0; vector < 2; ++vector) {
    add_row(saved.span + vector * D, x + vector * d, d);
    add_row(saved.span + vector * D, model.out_bias, d);
  }
  for (std::int64_t h = 0; h < size.heads; ++h) {
    const std::int64_t value = p.values() + p.kv(h);
    for (std::int64_t t = 0; t < c; ++t)
      store_one(mixed + t, p.qkv(1)[value + t] - p.qkv(0)[value + t]);
    packed_sum({mixed, out + h * c * kPanel, saved.span + (2 + h) * D, nullptr, 1, c, size.mixed,
                d});
  }
}

struct LogitsScratch {
  float *table, *features;  // (N, T), (H, T)
  LogitsScratch(Arena& arena, const FirstLayerSizes& size)
      : table(arena.take<float>(size.length * size.table_row)),
        features(arena.take<float>(size.heads * size.table_row)) {}
};

// a and b of affine_scan, each (N, H).
inline void distance_logits(const FirstLayerPass& p, float* const logits[2]) {
  const FirstLayerSizes& size = p.size;
  const std::int64_t c = p.model.head_size, T = size.table_row;
  const Scratch<LogitsScratch> scratch(size);
  const Scratch<PreparedHeads> heads(size);
  const auto [table, features] = *scratch;
  distance_table(size, p.text.table(), table);
  prepare_heads(p, *heads);
  clear(features, size.heads * T);
  for (int vector = 0; vector < 2; ++vector) {
    for (std::int64_t h = 0; h < size.heads; ++h)
      head_feature(heads->queries + h * c, heads->keys[vector] + p.kv(h), c, p.text.rotary / 2,
                   p.model.scaling * kLog2e, features + h * T);
    clear(logits[vector], size.length * size.head_row);
    all_dots(size.length, table, T, size.heads, features, T, logits[vector], size.head_row, T,
             false);
  }
}

struct LogitsBackwardScratch {
  float *table, *features;        // (N, T), (H, T)
  float *grad_queries, *grad_keys;  // (H, c), (K, c)
  LogitsBackwardScratch(Arena& arena, const FirstLayerSizes& size)
      : table(arena.take<float>(size.length * size.table_row)),
        features(arena.take<float>(size.heads * size.table_row)),
        grad_queries(arena.take<float>(size.mixed_row)),
        grad_keys(arena.take<float>(size.mixed_row)) {}
};

// Adds to grad_qkv (2, Q) what the gradients of the logits, in nats, say of q and k.
inline void distance_logits_backward(const FirstLayerPass& p, float* const grad_logits[2],
                                     float* grad_qkv) {
  const FirstLayerModel& model = p.model;
  const FirstLayerSizes& size = p.size;
  const std::int64_t c = model.head_size, H = size.heads, T = size.table_row;
  const Scratch<LogitsBackwardScratch> scratch(size);
  const Scratch<PreparedHeads> heads(size);
  const auto [table, features, grad_queries, grad_keys] = *scratch;
  distance_table(size, p.text.table(), table);
  prepare_heads(p, *heads);
  clear(grad_queries, size.mixed_row);
  for (int vector = 0; vector < 2; ++vector) {
    all_products(H, T, {grad_logits[vector], 1, size.head_row}, table, T, features, T, size.length,
                 false);
    clear(grad_keys, size.mixed_row);
    for (std::int64_t h = 0; h < H; ++h)
      head_feature_backward(features + h * T, heads->queries + h * c,
                            heads->keys[vector] + p.kv(h), c, p.text.rotary / 2, model.scaling,
                            grad_queries + h * c, grad_keys + p.kv(h));
    for (std::int64_t k = 0; k < model.kv_heads; ++k) {
      const std::int64_t key = p.keys() + k * c;
      prepared_head_backward(p, p.qkv(vector) + key, model.k_norm, true,
                             heads->key_inverses[vector][k], grad_keys + k * c,
                             grad_qkv + vector * size.stacked_row + key);
    }
  }
  for (std::int64_t h = 0; h < H; ++h)
    prepared_head_backward(p, p.qkv(0) + h * c, model.q_norm, false, heads->query_inverses[h],
                           grad_queries + h * c, grad_qkv + h * c);
}

struct SpanBackwardScratch {
  bf16* narrow;        // (S, d), later one vector
  float* grad_mixed;   // (S, H c)
  float* grad_qkv;     // (2, Q)
  bf16* narrow_qkv;    // (2, Q)
  float* grad_normed;  // (2, d)
  SpanBackwardScratch(Arena& arena, const FirstLayerSizes& size)
      : narrow(arena.take<bf16>(size.span * size.hidden)),
        grad_mixed(arena.take<float>(size.span * size.mixed_row)),
        grad_qkv(arena.take<float>(2 * size.stacked_row)),
        narrow_qkv(arena.take<bf16>(2 * size.stacked)),
        grad_normed(arena.take<float>(2 * size.hidden_row)) {}
};

// The gradients of e and m from those of the spanning vectors (S, d) and of the logits.
inline void span_of_pair_backward(const FirstLayerPass& p, const float* grad_span,
                                  float* const grad_logits[2]) {
  const FirstLayerModel& model = p.model;
  const FirstLayerSizes& size = p.size;
  const std::int64_t d = size.hidden, D = size.hidden_row, c = model.head_size;
  const Scratch<SpanBackwardScratch> scratch(size);
  const auto [narrow, grad_mixed, grad_qkv, narrow_qkv, grad_normed] = *scratch;
  clear(grad_qkv, 2 * size.stacked_row);
  copy_rows(grad_span, D, narrow, d, size.span, d);
  packed_sum({narrow, p.products.out.data(), grad_mixed, nullptr, size.span, d, d, size.mixed});
  float *of_m = grad_qkv + p.values(), *of_e = of_m + size.stacked_row;
  for (std::int64_t h = 0; h < size.heads; ++h)
    for (std::int64_t t = 0; t < c; ++t) {
      const float* grad = grad_mixed + h * c + t;
      const float of_difference = grad[(2 + h) * size.mixed_row];
      of_m[p.kv(h) + t] += grad[0] - of_difference;
      of_e[p.kv(h) + t] += grad[size.mixed_row] + of_difference;
    }
  distance_logits_backward(p, grad_logits, grad_qkv);
  copy_rows(grad_qkv, size.stacked_row, narrow_qkv, size.stacked, 2, size.stacked);
  packed_sum({narrow_qkv, p.products.qkv.data(), grad_normed, nullptr, 2, size.stacked,
              size.stacked, d});
  for (int vector = 0; vector < 2; ++vector) {
    // The norm read the vector as it was rounded.
    copy_scaled(p.vector(vector), narrow, d, 1.0f);
    copy_scaled(grad_span + vector * D, p.grad_vector(vector), d, 1.0f);
    add_norm_gradient(grad_normed + vector * D, narrow, model.input_norm, p.grad_vector(vector), d,
                      p.saved.statistics[vector], model.centred);
  }
}

PROTOTOK_TARGET_END
