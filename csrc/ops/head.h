// The loss of a row of logits, its argmax and margin, and its gradient.
#pragma once

#include "ops/row_kernels.h"
#include "simd/exp.h"
#include "simd/target.h"
#include "simd/vectors.h"

#include <cmath>
#include <cstdint>
#include <cstring>

PROTOTOK_TARGET_BEGIN

// A block of fp32 is 8 KiB: its maximum and its sum are two reads, the second from the L1 cache.
constexpr std::int64_t kBlock = 2048;
constexpr int kChains = 4;  // independent accumulators, enough to hide the latency of an addition
constexpr std::int64_t kStride = kChains * kLanes;

template <class T>
inline float block_maximum(const T* x, std::int64_t count) {
  Floats best[kChains];
  for (Floats& b : best) b = splat(-kInfinity);
  std::int64_t i = 0;
  for (; i + kStride <= count; i += kStride)
    for (int c = 0; c < kChains; ++c) best[c] = larger(load(x + i + c * kLanes), best[c]);
  for (; i + kLanes <= count; i += kLanes) best[0] = larger(load(x + i), best[0]);
  if (i < count) best[0] = larger(load_tail(x + i, count - i, -kInfinity), best[0]);
  for (int c = 1; c < kChains; ++c) best[0] = larger(best[0], best[c]);
  return lane_maximum<kLanes>(best[0]);
}

// The first of `count` that equals `value`, or `count`.
template <class T>
inline std::int64_t first_equal(const T* x, std::int64_t count, float value) {
  std::int64_t i = 0;
  for (; i + kStride <= count; i += kStride) {
    Ints equal = {};
    for (int c = 0; c < kChains; ++c) equal |= load(x + i + c * kLanes) == value;
    if (any_lane(equal)) break;
  }
  while (i < count && load_one(x + i) != value) ++i;
  return i;
}

// Sum of 2^((x - shift) * scale).
template <class T>
inline double block_sum(const T* x, std::int64_t count, float shift, float scale) {
  Floats sum[kChains] = {};
  std::int64_t i = 0;
  for (; i + kStride <= count; i += kStride)
    for (int c = 0; c < kChains; ++c)
      sum[c] += exp2_of((load(x + i + c * kLanes) - shift) * scale);
  for (; i + kLanes <= count; i += kLanes)
    sum[0] += exp2_of((load(x + i) - shift) * scale);
  if (i < count)
    sum[0] += exp2_of((load_tail(x + i, count - i, -kInfinity) - shift) * scale);
  for (int c = 1; c < kChains; ++c) sum[0] += sum[c];
  double total = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) total += sum[0][lane];
  return total;
}

// What is known of the logits other than the target's.
struct Others {
  float best = -kInfinity;
  std::int64_t block_begin = 0, block_end = 0;  // where `best` was first seen
  double sum = 0.0;                             // of 2^((x - best) * scale)
};

// One read from memory: a block's maximum may rescale the sum so far, then the block is added.
template <class T>
inline void scan(const T* x, std::int64_t begin, std::int64_t end, float scale, Others& others) {
  for (std::int64_t start = begin; start < end; start += kBlock) {
    const std::int64_t stop = start + kBlock < end ? start + kBlock : end;
    const float top = block_maximum(x + start, stop - start);
    if (top > others.best) {
      others.sum *= std::exp2((double(others.best) - top) * scale);
      others.best = top;
      others.block_begin = start;
      others.block_end = stop;
    }
    // With nothing but -inf so far any finite shift leaves the sum at 0 and lets a NaN through.
    const float shift = others.best == -kInfinity ? 0.0f : others.best;
    others.sum += block_sum(x + start, stop - start, shift, scale);
  }
}

// A row's loss and margin, and what its gradient is made of: p - 1{target} is
// others_factor * 2^((x - best) * scale) of every other logit x, and target_slope of the target.
//
// The target is kept apart from the other logits: the best of those is the margin's other half, and
// loss = log1p(sum of others / target) and p - 1 = -(sum of others) / total lose no digits when the
// target has almost all of the probability, where the end of every fit lies.
struct HeadEnd {
  float loss, margin;
  bool target_wins;  // leaves equals to the caller
  float others_factor, target_slope;  // times token_weight / temperature
};

// `sum` is of 2^((x - best) * scale) over the others, in their own scale of exp(x / temperature).
inline HeadEnd head_end(float own, float best, double sum, float token_weight, float temperature) {
  const double gap = (double(own) - best) / temperature;  // nats
  // In units of the larger of exp(own / T) and exp(best / T).
  const double of_others = own >= best ? std::exp(-gap) : 1.0;
  const double of_target = own >= best ? 1.0 : std::exp(gap);
  const double rest = sum > 0.0 ? sum * of_others : sum;
  const double total = of_target + rest, outer = double(token_weight) / temperature / total;
  const double loss = own >= best ? std::log1p(rest) : std::log(total) - gap;
  return {float(loss), own - best, own > best, float(outer * of_others), float(-rest * outer)};
}

template <class T>
HeadResult head_row(const T* logits, T* gradient, std::int64_t vocabulary, std::int64_t target,
                    float token_weight, float temperature) {
  const float scale = float(1.4426950408889634 / temperature);  // exp(x / T) = 2^(x * scale)
  const float own = load_one(logits + target);
  Others others;
  scan(logits, 0, target, scale, others);
  scan(logits, target + 1, vocabulary, scale, others);
  const HeadEnd end = head_end(own, others.best, others.sum, token_weight, temperature);

  HeadResult result{end.loss, target, end.margin};
  if (!end.target_wins) {
    const std::int64_t begin = others.block_begin, end_of_block = others.block_end;
    const std::int64_t rival =
        begin + first_equal(logits + begin, end_of_block - begin, others.best);
    if (rival < end_of_block && (own != others.best || rival < target)) result.predicted = rival;
  }
  if (gradient == nullptr) return result;

  if (token_weight == 0.0f) {
    std::memset(gradient, 0, std::size_t(vocabulary) * sizeof(T));
    return result;
  }
  const float top = others.best == -kInfinity ? 0.0f : others.best, factor = end.others_factor;
  std::int64_t i = 0;
  for (; i + kStride <= vocabulary; i += kStride)
    for (int c = 0; c < kChains; ++c) {
      const std::int64_t at = i + c * kLanes;
      store(gradient + at, exp2_of((load(logits + at) - top) * scale) * factor);
    }
  for (; i + kLanes <= vocabulary; i += kLanes)
    store(gradient + i, exp2_of((load(logits + i) - top) * scale) * factor);
  if (i < vocabulary) {
    const Floats x = load_tail(logits + i, vocabulary - i, -kInfinity);
    store_tail(gradient + i, vocabulary - i, exp2_of((x - top) * scale) * factor);
  }
  store_one(gradient + target, end.target_slope);
  return result;
}

PROTOTOK_TARGET_END
