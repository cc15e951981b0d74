// A tile of rows through the head: chunk by chunk of the vocabulary, logits, their exponentials in
// place and the products of these with the weight, so that no more than a chunk of either is ever
// alive. What is summed relative to the largest logit so far is scaled where a later chunk holds a
// larger one.
#pragma once

#include "engines/packed_head.h"
#include "ops/head.h"
#include "products/packed_product.h"
#include "simd/exp.h"
#include "simd/target.h"
#include "simd/vectors.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

PROTOTOK_TARGET_BEGIN

// What is known of a row's logits so far; `best` and what follows is of those not the target's.
struct HeadState {
  float own = 0.0f, best = -kInfinity;
  std::int64_t rival = 0;  // the first that equals `best`
  double sum = 0.0;        // of 2^((x - best) * scale)
};

// Logits [begin, begin + count) -> 2^((x - best) * scale) where `keep`, 0 for the target. Returns
// what sums relative to the `best` before are to be multiplied with.
inline float head_chunk(bf16* logits, std::int64_t begin, std::int64_t count, std::int64_t target,
                        float scale, bool keep, HeadState& state) {
  if (target >= begin && target < begin + count) {
    state.own = load_one(logits + target - begin);
    store_one(logits + target - begin, -kInfinity);
  }
  float rescale = 1.0f;
  const float top = block_maximum(logits, count);
  if (top > state.best) {
    rescale = float(std::exp2((double(state.best) - top) * scale));
    state.sum *= rescale;
    state.best = top;
    state.rival = begin + first_equal(logits, count, top);
  }
  // With nothing but -inf so far any finite shift leaves the sum at 0 and lets a NaN through.
  const float shift = state.best == -kInfinity ? 0.0f : state.best;
  if (!keep) {
    state.sum += block_sum(logits, count, shift, scale);
    return rescale;
  }
  Floats sum[kChains] = {};
  std::int64_t i = 0;
  for (; i + kStride <= count; i += kStride)
    for (int c = 0; c < kChains; ++c) {
      const Floats power = exp2_of((load(logits + i + c * kLanes) - shift) * scale);
      store(logits + i + c * kLanes, power);
      sum[c] += power;
    }
  for (; i < count; i += kLanes) {
    const Floats x = load_some(logits + i, count - i, -kInfinity);
    const Floats power = exp2_of((x - shift) * scale);
    store_some(logits + i, count - i, power);
    sum[0] += power;
  }
  state.sum += lane_sum<kLanes>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  return rescale;
}

inline void packed_head_tile(const PackedHeadTile& tile) {
  const Head& head = tile.head;
  const std::int64_t V = head.vocabulary, d = tile.hidden_size;
  const std::int64_t width = panels_padded(d);
  const float scale = float(1.4426950408889634 / head.temperature);  // exp(x / T) = 2^(x * scale)
  const bool need_grad = tile.grad != nullptr;
  const std::int64_t first_row = tile.member.first(head.rows);
  const std::int64_t last_row = tile.member.last(head.rows);
  HeadState states[kHeadTile];
  for (std::int64_t begin = 0; begin < V; begin += kHeadChunk) {
    const std::int64_t count = std::min(kHeadChunk, V - begin);
    const bf16* logits_next =
        tile.to_logits + (begin + kHeadChunk + first_output(tile.member, kHeadChunk)) * d;
    const bf16* part = need_grad ? tile.to_hidden + begin * kPanel : nullptr;
    PackedProduct to_logits{tile.hidden, tile.to_logits + begin * d, nullptr, tile.logits,
                            head.rows, d, count, false, false};
    to_logits.next = need_grad ? part + first_output(tile.member, d) * V : logits_next;
    packed_product(to_logits.of_member(tile.member));
    tile.member.meet();
    for (std::int64_t r = first_row; r < last_row; ++r)
      tile.rescale[r] = head_chunk(tile.logits + r * count, begin, count, head.targets[r], scale,
                                   need_grad, states[r]);
    tile.member.meet();
    if (!need_grad) continue;
    PackedSum to_hidden{tile.logits, part, tile.sum, begin == 0 ? nullptr : tile.rescale,
                        head.rows, count, V, d, false};
    to_hidden.next = logits_next;
    packed_sum(to_hidden.of_member(tile.member));
    tile.member.meet();
  }
  for (std::int64_t r = first_row; r < last_row; ++r) {
    const HeadState& state = states[r];
    const float token_weight = head.token_weight == nullptr ? 1.0f : head.token_weight[r];
    const std::int64_t target = head.targets[r];
    const HeadEnd end =
        head_end(state.own, state.best, state.sum, token_weight, head.temperature);
    const bool first = state.own == state.best && target < state.rival;
    head.loss[r] = end.loss;
    head.margin[r] = end.margin;
    const bool no_other = !(state.best > -kInfinity);
    head.predicted[r] = end.target_wins || first || no_other ? target : state.rival;
    if (!need_grad) continue;
    bf16* grad = tile.grad + r * d;
    if (token_weight == 0.0f) {
      std::memset(grad, 0, std::size_t(d) * sizeof(bf16));
      continue;
    }
    const float* sum = tile.sum + r * width;
    const bf16* of_target = tile.weight + target * d;
    for (std::int64_t i = 0; i < d; i += kLanes)
      store_some(grad + i, d - i,
                 load(sum + i) * end.others_factor +
                     load_some(of_target + i, d - i) * end.target_slope);
  }
}

PROTOTOK_TARGET_END
