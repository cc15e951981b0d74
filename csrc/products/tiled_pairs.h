// Products of the small factors of pairs.h in tiles: the interleaved or transposed one is read as a
// panel is, the other one must be rows.
#pragma once

#include "products/pairs.h"
#include "products/tiled_product.h"
#include "simd/target.h"
#include "simd/tile_config.h"
#include "simd/tiles.h"

#include <cstdint>

PROTOTOK_TARGET_BEGIN

class PairsInTiles {
 public:
  static constexpr std::int64_t kRows = kBlockRows;
  static constexpr std::int64_t kColumns = kAmxDepth;  // keys are a depth, too
  static constexpr bool kOfRows = true;

  static constexpr std::int64_t depth(std::int64_t pairs) { return pairs_padded(2 * pairs) / 2; }

  // c (rows, columns) = [c +] a (rows, depth) b (depth, columns), columns in whole tiles. Both factors
  // have zeros where the depth, in pairs, is rounded up to tiles.
  void operator()(std::int64_t rows, std::int64_t columns, Elements<Pair> a, const Pair* b,
                  std::int64_t b_row, float* c, std::int64_t c_row, std::int64_t depth, bool add) {
    const TileFactors factors{&a.at->first, 2 * a.row, &b->first, b_row, 2 * this->depth(depth),
                              nullptr};
    tiles_.shape(kTileBlockConfigs.of_rows[rows]);
    if (rows > kAmxRows)
      blocks<2>(factors, columns, c, c_row, add);
    else
      blocks<1>(factors, columns, c, c_row, add);
  }

 private:
  template <int kRowTiles>
  void blocks(const TileFactors& factors, std::int64_t columns, float* c, std::int64_t c_row,
              bool add) {
    Ahead nothing{nullptr};
    std::int64_t j = 0;
    for (; j + 2 * kAmxRows <= columns; j += 2 * kAmxRows)
      TileBlock<kRowTiles, 2, 0>{tiles_, nothing}.run(factors, 0, j, c + j, c_row, add);
    if (j < columns)
      TileBlock<kRowTiles, 1, 0>{tiles_, nothing}.run(factors, 0, j, c + j, c_row, add);
  }

  Tiles tiles_;
};

PROTOTOK_TARGET_END
