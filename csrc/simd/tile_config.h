// What LDTILECFG reads, for the blocks of tiles that products are made of. All of it is constant:
// nothing is written that a compiler could take for unused.
#pragma once

#include <cstdint>

namespace prototok {

constexpr int kAmxRows = 16;      // of a tile at most
constexpr int kAmxRowBytes = 64;  // of a row of a tile at most: 16 floats or pairs of bf16
constexpr int kAmxTiles = 8;

struct alignas(64) TileConfig {
  std::uint8_t palette, start_row, reserved[14];
  std::uint16_t row_bytes[16];
  std::uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "as the instruction reads it");

// A block is four tiles of sums, 0 ... 3: two rows of tiles by two columns or, for up to kAmxRows
// rows, one by four. Tile 4 (and 5 of two rows) holds inputs, those behind them hold weights.
constexpr TileConfig tile_block_config(int rows) {
  TileConfig config{};
  config.palette = 1;
  const int row_tiles = rows > kAmxRows ? 2 : 1;
  for (int tile = 0; tile < kAmxTiles; ++tile) {
    const bool sums = tile < 4, inputs = !sums && tile < 4 + row_tiles;
    const int row_tile = sums ? tile / (4 / row_tiles) : tile - 4;
    const bool last = (sums || inputs) && row_tile == row_tiles - 1;
    config.row_bytes[tile] = kAmxRowBytes;
    config.rows[tile] = std::uint8_t(last ? rows - (row_tiles - 1) * kAmxRows : kAmxRows);
  }
  return config;
}

struct TileBlockConfigs {
  TileConfig of_rows[2 * kAmxRows + 1];
};

constexpr TileBlockConfigs tile_block_configs() {
  TileBlockConfigs configs{};
  for (int rows = 1; rows <= 2 * kAmxRows; ++rows) configs.of_rows[rows] = tile_block_config(rows);
  return configs;
}

inline constexpr TileBlockConfigs kTileBlockConfigs = tile_block_configs();

}  // namespace prototok
