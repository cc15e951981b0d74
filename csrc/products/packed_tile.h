// The products of packed_matrix.h in vectors.
//
// A tile is kRows rows by as much of a panel as fits: all of it in vectors of 16 lanes. Its sums stay
// in registers over all inputs, while the weights come from the caches in whole cache lines: 24 sums,
// 4 vectors of weights and one of a row's pair are 29 of 32 registers, and with AVX2 8 sums, 4 vectors
// of weights as fp32 and 2 of a row's pair 14 of 16.
#pragma once

#include "products/packed_matrix.h"
#include "products/tile.h"
#include "simd/target.h"
#include "simd/vectors.h"

#include <cstdint>

PROTOTOK_TARGET_BEGIN

constexpr int kTileVectors = TileShape<Pair>::kVectors;
constexpr std::int64_t kTileOutputs = kTileVectors * kLanes;
static_assert(kPanel % kTileOutputs == 0, "a panel is a number of tiles");

// Rows of `inputs`, `row` elements apart, and of a panel the outputs from `part` on.
inline Outer<Pair> panel_factors(const bf16* inputs, std::int64_t row, const bf16* panel,
                                 std::int64_t part) {
  return {{pairs(inputs), row / 2, 1}, pairs(panel) + part, kPanel};
}

// Outputs `at` ... of a row from their sums.
inline void put_outputs(const PackedProduct& p, std::int64_t row, std::int64_t at, Floats value) {
  const std::int64_t left = p.outputs - at;
  if (left <= 0) return;
  bf16* to = p.out + row * p.out_row + at;
  if (p.bias != nullptr) value += load_some(p.bias + at, left);
  if (p.add) value += load_some(to, left);
  store_some(to, left, value);
}

struct PackedTile {
  const PackedProduct& p;
  std::int64_t row, panel, part;

  template <int kRows>
  void run() const {
    const std::int64_t to = panel + part;
    Floats sum[kRows][kTileVectors];
    clear(sum);
    accumulate(panel_factors(p.inputs + row * p.depth, p.depth, p.weight + panel * p.depth, part),
               p.depth / 2, sum);
    if (p.bias == nullptr && !p.add && to + kTileOutputs <= p.outputs) {
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kTileVectors; ++v)
          store(p.out + (row + r) * p.out_row + to + v * kLanes, sum[r][v]);
      return;
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kTileVectors; ++v) put_outputs(p, row + r, to + v * kLanes, sum[r][v]);
  }
};

struct PackedSumTile {
  const PackedSum& p;
  std::int64_t row, panel, part;

  template <int kRows>
  void run() const {
    const std::int64_t width = p.sum_row;
    float* to = p.sum + row * width + panel + part;
    Floats sum[kRows][kTileVectors];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kTileVectors; ++v)
        sum[r][v] = p.scale == nullptr ? Floats{}
                                       : load(to + r * width + v * kLanes) * p.scale[row + r];
    accumulate(panel_factors(p.inputs + row * p.part, p.part, p.weight + panel * p.depth, part),
               p.part / 2, sum);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kTileVectors; ++v) store(to + r * width + v * kLanes, sum[r][v]);
  }
};

// A tile of rows after the other through a tile's part of a panel, while its weights are in a cache.
template <class Tile, class Product>
inline void all_tiles(const Product& p) {
  constexpr int kRows = TileShape<Pair>::kRows;
  for (std::int64_t panel = 0; panel < p.outputs; panel += kPanel)
    for (std::int64_t part = 0; part < kPanel; part += kTileOutputs)
      for (std::int64_t row = 0; row < p.rows; row += kRows)
        run_rows<kRows>(p.rows - row, Tile{p, row, panel, part});
}


PROTOTOK_TARGET_END
