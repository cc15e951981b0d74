// Attention of [e, m, m, …, m] as a prefix scan: logits by their distance, the weights of e, and the
// way back. first_layer.py has the same in torch, docs/kernels.md derives it.
#pragma once

#include "engines/first_layer.h"
#include "products/tile.h"
#include "simd/exp.h"
#include "simd/target.h"
#include "simd/vectors.h"

#include <cstdint>

PROTOTOK_TARGET_BEGIN

// Logits, or their gradients.
struct PairLogits {
  float* pair[2];  // (N, H): from m to m at distance i, and from m at position i to e
  float* prefix;   // (P, N, H): to each vector of a prefix, from e at 0 and from m at i >= 1; then
                   // the first logit to e is e's own, too
};

// (N, T): cos, sin and 1 of each position, as the features of a head are laid out.
inline void distance_table(const FirstLayerSizes& size, const RotaryTable& rotary, float* table) {
  const std::int64_t half = rotary.rotary / 2, T = size.table_row;
  clear(table, size.length * T);
  copy_rows(rotary.cos, rotary.row, table, T, size.length, half);
  copy_rows(rotary.sin, rotary.row, table + half, T, size.length, half);
  for (std::int64_t i = 0; i < size.length; ++i) table[i * T + 2 * half] = 1.0f;
}

// Logits of q against k by their distance are scale * feature · table.
inline void head_feature(const float* q, const float* k, std::int64_t size, std::int64_t half,
                         float scale, float* feature) {
  float rest = 0.0f;
  for (std::int64_t t = 0; t < half; ++t) {
    feature[t] = (q[t] * k[t] + q[half + t] * k[half + t]) * scale;
    feature[half + t] = (q[t] * k[half + t] - q[half + t] * k[t]) * scale;
  }
  for (std::int64_t t = 2 * half; t < size; ++t) rest += q[t] * k[t];
  feature[2 * half] = rest * scale;
}

inline void head_feature_backward(const float* grad, const float* q, const float* k,
                                  std::int64_t size, std::int64_t half, float scale, float* grad_q,
                                  float* grad_k) {
  for (std::int64_t t = 0; t < half; ++t) {
    const float of_cos = grad[t] * scale, of_sin = grad[half + t] * scale;
    grad_q[t] += of_cos * k[t] + of_sin * k[half + t];
    grad_q[half + t] += of_cos * k[half + t] - of_sin * k[t];
    grad_k[t] += of_cos * q[t] - of_sin * q[half + t];
    grad_k[half + t] += of_cos * q[half + t] + of_sin * q[t];
  }
  const float of_rest = grad[2 * half] * scale;
  for (std::int64_t t = 2 * half; t < size; ++t) {
    grad_q[t] += of_rest * k[t];
    grad_k[t] += of_rest * q[t];
  }
}

// coef and shares from the logits a of m to m at distance i and b of m at position i to e, both
// (N, H) in units of log 2. With P_i the sum of exp a_δ over δ < i, w_i is exp b_i / (exp b_i +
// P_i), and a_i has the share exp a_i / P_{i + 1} of the sum that it joins. The sum is kept
// relative to its largest term: logits may span hundreds of nats.
inline void affine_scan(const FirstLayerSizes& size, const float* a, const float* b,
                        const FirstLayerSaved& saved) {
  const std::int64_t C = size.coef_row, G = size.head_row;
  for (std::int64_t i = 0; i < size.length; ++i) {
    float* coef = saved.coef + i * C;
    clear(coef, C);
    coef[i == 0 ? 1 : 0] = 1.0f;
  }
  for (std::int64_t h = 0; h < size.heads; h += kLanes) {
    Floats best = splat(-kInfinity), sum = {};
    for (std::int64_t i = 0; i < size.length; ++i) {
      if (i > 0) {
        const Floats to_e = load(b + i * G + h), top = larger(to_e, best);
        const Floats of_e = exp2_of(to_e - top), of_m = sum * exp2_of(best - top);
        store_some(saved.coef + i * C + 2 + h, size.heads - h, of_e / (of_e + of_m));
      }
      const Floats to_m = load(a + i * G + h), top = larger(to_m, best);
      const Floats joins = exp2_of(to_m - top);
      sum = sum * exp2_of(best - top) + joins;
      best = top;
      store(saved.shares + i * G + h, joins / sum);
    }
  }
}

// U_i = z_{i+1} + (P_{i+1} / P_{i+2}) U_{i+1} with z = ∂w · w (1 - w) = ∂b; ∂a_i = -share_i U_i; of
// the logits in nats.
inline void affine_scan_backward(const FirstLayerSizes& size, const FirstLayerSaved& saved,
                                 const float* grad_coef, float* grad_a, float* grad_b) {
  const std::int64_t C = size.coef_row, G = size.head_row;
  for (std::int64_t h = 0; h < size.heads; h += kLanes) {
    Floats later = {};  // U_i
    for (std::int64_t i = size.length - 1; i >= 0; --i) {
      const Floats share = load(saved.shares + i * G + h);
      Floats z = {};
      if (i > 0) {
        const std::int64_t at = i * C + 2 + h;
        const Floats w = load(saved.coef + at);
        z = load(grad_coef + at) * w * (1.0f - w);
      }
      store(grad_a + i * G + h, share * later * -1.0f);
      store(grad_b + i * G + h, z);
      later = z + (1.0f - share) * later;
    }
  }
}

// Where the vectors of heads of a kind begin in a row of coef behind a prefix: e, all m, then the
// prefix's vectors but the first.
inline std::int64_t kind_at(const FirstLayerSizes& size, std::int64_t kind) {
  return 2 + kind * size.heads;
}

// The scan behind a prefix: a softmax over its P keys, e and all m together, in units of log 2.
// What the prefix's first vector gets is what the others leave, and not kept.
inline void scan_behind_prefix(const FirstLayerSizes& size, const PairLogits& logits,
                               const FirstLayerSaved& saved) {
  const std::int64_t C = size.coef_row, G = size.head_row, of_one = size.length * G;
  for (std::int64_t i = 0; i < size.length; ++i) {
    float* coef = saved.coef + i * C;
    clear(coef, C);
    coef[i == 0 ? 1 : 0] = 1.0f;
  }
  for (std::int64_t h = 0; h < size.heads; h += kLanes) {
    const std::int64_t left = size.heads - h;
    Floats best = splat(-kInfinity), sum = {};
    for (std::int64_t i = 0; i < size.length; ++i) {
      const float* to_prefix = logits.prefix + i * G + h;
      float* coef = saved.coef + i * C + h;
      const Floats to_e = load(logits.pair[1] + i * G + h);
      Floats top = larger(to_e, best);
      for (std::int64_t j = 0; j < size.front; ++j) top = larger(load(to_prefix + j * of_one), top);
      const Floats of_e = exp2_of(to_e - top), of_m = sum * exp2_of(best - top);
      Floats total = of_e + of_m;
      for (std::int64_t j = 0; j < size.front; ++j) {
        const Floats of_key = exp2_of(load(to_prefix + j * of_one) - top);
        if (j > 0) store_some(coef + kind_at(size, 1 + j), left, of_key);
        total += of_key;
      }
      store_some(coef + kind_at(size, 0), left, of_e / total);
      store_some(coef + kind_at(size, 1), left, of_m / total);
      for (std::int64_t j = 1; j < size.front; ++j) {
        float* share = coef + kind_at(size, 1 + j);
        store_some(share, left, load_some(share, left) / total);
      }
      const Floats to_m = load(logits.pair[0] + i * G + h), higher = larger(to_m, best);
      const Floats joins = exp2_of(to_m - higher);
      sum = sum * exp2_of(best - higher) + joins;
      best = higher;
      store(saved.shares + i * G + h, joins / sum);
    }
  }
}

// The slope of a logit is its weight times what the gradient of that weight is above their mean.
// What reaches all m together goes on as z does in affine_scan_backward, with the other sign.
inline void scan_behind_prefix_backward(const FirstLayerSizes& size,
                                        const FirstLayerSaved& saved, const float* grad_coef,
                                        const PairLogits& grad) {
  const std::int64_t C = size.coef_row, G = size.head_row, of_one = size.length * G;
  for (std::int64_t h = 0; h < size.heads; h += kLanes) {
    Floats later = {};
    for (std::int64_t i = size.length - 1; i >= 0; --i) {
      const float *coef = saved.coef + i * C + h, *of_coef = grad_coef + i * C + h;
      Floats mean = {}, first = splat(1.0f);
      for (std::int64_t kind = 0; kind < 1 + size.front; ++kind) {
        const Floats weight = load(coef + kind_at(size, kind));
        mean += weight * load(of_coef + kind_at(size, kind));
        first -= weight;
      }
      for (std::int64_t j = 0; j < size.front; ++j) {
        const std::int64_t at = kind_at(size, 1 + j);
        const Floats slope = j == 0 ? first * mean * -1.0f
                                    : load(coef + at) * (load(of_coef + at) - mean);
        store(grad.prefix + j * of_one + i * G + h, slope);
      }
      const std::int64_t e = kind_at(size, 0), m = kind_at(size, 1);
      store(grad.pair[1] + i * G + h, load(coef + e) * (load(of_coef + e) - mean));
      const Floats share = load(saved.shares + i * G + h);
      store(grad.pair[0] + i * G + h, share * later * -1.0f);
      later = load(coef + m) * (mean - load(of_coef + m)) + (1.0f - share) * later;
    }
  }
}

PROTOTOK_TARGET_END
