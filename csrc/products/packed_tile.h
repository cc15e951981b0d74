// The products of packed_matrix.h in vectors.
//
// A tile is kRows rows by one panel. Its sums stay in registers over all inputs, while a panel's
// weights come from the caches a cache line a vector: 24 sums, 4 vectors of weights and one of a
// row's pair are 29 of 32 registers.
#pragma once

#include "products/packed_matrix.h"
#include "products/tile.h"
#include "simd/target.h"
#include "simd/vectors.h"

#include <cstdint>

PROTOTOK_TARGET_BEGIN

constexpr int kPanelVectors = int(kPanel) / kLanes;
static_assert(kPanelVectors == TileShape<Pair>::kVectors, "a panel is as wide as a tile");

// Rows of `inputs`, `row` elements apart, and a panel.
inline Outer<Pair> panel_factors(const bf16* inputs, std::int64_t row, const bf16* panel) {
  return {{pairs(inputs), row / 2, 1}, pairs(panel), kPanel};
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
  std::int64_t row, panel;

  template <int kRows>
  void run() const {
    Floats sum[kRows][kPanelVectors];
    clear(sum);
    accumulate(panel_factors(p.inputs + row * p.depth, p.depth, p.weight + panel * p.depth),
               p.depth / 2, sum);
    if (p.bias == nullptr && !p.add && panel + kPanel <= p.outputs) {
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kPanelVectors; ++v)
          store(p.out + (row + r) * p.out_row + panel + v * kLanes, sum[r][v]);
      return;
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kPanelVectors; ++v)
        put_outputs(p, row + r, panel + v * kLanes, sum[r][v]);
  }
};

struct PackedSumTile {
  const PackedSum& p;
  std::int64_t row, panel;

  template <int kRows>
  void run() const {
    const std::int64_t width = p.sum_row;
    float* to = p.sum + row * width + panel;
    Floats sum[kRows][kPanelVectors];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kPanelVectors; ++v)
        sum[r][v] = p.scale == nullptr ? Floats{}
                                       : load(to + r * width + v * kLanes) * p.scale[row + r];
    accumulate(panel_factors(p.inputs + row * p.part, p.part, p.weight + panel * p.depth),
               p.part / 2, sum);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kPanelVectors; ++v) store(to + r * width + v * kLanes, sum[r][v]);
  }
};

// A tile of rows after the other through a panel, while its weights are in a cache.
template <class Tile, class Product>
inline void all_tiles(const Product& p) {
  constexpr int kRows = TileShape<Pair>::kRows;
  for (std::int64_t panel = 0; panel < p.outputs; panel += kPanel)
    for (std::int64_t row = 0; row < p.rows; row += kRows)
      run_rows<kRows>(p.rows - row, Tile{p, row, panel});
}


PROTOTOK_TARGET_END
