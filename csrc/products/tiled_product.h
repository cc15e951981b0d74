// The products of packed_matrix.h in tiles.
//
// A tile of weights is 16 rows of a panel, 32 inputs deep and 16 outputs wide, read as it lies; one of
// inputs is 16 rows of 32 inputs, read as they lie. Four tiles hold sums over all inputs: above 16
// rows two of rows by two of outputs, so that each tile that is read serves twice, else one by four,
// which is a whole panel. Where rows are no multiple of 16 the last tile of sums and of inputs has
// fewer. Where the depth is no multiple of 32 both factors of its end are copied with zeros behind.
//
// A row's sums run over the depth in steps of 32 whatever the rows around, so a row's result is its
// own.
//
// While few rows pass a panel, the next one is asked for: its 16 rows of a tile lie on a page of their
// own, and the processor foresees no stream across pages.
#pragma once

#include "products/packed_matrix.h"
#include "products/packed_tile.h"
#include "simd/arena.h"
#include "simd/target.h"
#include "simd/tile_config.h"
#include "simd/tiles.h"
#include "simd/vectors.h"

#include <cstdint>
#include <cstring>

PROTOTOK_TARGET_BEGIN

constexpr std::int64_t kAmxDepth = 32;              // inputs of a tile
constexpr std::int64_t kBlockRows = 2 * kAmxRows;  // rows that sums are in tiles for
static_assert(kPanel == 4 * kAmxRowBytes / std::int64_t(sizeof(float)), "a panel is four tiles");

// The end of the depth, zeros behind it.
struct TileTails {
  bf16* inputs;  // (M, kAmxDepth)
  bf16* panel;   // (kAmxDepth / 2, kPanel, 2), of the panel at hand
  TileTails(Arena& arena, std::int64_t rows)
      : inputs(arena.take<bf16>(rows * kAmxDepth)), panel(arena.take<bf16>(kAmxDepth * kPanel)) {}
};

// Rows of inputs and one panel.
struct TileFactors {
  const bf16* inputs;
  std::int64_t row;  // elements from one to the next
  const bf16* panel;
  std::int64_t width;  // outputs that lie side by side in it
  std::int64_t depth;
  const TileTails* tails;  // null: the depth is a multiple of kAmxDepth
};

// What is read next, asked for a cache line after the other.
struct Ahead {
  const unsigned char* next;

  template <int kLines>
  [[gnu::always_inline]] void ask() {
#pragma GCC unroll 16
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(next + i * kLine, 0, 2);
    next += kLines * kLine;
  }

 private:
  static constexpr int kLine = 64;
};

// Tiles are numbered as tile_block_config says. A step asks for kLines cache lines.
template <int kRowTiles, int kColumnTiles, int kLines>
struct TileBlock {
  Tiles& tiles;
  Ahead& ahead;

  // sums (16 kRowTiles, 16 kColumnTiles) = [sums +] inputs panel, for rows from `row` on and outputs
  // from `column` of the panel on. Sums lie `sums_row` apart.
  void run(const TileFactors& f, std::int64_t row, std::int64_t column, float* sums,
           std::int64_t sums_row, bool add) const {
    const bf16 *inputs = f.inputs + row * f.row, *panel = f.panel + 2 * column;
    begin<0>(sums, sums_row, add);
    // What the loop needs is here: to the compiler a load of a tile may change all memory.
    const std::int64_t whole = f.depth / kAmxDepth * kAmxDepth, from_row = f.row, width = f.width;
    Ahead asked = ahead;
    for (std::int64_t k = 0; k < whole; k += kAmxDepth)
      step(inputs + k, from_row, panel + k * width, width, asked);
    if (f.tails != nullptr)
      step(f.tails->inputs + row * kAmxDepth, kAmxDepth, f.tails->panel + 2 * column, width, asked);
    ahead = asked;
    end<0>(sums, sums_row);
  }

 private:
  static constexpr int kInputs = 4, kWeights = kInputs + kRowTiles;
  static_assert(kRowTiles * kColumnTiles <= kInputs && kWeights < kAmxTiles, "four tiles of sums");

  // The tile of the sums of number `index`, counted row by row.
  static constexpr int sums_of(int index) {
    return index / kColumnTiles * (kInputs / kRowTiles) + index % kColumnTiles;
  }
  static float* at(float* sums, std::int64_t sums_row, int index) {
    return sums + index / kColumnTiles * kAmxRows * sums_row + index % kColumnTiles * kAmxRows;
  }

  template <int kIndex>
  [[gnu::always_inline]] void begin(float* sums, std::int64_t sums_row, bool add) const {
    if constexpr (kIndex < kRowTiles * kColumnTiles) {
      constexpr int kTile = sums_of(kIndex);
      if (add)
        tiles.load<kTile>(at(sums, sums_row, kIndex), sums_row * std::int64_t(sizeof(float)));
      else
        tiles.zero<kTile>();
      begin<kIndex + 1>(sums, sums_row, add);
    }
  }

  template <int kIndex>
  [[gnu::always_inline]] void end(float* sums, std::int64_t sums_row) const {
    if constexpr (kIndex < kRowTiles * kColumnTiles) {
      tiles.store<sums_of(kIndex)>(at(sums, sums_row, kIndex),
                                   sums_row * std::int64_t(sizeof(float)));
      end<kIndex + 1>(sums, sums_row);
    }
  }

  [[gnu::always_inline]] void step(const bf16* inputs, std::int64_t row, const bf16* panel,
                                   std::int64_t width, Ahead& asked) const {
    load_inputs<0>(inputs, row);
    column<0>(panel, width, asked);
  }

  template <int kRow>
  [[gnu::always_inline]] void load_inputs(const bf16* inputs, std::int64_t row) const {
    if constexpr (kRow < kRowTiles) {
      tiles.load<kInputs + kRow>(inputs + kRow * kAmxRows * row, row * std::int64_t(sizeof(bf16)));
      load_inputs<kRow + 1>(inputs, row);
    }
  }

  template <int kColumn>
  [[gnu::always_inline]] void column(const bf16* panel, std::int64_t width, Ahead& asked) const {
    if constexpr (kColumn < kColumnTiles) {
      constexpr int kTile = kWeights + kColumn % (kAmxTiles - kWeights);
      tiles.load<kTile>(panel + kColumn * 2 * kAmxRows, width * std::int64_t(sizeof(Pair)));
      asked.ask<kLines / kColumnTiles>();
      dots<0, kColumn, kTile>();
      column<kColumn + 1>(panel, width, asked);
    }
  }

  template <int kRow, int kColumn, int kTile>
  [[gnu::always_inline]] void dots() const {
    if constexpr (kRow < kRowTiles) {
      tiles.dot<sums_of(kRow * kColumnTiles + kColumn), kInputs + kRow, kTile>();
      dots<kRow + 1, kColumn, kTile>();
    }
  }
};

inline void copy_inputs_tail(const bf16* inputs, std::int64_t rows, std::int64_t depth, bf16* to) {
  const std::int64_t whole = depth / kAmxDepth * kAmxDepth;
  std::memset(to, 0, std::size_t(rows * kAmxDepth) * sizeof(bf16));
  for (std::int64_t r = 0; r < rows; ++r)
    std::memcpy(to + r * kAmxDepth, inputs + r * depth + whole,
                std::size_t(depth - whole) * sizeof(bf16));
}

inline void copy_panel_tail(const bf16* panel, std::int64_t depth, bf16* to) {
  const std::int64_t whole = depth / kAmxDepth * kAmxDepth, left = depth - whole;
  std::memcpy(to, panel + whole * kPanel, std::size_t(left * kPanel) * sizeof(bf16));
  std::memset(to + left * kPanel, 0, std::size_t((kAmxDepth - left) * kPanel) * sizeof(bf16));
}

// What tiles of sums are stored to, and what becomes of them, for bf16 outputs ...
struct TiledOutputs {
  const PackedProduct& p;
  float* block;  // (kBlockRows, kPanel)

  bool add() const { return false; }
  std::int64_t row() const { return kPanel; }
  float* begin(std::int64_t, std::int64_t, std::int64_t) const { return block; }
  void end(std::int64_t first, std::int64_t rows, std::int64_t panel) const {
    if (p.bias == nullptr && !p.add && panel + kPanel <= p.outputs) {
      for (std::int64_t r = 0; r < rows; ++r)
        convert(block + r * kPanel, p.out + (first + r) * p.out_row + panel);
      return;
    }
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t t = 0; t < kPanel; t += kLanes)
        put_outputs(p, first + r, panel + t, load(block + r * kPanel + t));
  }

 private:
  static void convert(const float* sums, bf16* out) {
#pragma GCC unroll 4
    for (std::int64_t t = 0; t < kPanel; t += 2 * kLanes)
      store_two(out + t, load(sums + t), load(sums + t + kLanes));
  }
};

// ... and for fp32 sums, which stay where they are.
struct TiledSums {
  const PackedSum& p;

  bool add() const { return p.scale != nullptr; }
  std::int64_t row() const { return p.sum_row; }
  float* begin(std::int64_t first, std::int64_t rows, std::int64_t panel) const {
    float* sums = p.sum + first * row() + panel;
    for (std::int64_t r = 0; add() && r < rows; ++r)
      if (p.scale[first + r] != 1.0f)
        copy_scaled(sums + r * row(), sums + r * row(), kPanel, p.scale[first + r]);
    return sums;
  }
  void end(std::int64_t, std::int64_t, std::int64_t) const {}
};

// inputs (M, depth); a panel begins every panel_size elements.
struct TiledShape {
  const bf16* inputs;
  std::int64_t rows, depth;
  const bf16* weight;
  std::int64_t panel_size, outputs;
  const bf16* next;  // what is read after the last panel; null = not known
};

// All rows pass a panel while it is in a cache. Of the next one they ask for kLines cache lines a step.
template <int kLines, class Sums>
inline void all_blocks(const TiledShape& shape, const Sums& sums) {
  const std::int64_t rows = shape.rows, depth = shape.depth;
  const bool tail = depth % kAmxDepth != 0;
  const Scratch<TileTails> tails(tail ? rows : 0);
  if (tail) copy_inputs_tail(shape.inputs, rows, depth, tails->inputs);
  Tiles tiles;
  const bf16* weight = shape.weight;
  for (std::int64_t panel = 0; panel < shape.outputs; panel += kPanel) {
    if (tail) copy_panel_tail(weight, depth, tails->panel);
    const TileFactors factors{shape.inputs, depth, weight, kPanel, depth,
                              tail ? &*tails : nullptr};
    weight += shape.panel_size;
    const bool more = panel + kPanel < shape.outputs || shape.next == nullptr;
    Ahead ahead{reinterpret_cast<const unsigned char*>(more ? weight : shape.next)};
    for (std::int64_t first = 0; first < rows; first += kBlockRows) {
      const std::int64_t count = least(kBlockRows, rows - first);
      float* to = sums.begin(first, count, panel);
      tiles.shape(kTileBlockConfigs.of_rows[count]);
      if (count > kAmxRows)
        for (std::int64_t column = 0; column < kPanel; column += 2 * kAmxRows)
          TileBlock<2, 2, kLines>{tiles, ahead}.run(factors, first, column, to + column,
                                                    sums.row(), sums.add());
      else
        TileBlock<1, 4, 2 * kLines>{tiles, ahead}.run(factors, first, 0, to, sums.row(),
                                                      sums.add());
      sums.end(first, count, panel);
    }
  }
}

// A panel is 32 cache lines for each step of a block of rows. All blocks of rows together ask for half
// of them, evenly: what waits for memory takes the room of what is read from the second cache, and from
// there on the processor foresees the rest (measured: docs/dev/log.md).
template <class Sums>
inline void tiled(const TiledShape& shape, const Sums& sums) {
  const std::int64_t blocks = (shape.rows + kBlockRows - 1) / kBlockRows;
  if (blocks == 1) return all_blocks<16>(shape, sums);
  if (blocks == 2) return all_blocks<8>(shape, sums);
  if (blocks < 12) return all_blocks<4>(shape, sums);
  all_blocks<2>(shape, sums);
}

inline void tiled_product(const PackedProduct& p) {
  alignas(64) float block[kBlockRows * kPanel];
  tiled({p.inputs, p.rows, p.depth, p.weight, kPanel * p.depth, p.outputs, p.next},
        TiledOutputs{p, block});
}

inline void tiled_sum(const PackedSum& p) {
  tiled({p.inputs, p.rows, p.part, p.weight, kPanel * p.depth, p.outputs, p.next}, TiledSums{p});
}

PROTOTOK_TARGET_END
