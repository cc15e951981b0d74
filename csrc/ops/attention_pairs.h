// The attention of attention.h in bf16, its products in pairs by the instructions for them: in vectors
// twice the rate of fp32, in tiles far more. Weights and slopes are rounded to bf16 as any bf16
// attention rounds them; sums are fp32.
// Letters: N positions, T = F + N with those in front, P = T rounded up to what products take, c head
// size, C = c rounded up to vectors of 16 words, E = c rounded up to vectors of 16 pairs, R rows of a
// product at most, Q = kQueryBlock.
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

#ifdef PROTOTOK_TILES
#include "products/tiled_pairs.h"
#endif

#include <cstdint>

PROTOTOK_TARGET_BEGIN

#ifdef PROTOTOK_TILES
using PairProducts = PairsInTiles;
#else
using PairProducts = PairsInVectors;
#endif

struct PairAttentionSizes : AttentionSizes {
  static constexpr std::int64_t R = PairProducts::kRows, kPairs = kQueryBlock / 2;
  std::int64_t E;
  PairAttentionSizes(const AttentionShape& shape, std::int64_t kv_head)
      : AttentionSizes(shape, kv_head), E(pairs_padded(shape.size)) {
    P = columns(P);
    C = rounded_up(shape.size, 16);
  }
  static std::int64_t columns(std::int64_t seen) {
    return rounded_up(seen, PairProducts::kColumns);
  }
};

struct PairAttentionScratch {
  bf16* rows;                // (P, E): keys, later a tile of queries
  Pair *keys_t, *values;     // (E / 2, P), (P / 2, C)
  bf16* weights;             // (R, P)
  float *logits, *mixed;     // (R, P), (R, C)
  PairAttentionScratch(Arena& arena, const PairAttentionSizes& n) {
    rows = arena.take<bf16>(n.P * n.E);
    keys_t = arena.take<Pair>(n.E / 2 * n.P);
    values = arena.take<Pair>(n.P / 2 * n.C);
    weights = arena.take<bf16>(n.R * n.P);
    logits = arena.take<float>(n.R * n.P);
    mixed = arena.take<float>(n.R * n.C);
  }
};

struct PairAttentionBackwardScratch {
  bf16* rows;                            // (P, E): keys, later values
  Pair *keys, *keys_t, *values_t;        // (P / 2, C), (E / 2, P), (E / 2, P)
  float *grad_keys, *grad_values;        // (P, C)
  bf16 *query_rows, *grad_rows;          // (Q, E)
  Pair *queries, *grads;                 // (Q / 2, C)
  Pair *weights, *slopes;                // (Q / 2, P)
  Pair* turned;                          // (P, Q / 2): slopes, later weights
  bf16* slope_rows;                      // (R, P)
  float *powers, *grad_weights;          // (R, P)
  float* grad_queries;                   // (R, C)
  PairAttentionBackwardScratch(Arena& arena, const PairAttentionSizes& n) {
    rows = arena.take<bf16>(n.P * n.E);
    keys = arena.take<Pair>(n.P / 2 * n.C);
    keys_t = arena.take<Pair>(n.E / 2 * n.P);
    values_t = arena.take<Pair>(n.E / 2 * n.P);
    grad_keys = arena.take<float>(n.P * n.C);
    grad_values = arena.take<float>(n.P * n.C);
    query_rows = arena.take<bf16>(kQueryBlock * n.E);
    grad_rows = arena.take<bf16>(kQueryBlock * n.E);
    queries = arena.take<Pair>(n.kPairs * n.C);
    grads = arena.take<Pair>(n.kPairs * n.C);
    weights = arena.take<Pair>(n.kPairs * n.P);
    slopes = arena.take<Pair>(n.kPairs * n.P);
    turned = arena.take<Pair>(PairProducts::kOfRows ? n.P * n.kPairs : 0);
    slope_rows = arena.take<bf16>(n.R * n.P);
    powers = arena.take<float>(n.R * n.P);
    grad_weights = arena.take<float>(n.R * n.P);
    grad_queries = arena.take<float>(n.R * n.C);
  }
};

inline void attention_heads_in_pairs(const AttentionShape& shape, const bf16* qkv, bf16* out,
                                     std::int64_t kv_head) {
  const PairAttentionSizes n(shape, kv_head);
  const std::int64_t N = n.N, F = n.F, T = n.T, c = n.c, P = n.P, C = n.C, E = n.E;
  const std::int64_t depth = (c + 1) / 2;
  const Front<bf16> front(shape, kv_head);
  const Scratch<PairAttentionScratch> scratch(n);
  const auto [rows, keys_t, values, weights, logits, mixed] = *scratch;
  float inverse[n.R];
  PairProducts multiply;

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
    for (std::int64_t begin = shape.first; begin < N; begin += n.R) {
      const std::int64_t tile = least(n.R, N - begin), seen = F + begin + tile;
      const std::int64_t columns = n.columns(seen);
      rotate_rows(qkv + begin * n.width + head * c, n.width, queries, E, tile, c, shape.table(),
                  begin, 1.0f, shape.scaling * kLog2e);
      multiply(tile, columns, {pairs(queries), E / 2, 1}, keys_t, P, logits, P, depth, false);
      for (std::int64_t i = 0; i < tile; ++i)
        inverse[i] = softmax_row(logits + i * P, weights + i * P, lowest(shape, F + begin + i),
                                 F + begin + i, columns);
      multiply(tile, C, {pairs(weights), P / 2, 1}, values, C, mixed, C, (seen + 1) / 2, false);
      for (std::int64_t i = 0; i < tile; ++i)
        copy_scaled(mixed + i * C, out + (begin + i) * n.out_width + head * c, c, inverse[i]);
    }
}

// The weights p and the slopes ds of two queries, from exponentials, their sums' inverses and dp, in
// rows P apart: interleaved, and ds in rows as well. Beyond `seen` columns of `columns` all are 0.
inline void slopes_of_pair(const float* powers, const float* grads, std::int64_t P,
                           const float inverse[2], Pair* weights, Pair* slopes, bf16* slope_rows,
                           std::int64_t seen, std::int64_t columns) {
  Floats sum[2] = {};
  for (std::int64_t j = 0; j < seen; j += kLanes)
    for (int r = 0; r < 2; ++r) sum[r] += load(powers + r * P + j) * load(grads + r * P + j);
  float mean[2];
  for (int r = 0; r < 2; ++r) mean[r] = lane_sum<kLanes>(sum[r]) * inverse[r];
  for (std::int64_t j = 0; j < padded(seen); j += kLanes) {
    Words p[2], ds[2];
    for (int r = 0; r < 2; ++r) {
      const Floats weight = load(powers + r * P + j) * inverse[r];
      const Floats slope = weight * (load(grads + r * P + j) - mean[r]);
      store(slope_rows + r * P + j, slope);
      ds[r] = words_of(slope);
      p[r] = words_of(weight);
    }
    store(weights + j, p[0] | p[1] << 16);
    store(slopes + j, ds[0] | ds[1] << 16);
  }
  for (std::int64_t j = padded(seen); j < columns; j += kLanes) {
    for (int r = 0; r < 2; ++r) store(slope_rows + r * P + j, Floats{});
    store(weights + j, Words{});
    store(slopes + j, Words{});
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
// number of them with zeros, which add nothing. So do the zeros in what products read behind them.
inline std::int64_t lay_out_queries(const AttentionShape& shape, const PairAttentionSizes& n,
                                    const bf16* qkv, const bf16* grad_out, std::int64_t begin,
                                    std::int64_t count, const PairAttentionBackwardScratch& s) {
  const std::int64_t E = n.E, even = count + count % 2;
  const std::int64_t filled = even / 2, behind = PairProducts::depth(filled) - filled;
  rotate_rows(qkv + begin * n.width, n.width, s.query_rows, E, count, n.c, shape.table(), begin,
              1.0f, shape.scaling * kLog2e);
  copy_rows(grad_out + begin * n.out_width, n.out_width, s.grad_rows, E, count, n.c);
  clear(s.query_rows + count * E, (even - count) * E);
  clear(s.grad_rows + count * E, (even - count) * E);
  clear(s.queries + filled * n.C, behind * n.C);
  clear(s.grads + filled * n.C, behind * n.C);
  clear(s.weights + filled * n.P, behind * n.P);
  clear(s.slopes + filled * n.P, behind * n.P);
  for (std::int64_t i = 0; i < even; i += 2) {
    interleave(s.query_rows + i * E, s.query_rows + (i + 1) * E, s.queries + i / 2 * n.C, n.c);
    interleave(s.grad_rows + i * E, s.grad_rows + (i + 1) * E, s.grads + i / 2 * n.C, n.c);
  }
  return even;
}

// Weights or slopes of a block's queries as left factors of the keys from F on: element (j, q) is that
// of key j and the pair q of queries.
inline Elements<Pair> by_keys(const Pair* of_pairs, const PairAttentionSizes& n, std::int64_t keys,
                              Pair* turned) {
  if constexpr (!PairProducts::kOfRows) return {of_pairs + n.F, 1, n.P};
  transpose_blocks(of_pairs, n.P, n.kPairs, rounded_up(n.F + keys, 16), turned, n.kPairs);
  return {turned + n.F * n.kPairs, n.kPairs, 1};
}

// to (N, C) += the products of these with what their queries have, for the keys up to the last of the
// block. Tiles of keys end where those of queries do: beyond the columns of its own tile a query has no
// weights, not even zeros.
inline void add_to_keys(PairProducts& multiply, Elements<Pair> lefts, const Pair* rights,
                        std::int64_t begin, std::int64_t even, float* to, std::int64_t C) {
  for (std::int64_t j = 0, tile; j < begin + even; j += tile) {
    tile = least(PairProducts::kRows, (j < begin ? begin : begin + even) - j);
    const std::int64_t skip = j > begin ? (j - begin) / 2 : 0;  // pairs that do not see key j
    multiply(tile, C, {lefts.at + j * lefts.row + skip * lefts.column, lefts.row, lefts.column},
             rights + skip * C, C, to + j * C, C, even / 2 - skip, true);
  }
}

// attention_backward_heads, with the formulas that stand there.
inline void attention_backward_heads_in_pairs(const AttentionShape& shape, const bf16* qkv,
                                              const bf16* grad_out, bf16* grad_qkv,
                                              std::int64_t kv_head) {
  const PairAttentionSizes n(shape, kv_head);
  const std::int64_t N = n.N, F = n.F, c = n.c, P = n.P, C = n.C, E = n.E;
  const std::int64_t depth = (c + 1) / 2;
  const Front<bf16> front(shape, kv_head);
  const Scratch<PairAttentionBackwardScratch> scratch(n);
  const PairAttentionBackwardScratch s = *scratch;
  PairProducts multiply;

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
      for (std::int64_t i = 0; i < even; i += n.R) {
        const std::int64_t tile = least(n.R, even - i);
        const std::int64_t seen = F + begin + i + tile, columns = n.columns(seen);
        multiply(tile, columns, {pairs(s.query_rows + i * E), E / 2, 1}, s.keys_t, P, s.powers, P,
                 depth, false);
        multiply(tile, columns, {pairs(s.grad_rows + i * E), E / 2, 1}, s.values_t, P,
                 s.grad_weights, P, depth, false);
        for (std::int64_t r = 0; r < tile; r += 2) {
          float inverse[2];
          const std::int64_t query = F + begin + i + r;
          for (std::int64_t k = 0; k < 2; ++k) {
            float* row = s.powers + (r + k) * P;
            inverse[k] = softmax_row(row, row, lowest(shape, query + k), query + k, columns);
          }
          slopes_of_pair(s.powers + r * P, s.grad_weights + r * P, P, inverse,
                         s.weights + (i + r) / 2 * P, s.slopes + (i + r) / 2 * P,
                         s.slope_rows + r * P, query + 2, columns);
        }
        multiply(tile, C, {pairs(s.slope_rows), P / 2, 1}, s.keys, C, s.grad_queries, C,
                 (seen + 1) / 2, false);
        rotate_rows(s.grad_queries, C, grad_qkv + (begin + i) * n.width + head * c, n.width,
                    least(tile, count - i), c, shape.table(), begin + i, -1.0f, shape.scaling);
      }
      const std::int64_t keys = begin + even;
      add_to_keys(multiply, by_keys(s.slopes, n, keys, s.turned), s.queries, begin, even,
                  s.grad_keys, C);
      add_to_keys(multiply, by_keys(s.weights, n, keys, s.turned), s.grads, begin, even,
                  s.grad_values, C);
    }
  // The queries were scaled by log2 e for the exponentials.
  rotate_rows(s.grad_keys, C, grad_qkv + n.keys, n.width, N, c, shape.table(), 0, -1.0f,
              1.0f / kLog2e);
  copy_rows(s.grad_values, C, grad_qkv + n.values, n.width, N, c);
}

PROTOTOK_TARGET_END
