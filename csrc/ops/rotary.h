// Rotary positions.
#pragma once

#include "ops/row_kernels.h"
#include "simd/target.h"
#include "simd/vectors.h"

#include <cstdint>

PROTOTOK_TARGET_BEGIN

// to = scale * a head of `size` coordinates, the first `table.rotary` of them rotated by `direction`
// (1, or -1 to turn back) times the angles of the position. `to` may be `from`.
template <class From, class To>
inline void rotate_head(const From* from, To* to, std::int64_t size, const RotaryTable& table,
                        std::int64_t position, float direction, float scale) {
  const std::int64_t half = table.rotary / 2;
  const float* cos = table.cos + position * table.row;
  const float* sin = table.sin + position * table.row;
  for (std::int64_t t = 0; t < half; t += kLanes) {
    const std::int64_t left = half - t;
    const Floats x = load_some(from + t, left), y = load_some(from + half + t, left);
    const Floats c = load_some(cos + t, left) * scale;
    const Floats s = load_some(sin + t, left) * (scale * direction);
    store_some(to + t, left, x * c - y * s);
    store_some(to + half + t, left, y * c + x * s);
  }
  for (std::int64_t t = 2 * half; t < size; t += kLanes)
    store_some(to + t, size - t, load_some(from + t, size - t) * scale);
}

// The same for heads of consecutive positions, which lie from_row and to_row apart.
template <class From, class To>
inline void rotate_rows(const From* from, std::int64_t from_row, To* to, std::int64_t to_row,
                        std::int64_t rows, std::int64_t size, const RotaryTable& table,
                        std::int64_t position, float direction, float scale) {
  for (std::int64_t i = 0; i < rows; ++i)
    rotate_head(from + i * from_row, to + i * to_row, size, table, position + i, direction, scale);
}

PROTOTOK_TARGET_END
