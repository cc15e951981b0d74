// The attention of attention.h in bf16, its products in pairs by the instruction for them: twice the
// rate of fp32. Weights and slopes are rounded to bf16 as any bf16 attention rounds them; sums are
// fp32.
// Letters: N positions, T = F + N with those in front, P = T rounded up to vectors, c head size, C = c
// rounded up to vectors of words, E = c rounded up to vectors of pairs.
#pragma once

#include "ops/attention.h"
#include "ops/rotary.h"
#include "ops/row_kernels.h"
#include "ops/softmax.h"
#include "products/pairs.h"
#include "products/tile.h"
#include "simd/arena.h"
#include "simd/exp.h"
#include "simd/target.h"
#include "simd/vectors.h"

#include <cstdint>

PROTOTOK_TARGET_BEGIN

constexpr std::int64_t kPairRows = TileShape<Pair>::kRows;

struct PairAttentionScratch {
  bf16* rows;                // (P, E): keys, later a tile of queries
  Pair *keys_t, *values;     // (E / 2, P), (P / 2, C)
  bf16* weights;             // (kPairRows, P)
  float *logits, *mixed;     // (kPairRows, P), (kPairRows, C)
  PairAttentionScratch(Arena& arena, const AttentionSizes& n) {
    const std::int64_t E = pairs_padded(n.c);
    rows = arena.take<bf16>(n.P * E);
    keys_t = arena.take<Pair>(E / 2 * n.P);
    values = arena.take<Pair>(n.P / 2 * n.C);
    weights = arena.take<bf16>(kPairRows * n.P);
    logits = arena.take<float>(kPairRows * n.P);
    mixed = arena.take<float>(kPairRows * n.C);
  }
};

struct PairAttentionBackwardScratch {
  bf16* rows;                            // (P, E): keys, later values
  Pair *keys, *keys_t, *values_t;        // (P / 2, C), (E / 2, P), (E / 2, P)
  float *grad_keys, *grad_values;        // (P, C)
  bf16 *query_rows, *grad_rows;          // (kQueryBlock, E)
  Pair *queries, *grads;                 // (kQueryBlock / 2, C)
  Pair *weights, *slopes;                // (kQueryBlock / 2, P)
  bf16* slope_rows;                      // (kPairRows, P)
  float *powers, *grad_weights;          // (kPairRows, P)
  float* grad_queries;                   // (kPairRows, C)
  PairAttentionBackwardScratch(Arena& arena, const AttentionSizes& n) {
    const std::int64_t E = pairs_padded(n.c);
    rows = arena.take<bf16>(n.P * E);
    keys = arena.take<Pair>(n.P / 2 * n.C);
    keys_t = arena.take<Pair>(E / 2 * n.P);
    values_t = arena.take<Pair>(E / 2 * n.P);
    grad_keys = arena.take<float>(n.P * n.C);
    grad_values = arena.take<float>(n.P * n.C);
    query_rows = arena.take<bf16>(kQueryBlock * E);
    grad_rows = arena.take<bf16>(kQueryBlock * E);
    queries = arena.take<Pair>(kQueryBlock / 2 * n.C);
    grads = arena.take<Pair>(kQueryBlock / 2 * n.C);
    weights = arena.take<Pair>(kQueryBlock / 2 * n.P);
    slopes = arena.take<Pair>(kQueryBlock / 2 * n.P);
    slope_rows = arena.take<bf16>(kPairRows * n.P);
    powers = arena.take<float>(kPairRows * n.P);
    grad_weights = arena.take<float>(kPairRows * n.P);
    grad_queries = arena.take<float>(kPairRows * n.C);
  }
};

inline void attention_heads_in_pairs(const AttentionShape& shape, const bf16* qkv, bf16* out,
                                     std::int64_t kv_head) {
  const AttentionSizes n(shape, kv_head);
  const std::int64_t N = n.N, F = n.F, T = n.T, c = n.c, P = n.P, C = n.C, E = pairs_padded(c);
  const std::int64_t depth = (c + 1) / 2;
  const Front<bf16> front(shape, kv_head);
  const Scratch<PairAttentionScratch> scratch(n);
  const auto [rows, keys_t, values, weights, logits, mixed] = *scratch;
  float inverse[kPairRows];

  clear(rows, P * E);
  copy_rows(front.keys, c, rows, E, F, c);
  rotate_rows(qkv + n.keys, n.width, rows + F * E, E, N, c, shape.table(), 0, 1.0f, 1.0f);
  transpose_pairs(rows, keys_t, E, P);
  const auto value = [&](std::int64_t j) -> const bf16* {
    if (j >= T) return nullptr;
    return j < F ? front.values + j * c : qkv + (j - F) * n.width + n.values;
  };
  for (std::int64_t j = 0; j < T; j += 2) interleave(value(j), value(j + 1), values + j / 2 * C, c);
  clear(values + (T + 1) / 2 * C, (P / 2 - (T + 1) / 2) * C);

  bf16* queries = rows;
  for (std::int64_t head = kv_head * n.group; head < (kv_head + 1) * n.group; ++head)
    for (std::int64_t begin = shape.first; begin < N; begin += kPairRows) {
      const std::int64_t tile = least(kPairRows, N - begin), seen = F + begin + tile;
      const std::int64_t columns = padded(seen);
      rotate_rows(qkv + begin * n.width + head * c, n.width, queries, E, tile, c, shape.table(),
                  begin, 1.0f, shape.scaling * kLog2e);
      product(tile, columns, {pairs(queries), E / 2, 1}, keys_t, P, logits, P, depth, false);
      for (std::int64_t i = 0; i < tile; ++i)
        inverse[i] = softmax_row(logits + i * P, weights + i * P, lowest(shape, F + begin + i),
                                 F + begin + i, columns);
      product(tile, C, {pairs(weights), P / 2, 1}, values, C, mixed, C, (seen + 1) / 2, false);
      for (std::int64_t i = 0; i < tile; ++i)
        copy_scaled(mixed + i * C, out + (begin + i) * n.out_width + head * c, c, inverse[i]);
    }
}

// The weights p and the slopes ds of two queries, from exponentials, their sums' inverses and dp, in
// rows P apart: interleaved, and ds in rows as well.
inline void slopes_of_pair(const float* powers, const float* grads, std::int64_t P,
                           const float inverse[2], Pair* weights, Pair* slopes, bf16* slope_rows,
                           std::int64_t columns) {
  Floats sum[2] = {};
  for (std::int64_t j = 0; j < columns; j += kLanes)
    for (int r = 0; r < 2; ++r) sum[r] += load(powers + r * P + j) * load(grads + r * P + j);
  float mean[2];
  for (int r = 0; r < 2; ++r) mean[r] = lane_sum<kLanes>(sum[r]) * inverse[r];
  for (std::int64_t j = 0; j < columns; j += kLanes) {
    __m512i p[2], ds[2];
    for (int r = 0; r < 2; ++r) {
      const Floats weight = load(powers + r * P + j) * inverse[r];
      const Floats slope = weight * (load(grads + r * P + j) - mean[r]);
      const __m256i narrow_slope = (__m256i)_mm512_cvtneps_pbh((__m512)slope);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(slope_rows + r * P + j), narrow_slope);
      ds[r] = _mm512_cvtepu16_epi32(narrow_slope);
      p[r] = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)weight));
    }
    _mm512_storeu_si512(weights + j, _mm512_or_si512(p[0], _mm512_slli_epi32(p[1], 16)));
    _mm512_storeu_si512(slopes + j, _mm512_or_si512(ds[0], _mm512_slli_epi32(ds[1], 16)));
  }
}

// Takes the mean of rows, E apart, off each of them.
inline void take_off_mean(bf16* rows, std::int64_t count, std::int64_t E) {
  for (std::int64_t x = 0; x < E; x += kLanes) {
    Floats sum = {};
    for (std::int64_t j = 0; j < count; ++j) sum += load(rows + j * E + x);
    const Floats mean = sum / float(count);
    for (std::int64_t j = 0; j < count; ++j)
      store(rows + j * E + x, load(rows + j * E + x) - mean);
  }
}

// A block of queries of one head: their rows, their gradients' and both interleaved, up to an even
// number of them with zeros, which add nothing.
inline std::int64_t lay_out_queries(const AttentionShape& shape, const AttentionSizes& n,
                                    const bf16* qkv, const bf16* grad_out, std::int64_t begin,
                                    std::int64_t count, const PairAttentionBackwardScratch& s) {
  const std::int64_t E = pairs_padded(n.c), even = count + count % 2;
  rotate_rows(qkv + begin * n.width, n.width, s.query_rows, E, count, n.c, shape.table(), begin,
              1.0f, shape.scaling * kLog2e);
  copy_rows(grad_out + begin * n.out_width, n.out_width, s.grad_rows, E, count, n.c);
  clear(s.query_rows + count * E, (even - count) * E);
  clear(s.grad_rows + count * E, (even - count) * E);
  for (std::int64_t i = 0; i < even; i += 2) {
    interleave(s.query_rows + i * E, s.query_rows + (i + 1) * E, s.queries + i / 2 * n.C, n.c);
    interleave(s.grad_rows + i * E, s.grad_rows + (i + 1) * E, s.grads + i / 2 * n.C, n.c);
  }
  return even;
}

// attention_backward_heads, with the formulas that stand there.
inline void attention_backward_heads_in_pairs(const AttentionShape& shape, const bf16* qkv,
                                              const bf16* grad_out, bf16* grad_qkv,
                                              std::int64_t kv_head) {
  const AttentionSizes n(shape, kv_head);
  const std::int64_t N = n.N, F = n.F, c = n.c, P = n.P, C = n.C, E = pairs_padded(c);
  const std::int64_t depth = (c + 1) / 2;
  const Front<bf16> front(shape, kv_head);
  const Scratch<PairAttentionBackwardScratch> scratch(n);
  const PairAttentionBackwardScratch s = *scratch;

  clear(s.rows, P * E);
  clear(s.query_rows, kQueryBlock * E);
  clear(s.grad_rows, kQueryBlock * E);
  clear(s.grad_keys, P * C);
  clear(s.grad_values, P * C);
  copy_rows(front.keys, c, s.rows, E, F, c);
  rotate_rows(qkv + n.keys, n.width, s.rows + F * E, E, N, c, shape.table(), 0, 1.0f, 1.0f);
  transpose_pairs(s.rows, s.keys_t, E, P);
  // The gradient of a query, sum_j ds_j k_j, where the ds_j sum to zero: taken from their mean, keys
  // that are alike and large do not show what rounding takes off the ds_j.
  take_off_mean(s.rows, n.T, E);
  for (std::int64_t j = 0; j < P; j += 2)
    interleave(s.rows + j * E, s.rows + (j + 1) * E, s.keys + j / 2 * C, c);
  copy_rows(front.values, c, s.rows, E, F, c);
  copy_rows(qkv + n.values, n.width, s.rows + F * E, E, N, c);
  transpose_pairs(s.rows, s.values_t, E, P);

  for (std::int64_t head = kv_head * n.group; head < (kv_head + 1) * n.group; ++head)
    for (std::int64_t begin = 0; begin < N; begin += kQueryBlock) {
      const std::int64_t count = least(kQueryBlock, N - begin);
      const std::int64_t even = lay_out_queries(shape, n, qkv + head * c, grad_out + head * c,
                                                begin, count, s);
      for (std::int64_t i = 0; i < even; i += kPairRows) {
        const std::int64_t tile = least(kPairRows, even - i);
        const std::int64_t seen = F + begin + i + tile, columns = padded(seen);
        product(tile, columns, {pairs(s.query_rows + i * E), E / 2, 1}, s.keys_t, P, s.powers, P,
                depth, false);
        product(tile, columns, {pairs(s.grad_rows + i * E), E / 2, 1}, s.values_t, P,
                s.grad_weights, P, depth, false);
        for (std::int64_t r = 0; r < tile; r += 2) {
          float inverse[2];
          for (std::int64_t k = 0; k < 2; ++k) {
            const std::int64_t query = F + begin + i + r + k;
            float* row = s.powers + (r + k) * P;
            inverse[k] = softmax_row(row, row, lowest(shape, query), query, columns);
          }
          slopes_of_pair(s.powers + r * P, s.grad_weights + r * P, P, inverse,
                         s.weights + (i + r) / 2 * P, s.slopes + (i + r) / 2 * P,
                         s.slope_rows + r * P, columns);
        }
        product(tile, C, {pairs(s.slope_rows), P / 2, 1}, s.keys, C, s.grad_queries, C,
                (seen + 1) / 2, false);
        rotate_rows(s.grad_queries, C, grad_qkv + (begin + i) * n.width + head * c, n.width,
                    least(tile, count - i), c, shape.table(), begin + i, -1.0f, shape.scaling);
      }
      // Tiles of keys end where those of queries do: beyond the columns of its own tile a query has
      // no weights, not even zeros.
      for (std::int64_t j = 0, tile; j < begin + even; j += tile) {
        tile = least(kPairRows, (j < begin ? begin : begin + even) - j);
        const std::int64_t skip = j > begin ? (j - begin) / 2 : 0;  // pairs that do not see key j
        const std::int64_t from = skip * P + F + j;
        product(tile, C, {s.slopes + from, 1, P}, s.queries + skip * C, C, s.grad_keys + j * C, C,
                even / 2 - skip, true);
        product(tile, C, {s.weights + from, 1, P}, s.grads + skip * C, C, s.grad_values + j * C, C,
                even / 2 - skip, true);
      }
    }
  // The queries were scaled by log2 e for the exponentials.
  rotate_rows(s.grad_keys, C, grad_qkv + n.keys, n.width, N, c, shape.table(), 0, -1.0f,
              1.0f / kLog2e);
  copy_rows(s.grad_values, C, grad_qkv + n.values, n.width, N, c);
}

PROTOTOK_TARGET_END
