// The largest logits of rows among some outputs of a packed head, a chunk of them at a time.
#pragma once

#include "engines/packed_head.h"
#include "ops/head.h"
#include "products/packed_product.h"
#include "simd/target.h"
#include "simd/vectors.h"

#include <algorithm>
#include <cstdint>

PROTOTOK_TARGET_BEGIN

inline void argmax_tile(const ArgmaxTile& tile) {
  std::fill_n(tile.best, tile.rows, -kInfinity);
  std::fill_n(tile.id, tile.rows, std::int64_t{0});
  for (std::int64_t begin = tile.begin; begin < tile.end; begin += kArgmaxChunk) {
    const std::int64_t count = std::min(kArgmaxChunk, tile.end - begin);
    packed_product({tile.hidden, tile.to_logits + begin * tile.hidden_size, nullptr, tile.logits,
                    tile.rows, tile.hidden_size, count, false, false});
    for (std::int64_t r = 0; r < tile.rows; ++r) {
      const bf16* logits = tile.logits + r * count;
      const float top = block_maximum(logits, count);
      if (!(top > tile.best[r])) continue;
      tile.best[r] = top;
      tile.id[r] = begin + first_equal(logits, count, top);
    }
  }
}

PROTOTOK_TARGET_END
