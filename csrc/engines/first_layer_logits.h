// The logits of the two vectors' queries against their keys and those of a prefix, each by one
// product with a table of angles, and the way back to the stacked product of q, k and v. scan.py
// has the same in torch.
#pragma once

#include "engines/first_layer_pass.h"
#include "engines/first_layer_scan.h"
#include "ops/norm.h"
#include "ops/rotary.h"
#include "products/tile.h"
#include "simd/arena.h"
#include "simd/exp.h"
#include "simd/target.h"
#include "simd/vectors.h"

#include <cstdint>

PROTOTOK_TARGET_BEGIN

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

// Queries and keys of the two vectors, prepared, and what their norms multiplied with. The query of e
// sees a key that is not its own only behind a prefix.
struct PreparedHeads {
  float *queries[2], *keys[2];  // (H, c), (K, c)
  float *query_inverses[2], *key_inverses[2];

  PreparedHeads(Arena& arena, const FirstLayerSizes& size)
      : queries{arena.take<float>(size.mixed_row), arena.take<float>(size.mixed_row)},
        keys{arena.take<float>(size.mixed_row), arena.take<float>(size.mixed_row)},
        query_inverses{arena.take<float>(size.head_row), arena.take<float>(size.head_row)},
        key_inverses{arena.take<float>(size.head_row), arena.take<float>(size.head_row)} {}
};

// Vectors whose queries are wanted.
inline int asking(const FirstLayerPass& p) { return p.size.front > 0 ? 2 : 1; }

inline void prepare_heads(const FirstLayerPass& p, const PreparedHeads& heads) {
  const FirstLayerModel& model = p.model;
  const std::int64_t c = model.head_size;
  for (int vector = 0; vector < asking(p); ++vector)
    for (std::int64_t h = 0; h < model.heads; ++h)
      heads.query_inverses[vector][h] =
          prepared_head(p, p.qkv(vector) + h * c, model.q_norm, false,
                        heads.queries[vector] + h * c);
  for (int vector = 0; vector < 2; ++vector)
    for (std::int64_t k = 0; k < model.kv_heads; ++k)
      heads.key_inverses[vector][k] =
          prepared_head(p, p.qkv(vector) + p.keys() + k * c, model.k_norm, true,
                        heads.keys[vector] + k * c);
}

// A product of the table with the features of all heads: logits of one query a head against one key.
inline void logits_by_table(const FirstLayerPass& p, std::int64_t rows, const float* table,
                            const float* queries, const float* keys, float* features,
                            float* logits) {
  const std::int64_t c = p.model.head_size, T = p.size.table_row;
  for (std::int64_t h = 0; h < p.size.heads; ++h)
    head_feature(queries + h * c, keys + p.kv(h), c, p.text.rotary / 2,
                 p.model.scaling * kLog2e, features + h * T);
  all_dots(rows, table, T, p.size.heads, features, T, logits, p.size.head_row, T, false);
}

// Adds to the gradients of queries and keys what those of `rows` logits, in nats, say.
inline void logits_by_table_backward(const FirstLayerPass& p, std::int64_t rows,
                                     const float* table, const float* grad, const float* queries,
                                     const float* keys, float* features, float* grad_queries,
                                     float* grad_keys) {
  const std::int64_t c = p.model.head_size, H = p.size.heads, T = p.size.table_row;
  all_products(H, T, {grad, 1, p.size.head_row}, table, T, features, T, rows, false);
  for (std::int64_t h = 0; h < H; ++h)
    head_feature_backward(features + h * T, queries + h * c, keys + p.kv(h), c, p.text.rotary / 2,
                          p.model.scaling, grad_queries + h * c, grad_keys + p.kv(h));
}

// The keys (K, c) of vector j of the prefix.
inline const float* prefix_keys(const FirstLayerPass& p, std::int64_t j) {
  return p.model.front.keys + j * p.model.kv_heads * p.model.head_size;
}

struct LogitsScratch {
  float *table, *features;  // (N, T), (H, T)
  LogitsScratch(Arena& arena, const FirstLayerSizes& size)
      : table(arena.take<float>(size.length * size.table_row)),
        features(arena.take<float>(size.heads * size.table_row)) {}
};

inline void distance_logits(const FirstLayerPass& p, const PairLogits& logits) {
  const FirstLayerSizes& size = p.size;
  const std::int64_t T = size.table_row, of_one = size.length * size.head_row;
  const Scratch<LogitsScratch> scratch(size);
  const Scratch<PreparedHeads> heads(size);
  const auto [table, features] = *scratch;
  distance_table(size, p.text.table(), table);
  prepare_heads(p, *heads);
  clear(features, size.heads * T);
  for (int vector = 0; vector < 2; ++vector) {
    clear(logits.pair[vector], of_one);
    logits_by_table(p, size.length, table, heads->queries[0], heads->keys[vector], features,
                    logits.pair[vector]);
  }
  if (size.front == 0) return;
  logits_by_table(p, 1, table, heads->queries[1], heads->keys[1], features, logits.pair[1]);
  distance_table(size, p.text.table(size.front), table);
  clear(logits.prefix, size.front * of_one);
  for (std::int64_t j = 0; j < size.front; ++j)
    for (int vector = 0; vector < 2; ++vector)  // e stands at the first position, over m's logits
      logits_by_table(p, vector == 0 ? size.length : 1, table, heads->queries[vector],
                      prefix_keys(p, j), features, logits.prefix + j * of_one);
}

struct LogitsBackwardScratch {
  float *table, *features;              // (N, T), (H, T)
  float *grad_queries[2], *grad_keys;   // (H, c), (K, c)
  LogitsBackwardScratch(Arena& arena, const FirstLayerSizes& size)
      : table(arena.take<float>(size.length * size.table_row)),
        features(arena.take<float>(size.heads * size.table_row)),
        grad_queries{arena.take<float>(size.mixed_row), arena.take<float>(size.mixed_row)},
        grad_keys(arena.take<float>(size.mixed_row)) {}
};

// Adds to grad_qkv (2, Q) what the gradients of the logits, in nats, say of q and k.
inline void distance_logits_backward(const FirstLayerPass& p, const PairLogits& grad,
                                     float* grad_qkv) {
  const FirstLayerModel& model = p.model;
  const FirstLayerSizes& size = p.size;
  const std::int64_t c = model.head_size, N = size.length, T = size.table_row, G = size.head_row;
  const Scratch<LogitsBackwardScratch> scratch(size);
  const Scratch<PreparedHeads> heads(size);
  float *table = scratch->table, *features = scratch->features, *grad_keys = scratch->grad_keys;
  float* const grad_queries[2] = {scratch->grad_queries[0], scratch->grad_queries[1]};
  distance_table(size, p.text.table(), table);
  prepare_heads(p, *heads);
  for (int vector = 0; vector < asking(p); ++vector) clear(grad_queries[vector], size.mixed_row);
  for (int vector = 0; vector < 2; ++vector) {
    clear(grad_keys, size.mixed_row);
    // Behind a prefix the first of e's logits is of its own query.
    const std::int64_t first = vector == 1 && size.front > 0 ? 1 : 0;
    logits_by_table_backward(p, N - first, table + first * T, grad.pair[vector] + first * G,
                             heads->queries[0], heads->keys[vector], features, grad_queries[0],
                             grad_keys);
    if (first == 1)
      logits_by_table_backward(p, 1, table, grad.pair[1], heads->queries[1], heads->keys[1],
                               features, grad_queries[1], grad_keys);
    for (std::int64_t k = 0; k < model.kv_heads; ++k) {
      const std::int64_t key = p.keys() + k * c;
      prepared_head_backward(p, p.qkv(vector) + key, model.k_norm, true,
                             heads->key_inverses[vector][k], grad_keys + k * c,
                             grad_qkv + vector * size.stacked_row + key);
    }
  }
  if (size.front > 0) distance_table(size, p.text.table(size.front), table);
  for (std::int64_t j = 0; j < size.front; ++j) {
    const float* of_e = grad.prefix + j * N * G;
    const float* keys = prefix_keys(p, j);  // constants: nobody reads their gradients
    logits_by_table_backward(p, 1, table, of_e, heads->queries[1], keys, features, grad_queries[1],
                             grad_keys);
    logits_by_table_backward(p, N - 1, table + T, of_e + G, heads->queries[0], keys, features,
                             grad_queries[0], grad_keys);
  }
  for (int vector = 0; vector < asking(p); ++vector)
    for (std::int64_t h = 0; h < size.heads; ++h)
      prepared_head_backward(p, p.qkv(vector) + h * c, model.q_norm, false,
                             heads->query_inverses[vector][h], grad_queries[vector] + h * c,
                             grad_qkv + vector * size.stacked_row + h * c);
}

PROTOTOK_TARGET_END
