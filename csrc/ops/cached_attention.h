// Attention of one query over a cache of keys (c, T) and values (T, c).
#pragma once

#include "ops/softmax.h"
#include "simd/exp.h"
#include "simd/target.h"
#include "simd/vectors.h"

#include <cstdint>

PROTOTOK_TARGET_BEGIN

// A key (c,) into column `position` and a value (c,) into its row.
template <class T>
inline void keep(const float* key, const float* value, T* keys, T* values, std::int64_t size,
                 std::int64_t capacity, std::int64_t position) {
  for (std::int64_t i = 0; i < size; ++i) {
    store_one(keys + i * capacity + position, key[i]);
    store_one(values + position * size + i, value[i]);
  }
}

// Softmax attention of q (c,) over positions [begin, end); `scores` has room for T of them.
// Keys lie with positions next to each other, so that lanes are positions and no sum runs across
// them; `begin` is rounded down to a whole vector and what it adds is masked.
template <class T>
inline void attend(const float* q, const T* k, const T* v, float scaling, std::int64_t size,
                   std::int64_t capacity, std::int64_t begin, std::int64_t end, float* scores,
                   T* out) {
  const std::int64_t aligned = begin / kLanes * kLanes;
  Floats best = splat(-kInfinity);
  for (std::int64_t t = aligned; t < end; t += kLanes) {
    Floats sum[2] = {};
    std::int64_t i = 0;
    for (; i + 2 <= size; i += 2) {
      sum[0] += q[i] * load(k + i * capacity + t);
      sum[1] += q[i + 1] * load(k + (i + 1) * capacity + t);
    }
    if (i < size) sum[0] += q[i] * load(k + i * capacity + t);
    Floats score = (sum[0] + sum[1]) * (scaling * kLog2e);
    score = seen_lanes(score, begin - t, end - 1 - t);
    best = larger(score, best);
    store(scores + t, score);
  }
  const float top = lane_maximum<kLanes>(best);
  Floats total = {};
  for (std::int64_t t = aligned; t < end; t += kLanes) {
    const Floats weight = exp2_of(load(scores + t) - top);
    total += weight;
    store(scores + t, weight);
  }
  const float scale = 1.0f / lane_sum<kLanes>(total);
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const std::int64_t left = size - i;
    Floats sum[2] = {};
    std::int64_t t = begin;
    for (; t + 2 <= end; t += 2) {
      sum[0] += scores[t] * load_some(v + t * size + i, left);
      sum[1] += scores[t + 1] * load_some(v + (t + 1) * size + i, left);
    }
    if (t < end) sum[0] += scores[t] * load_some(v + t * size + i, left);
    store_some(out + i, left, (sum[0] + sum[1]) * scale);
  }
}

PROTOTOK_TARGET_END
