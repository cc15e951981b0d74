// Products of few rows of inputs with a weight as it lies, (outputs, inputs), each weight read once.
#pragma once

#include "products/linear_shape.h"
#include "products/tile.h"
#include "simd/bf16.h"
#include "simd/target.h"
#include "simd/vectors.h"

#include <algorithm>
#include <cstdint>

PROTOTOK_TARGET_BEGIN

#if !defined(__clang__)
inline Floats folded(Floats a, Floats b, Ints one, Ints other) {
  return __builtin_shuffle(a, b, one) + __builtin_shuffle(a, b, other);
}
#endif

typedef typename Lanes<4>::type Four;

// The sums of the lanes of four vectors: four of each are folded side by side.
[[gnu::always_inline]] inline Four four_lane_sums(const Floats* from) {
#if defined(__clang__)
  return Four{lane_sum<kLanes>(from[0]), lane_sum<kLanes>(from[1]), lane_sum<kLanes>(from[2]),
              lane_sum<kLanes>(from[3])};
#else
  Ints low, high, front, back;
  for (int i = 0; i < kLanes; ++i) {
    const int group = i / 4 * 4, second = i % 2 * kLanes;  // of the two vectors that are shuffled
    low[i] = group + i % 4 / 2 + second;
    high[i] = low[i] + 2;
    front[i] = group + i % 2 + (i % 4 / 2) * kLanes;
    back[i] = front[i] + 2;
  }
  const Floats ab = folded(from[0], from[1], low, high), cd = folded(from[2], from[3], low, high);
  const Floats sums = folded(ab, cd, front, back);  // (a, b, c, d) of every four lanes
  Four parts[kLanes / 4];
  __builtin_memcpy(parts, &sums, sizeof sums);
  for (int i = 1; i < kLanes / 4; ++i) parts[0] += parts[i];
  return parts[0];
#endif
}

inline Four load_four(const float* from) {
  Four value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline Four load_four(const bf16* from) {
  std::uint16_t bits[4];
  __builtin_memcpy(bits, from, sizeof bits);
  const std::uint32_t words[4] = {std::uint32_t{bits[0]} << 16, std::uint32_t{bits[1]} << 16,
                                  std::uint32_t{bits[2]} << 16, std::uint32_t{bits[3]} << 16};
  Four value;
  __builtin_memcpy(&value, words, sizeof value);
  return value;
}

// kTokens rows of inputs with kOutputs rows of the weight, and with kPrefetch those of the next tile
// asked for.
template <int kTokens, int kOutputs, bool kPrefetch, class T>
inline void linear_tile(const T* weight, const T* bias, const T* inputs, float* out,
                        const LinearShape& shape, std::int64_t o) {
  using Factors = Dots<T, kPrefetch ? kOutputs : 0>;
  const std::int64_t count = shape.inputs, whole = count / Factors::kStep * Factors::kStep;
  const T* w = weight + o * count;
  Floats sum[kOutputs][kTokens];
  clear(sum);
  accumulate(Factors{w, count, inputs, count}, whole, sum);
#pragma GCC unroll 8
  for (int m = 0; m < kTokens; ++m) {
    const T* x = inputs + m * count;
    float* to = out + m * shape.outputs + o;
    if constexpr (kOutputs % 4 == 0) {
#pragma GCC unroll 8
      for (int t = 0; t < kOutputs; t += 4) {
        const Floats four[4] = {sum[t][m], sum[t + 1][m], sum[t + 2][m], sum[t + 3][m]};
        Four value = four_lane_sums(four);
        for (std::int64_t i = whole; i < count; ++i)
          for (int k = 0; k < 4; ++k)
            value[k] += load_one(x + i) * load_one(w + (t + k) * count + i);
        if (bias != nullptr) value += load_four(bias + o + t);
        if (shape.add) value += load_four(to + t);
        __builtin_memcpy(to + t, &value, sizeof value);
      }
    } else {
#pragma GCC unroll 8
      for (int t = 0; t < kOutputs; ++t) {
        float value = lane_sum<kLanes>(sum[t][m]);
        for (std::int64_t i = whole; i < count; ++i)
          value += load_one(x + i) * load_one(w + t * count + i);
        if (bias != nullptr) value += load_one(bias + o + t);
        to[t] = shape.add ? to[t] + value : value;
      }
    }
  }
}

constexpr int kTokens = kLanes == 16 ? 4 : 2;  // a tile: a question of registers

// Tokens first ... last - 1 with kOutputs rows of the weight.
template <int kOutputs, class T>
inline void linear_strip(const T* weight, const T* bias, const T* inputs, float* out,
                         const LinearShape& shape, std::int64_t first, std::int64_t last,
                         std::int64_t o) {
  std::int64_t m = first;
  if (m + kTokens <= last) {
    linear_tile<kTokens, kOutputs, true>(weight, bias, inputs + m * shape.inputs,
                                         out + m * shape.outputs, shape, o);
    m += kTokens;
  }
  for (; m + kTokens <= last; m += kTokens)
    linear_tile<kTokens, kOutputs, false>(weight, bias, inputs + m * shape.inputs,
                                          out + m * shape.outputs, shape, o);
  for (; m < last; ++m)
    linear_tile<1, kOutputs, false>(weight, bias, inputs + m * shape.inputs,
                                    out + m * shape.outputs, shape, o);
}

// out (tokens, outputs) = [out +] inputs weight^T + bias for outputs begin ... end - 1. Tokens go by
// in blocks that stay in the first cache while the weights pass.
template <class T>
inline void linear(const T* weight, const T* bias, const T* inputs, float* out,
                   const LinearShape& shape, std::int64_t begin, std::int64_t end) {
  constexpr int kOutputs = 4;
  const std::int64_t fitting = 24576 / (shape.inputs * std::int64_t(sizeof(T)));
  const std::int64_t block = std::max<std::int64_t>(kTokens, fitting / kTokens * kTokens);
  for (std::int64_t first = 0; first < shape.tokens; first += block) {
    const std::int64_t last = std::min(first + block, shape.tokens);
    std::int64_t o = begin;
    if (shape.tokens == 1)
      for (; o + 2 * kOutputs <= end; o += 2 * kOutputs)
        linear_tile<1, 2 * kOutputs, true>(weight, bias, inputs, out, shape, o);
    for (; o + kOutputs <= end; o += kOutputs)
      linear_strip<kOutputs>(weight, bias, inputs, out, shape, first, last, o);
    for (; o < end; ++o) linear_strip<1>(weight, bias, inputs, out, shape, first, last, o);
  }
}

PROTOTOK_TARGET_END
