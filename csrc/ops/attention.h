// Rotary, causal softmax and the weighted sum of values for the query heads of one key-value head
// of one row, straight from the stacked product and straight to the output projection's input.
//
// All products are small matrices in fp32 that stay in the caches: queries are taken kQueryBlock at a
// time, against the keys up to the last of them. Work above the diagonal is left out by tiles.
// Letters: N positions, T = F + N with those in front, P = T rounded up to vectors, c head size, C = c
// rounded up to vectors.
#pragma once

#include "ops/rotary.h"
#include "ops/row_kernels.h"
#include "ops/softmax.h"
#include "products/tile.h"
#include "simd/arena.h"
#include "simd/exp.h"
#include "simd/target.h"
#include "simd/vectors.h"

#include <cstdint>

PROTOTOK_TARGET_BEGIN

constexpr std::int64_t kQueryBlock = 64;

// (count,) -> a column.
inline void store_column(const float* from, float* to, std::int64_t to_row, std::int64_t count) {
  for (std::int64_t t = 0; t < count; ++t) to[t * to_row] = from[t];
}

// T rounded up to vectors. Products in pairs take an even number of queries, and behind an odd F the
// key of one too many may be one more than T.
inline std::int64_t padded_keys(const AttentionShape& shape) {
  return padded(shape.front + shape.length + shape.front % 2);
}

// Sizes and strides of one row's tensors; a key-value head has `group` query heads.
struct AttentionSizes {
  std::int64_t N, F, T, c, P, C, group;
  std::int64_t width, out_width;  // (H + 2 K) c and H c
  std::int64_t keys, values;      // where they begin in a position's stacked product
  AttentionSizes(const AttentionShape& shape, std::int64_t kv_head)
      : N(shape.length),
        F(shape.front),
        T(shape.front + shape.length),
        c(shape.size),
        P(padded_keys(shape)),
        C(padded(shape.size)),
        group(shape.heads / shape.kv_heads),
        width((shape.heads + 2 * shape.kv_heads) * shape.size),
        out_width(shape.heads * shape.size),
        keys((shape.heads + kv_head) * shape.size),
        values(keys + shape.kv_heads * shape.size) {}
};

// The keys and values, (F, c) each, that stand in front of a key-value head's own.
template <class T>
struct Front {
  const T *keys, *values;
  Front(const AttentionShape& shape, std::int64_t kv_head)
      : keys(static_cast<const T*>(shape.front_kv) + kv_head * shape.front * shape.size),
        values(keys + shape.kv_heads * shape.front * shape.size) {}
};

struct AttentionScratch {
  float *keys_t, *values;             // (c, P), (T, C)
  float *queries, *weights, *mixed;   // (kQueryBlock, C), (kQueryBlock, P), (kQueryBlock, C)
  AttentionScratch(Arena& arena, const AttentionSizes& n)
      : keys_t(arena.take<float>(n.c * n.P)),
        values(arena.take<float>(n.T * n.C)),
        queries(arena.take<float>(kQueryBlock * n.C)),
        weights(arena.take<float>(kQueryBlock * n.P)),
        mixed(arena.take<float>(kQueryBlock * n.C)) {}
};

struct AttentionBackwardScratch {
  float *keys, *keys_t, *values_t;          // (T, C), (c, P), (c, P)
  float *grad_keys, *grad_values;           // (N, C)
  float *queries, *grads, *grad_queries;    // (kQueryBlock, C)
  float *weights, *slopes;                  // (kQueryBlock, P)
  AttentionBackwardScratch(Arena& arena, const AttentionSizes& n)
      : keys(arena.take<float>(n.T * n.C)),
        keys_t(arena.take<float>(n.c * n.P)),
        values_t(arena.take<float>(n.c * n.P)),
        grad_keys(arena.take<float>(n.N * n.C)),
        grad_values(arena.take<float>(n.N * n.C)),
        queries(arena.take<float>(kQueryBlock * n.C)),
        grads(arena.take<float>(kQueryBlock * n.C)),
        grad_queries(arena.take<float>(kQueryBlock * n.C)),
        weights(arena.take<float>(kQueryBlock * n.P)),
        slopes(arena.take<float>(kQueryBlock * n.P)) {}
};

// The rows of the logits of a block of queries that starts at `begin`, as exponentials; inverse[i]
// is 1 / the sum of row i.
inline void block_weights(const AttentionShape& shape, const float* queries, const float* keys_t,
                          std::int64_t begin, std::int64_t rows, float* weights, float* inverse) {
  const std::int64_t F = shape.front, P = padded_keys(shape), C = padded(shape.size);
  for (std::int64_t i = 0; i < rows; i += kTileRows) {
    const std::int64_t tile = least(kTileRows, rows - i), columns = padded(F + begin + i + tile);
    product(tile, columns, {queries + i * C, C, 1}, keys_t, P, weights + i * P, P, shape.size,
            false);
    for (std::int64_t r = i; r < i + tile; ++r) {
      float* row = weights + r * P;
      const std::int64_t position = F + begin + r;
      inverse[r] = softmax_row(row, row, lowest(shape, position), position, columns);
    }
  }
}

template <class T>
inline void attention_heads(const AttentionShape& shape, const T* qkv, T* out,
                            std::int64_t kv_head) {
  const AttentionSizes n(shape, kv_head);
  const std::int64_t N = n.N, F = n.F, c = n.c, P = n.P, C = n.C;
  const Front<T> front(shape, kv_head);
  const Scratch<AttentionScratch> scratch(n);
  const auto [keys_t, values, queries, weights, mixed] = *scratch;
  float inverse[kQueryBlock];

  clear(keys_t, c * P);
  clear(values, n.T * C);
  for (std::int64_t j = 0; j < F; ++j) {
    copy_scaled(front.keys + j * c, queries, c, 1.0f);
    store_column(queries, keys_t + j, P, c);
  }
  for (std::int64_t j = 0; j < N; ++j) {
    rotate_head(qkv + j * n.width + n.keys, queries, c, shape.table(), j, 1.0f, 1.0f);
    store_column(queries, keys_t + F + j, P, c);
  }
  copy_rows(front.values, c, values, C, F, c);
  copy_rows(qkv + n.values, n.width, values + F * C, C, N, c);
  for (std::int64_t head = kv_head * n.group; head < (kv_head + 1) * n.group; ++head)
    for (std::int64_t begin = shape.first; begin < N; begin += kQueryBlock) {
      const std::int64_t rows = least(kQueryBlock, N - begin);
      rotate_rows(qkv + begin * n.width + head * c, n.width, queries, C, rows, c, shape.table(),
                  begin, 1.0f, shape.scaling * kLog2e);
      block_weights(shape, queries, keys_t, begin, rows, weights, inverse);
      for (std::int64_t i = 0; i < rows; i += kTileRows) {
        const std::int64_t tile = least(kTileRows, rows - i);
        product(tile, C, {weights + i * P, P, 1}, values, C, mixed + i * C, C,
                F + begin + i + tile, false);
      }
      for (std::int64_t i = 0; i < rows; ++i)
        copy_scaled(mixed + i * C, out + (begin + i) * n.out_width + head * c, c, inverse[i]);
    }
}

// Exponentials -> weights p, and their gradients dp -> slopes ds, up to `columns`.
inline void slopes_of_row(float* weights, float inverse, float* slopes, std::int64_t columns) {
  Floats sum = {};
  for (std::int64_t j = 0; j < columns; j += kLanes) {
    const Floats weight = load(weights + j) * inverse;
    store(weights + j, weight);
    sum += weight * load(slopes + j);
  }
  const float mean = lane_sum<kLanes>(sum);
  for (std::int64_t j = 0; j < columns; j += kLanes)
    store(slopes + j, load(weights + j) * (load(slopes + j) - mean));
}

// With p the weights, g the gradient of the output and s the logits:
//   dv_j = sum_i p_ij g_i     dp_ij = <g_i, v_j>     ds_ij = p_ij (dp_ij - sum_j p_ij dp_ij)
//   dq_i = scaling sum_j ds_ij k_j     dk_j = scaling sum_i ds_ij q_i
// and both are turned back. The weights are made again from q and k: nothing but the stacked
// product is kept from the forward pass.
template <class T>
inline void attention_backward_heads(const AttentionShape& shape, const T* qkv, const T* grad_out,
                                     T* grad_qkv, std::int64_t kv_head) {
  const AttentionSizes n(shape, kv_head);
  const std::int64_t N = n.N, F = n.F, c = n.c, P = n.P, C = n.C;
  const Front<T> front(shape, kv_head);
  const Scratch<AttentionBackwardScratch> scratch(n);
  const auto [keys, keys_t, values_t, grad_keys, grad_values, queries, grads, grad_queries, weights,
              slopes] = *scratch;
  float inverse[kQueryBlock];

  clear(keys, n.T * C);
  clear(keys_t, c * P);
  clear(values_t, c * P);
  clear(grad_keys, N * C);
  clear(grad_values, N * C);
  clear(queries, kQueryBlock * C);
  clear(grads, kQueryBlock * C);
  copy_rows(front.keys, c, keys, C, F, c);
  rotate_rows(qkv + n.keys, n.width, keys + F * C, C, N, c, shape.table(), 0, 1.0f, 1.0f);
  // One after the other: the cache lines that both write at a time may be more than a cache holds.
  for (std::int64_t j = 0; j < n.T; ++j) store_column(keys + j * C, keys_t + j, P, c);
  for (std::int64_t j = 0; j < n.T; ++j) {
    const T* value = j < F ? front.values + j * c : qkv + (j - F) * n.width + n.values;
    copy_scaled(value, queries, c, 1.0f);
    store_column(queries, values_t + j, P, c);
  }
  for (std::int64_t head = kv_head * n.group; head < (kv_head + 1) * n.group; ++head)
    for (std::int64_t begin = 0; begin < N; begin += kQueryBlock) {
      const std::int64_t rows = least(kQueryBlock, N - begin), end = begin + rows;
      rotate_rows(qkv + begin * n.width + head * c, n.width, queries, C, rows, c, shape.table(),
                  begin, 1.0f, shape.scaling * kLog2e);
      copy_rows(grad_out + begin * n.out_width + head * c, n.out_width, grads, C, rows, c);
      block_weights(shape, queries, keys_t, begin, rows, weights, inverse);
      for (std::int64_t i = 0; i < rows; i += kTileRows) {
        const std::int64_t tile = least(kTileRows, rows - i);
        const std::int64_t seen = F + begin + i + tile, columns = padded(seen);
        product(tile, columns, {grads + i * C, C, 1}, values_t, P, slopes + i * P, P, c, false);
        for (std::int64_t r = i; r < i + tile; ++r)
          slopes_of_row(weights + r * P, inverse[r], slopes + r * P, columns);
        product(tile, C, {slopes + i * P, P, 1}, keys, C, grad_queries + i * C, C, seen, false);
      }
      for (std::int64_t j = 0; j < end; j += kTileRows) {
        const std::int64_t tile = least(kTileRows, end - j);
        // The first query of the block that sees key j.
        const std::int64_t skip = j > begin ? j - begin : 0, from = skip * P + F + j;
        product(tile, C, {slopes + from, 1, P}, queries + skip * C, C, grad_keys + j * C, C,
                rows - skip, true);
        product(tile, C, {weights + from, 1, P}, grads + skip * C, C, grad_values + j * C, C,
                rows - skip, true);
      }
      rotate_rows(grad_queries, C, grad_qkv + begin * n.width + head * c, n.width, rows, c,
                  shape.table(), begin, -1.0f, shape.scaling);
    }
  // The queries were scaled by log2 e for the exponentials.
  rotate_rows(grad_keys, C, grad_qkv + n.keys, n.width, N, c, shape.table(), 0, -1.0f,
              1.0f / kLog2e);
  copy_rows(grad_values, C, grad_qkv + n.values, n.width, N, c);
}

PROTOTOK_TARGET_END
