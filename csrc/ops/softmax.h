// Causal softmax of a row of logits.
#pragma once

#include "ops/row_kernels.h"
#include "simd/exp.h"
#include "simd/target.h"
#include "simd/vectors.h"

#include <cstdint>

PROTOTOK_TARGET_BEGIN

// The first position that the query at `position` sees.
inline std::int64_t lowest(const AttentionShape& shape, std::int64_t position) {
  return position >= shape.window ? position - shape.window + 1 : 0;
}

// The lanes first ... last of a vector, -inf in the others; either may lie outside of it.
inline Floats seen_lanes(Floats x, std::int64_t first, std::int64_t last) {
#ifdef PROTOTOK_AVX512
  const std::uint32_t before = first <= 0 ? 0u : first >= kLanes ? 0xffffu : (1u << first) - 1u;
  const std::uint32_t through = last >= kLanes - 1 ? 0xffffu : last < 0 ? 0u : (2u << last) - 1u;
  return (Floats)_mm512_mask_mov_ps(_mm512_set1_ps(-kInfinity), __mmask16(through & ~before),
                                    (__m512)x);
#else
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const Ints seen = (lane >= std::int32_t(first)) & (lane <= std::int32_t(last));
  return seen ? x : splat(-kInfinity);
#endif
}

// Logits in units of log 2 -> their exponentials relative to the largest of [first, last], 0 outside
// of it up to `columns`, a multiple of kLanes; returns 1 / their sum. Overwrites `x`, which `powers`
// may be.
template <class T>
inline float softmax_row(float* x, T* powers, std::int64_t first, std::int64_t last,
                         std::int64_t columns) {
  const std::int64_t seen_columns = padded(last + 1);
  Floats best = splat(-kInfinity);
  for (std::int64_t j = 0; j < seen_columns; j += kLanes) {
    const Floats seen = seen_lanes(load(x + j), first - j, last - j);
    store(x + j, seen);
    best = larger(seen, best);
  }
  const float top = lane_maximum<kLanes>(best);
  Floats sum = {};
  for (std::int64_t j = 0; j < seen_columns; j += kLanes) {
    const Floats power = exp2_of(load(x + j) - top);
    store(powers + j, power);
    sum += power;
  }
  for (std::int64_t j = seen_columns; j < columns; j += kLanes) store(powers + j, Floats{});
  return 1.0f / lane_sum<kLanes>(sum);
}

PROTOTOK_TARGET_END
