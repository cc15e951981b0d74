// The products of packed_matrix.h: in tiles where the target has them and rows are not few.
#pragma once

#include "products/packed_matrix.h"
#include "products/packed_tile.h"
#include "simd/target.h"

#ifdef PROTOTOK_TILES
#include "products/tiled_product.h"
#endif

PROTOTOK_TARGET_BEGIN

inline void packed_product(const PackedProduct& p) {
#ifdef PROTOTOK_TILES
  if (!p.few) return tiled_product(p);
#endif
  all_tiles<PackedTile>(p);
}

inline void packed_sum(const PackedSum& p) {
#ifdef PROTOTOK_TILES
  if (!p.few) return tiled_sum(p);
#endif
  all_tiles<PackedSumTile>(p);
}

PROTOTOK_TARGET_END
