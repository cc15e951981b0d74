// What engines do with products of bf16 pairs, on the processors that multiply them fast.
#pragma once

#include "products/packed_matrix.h"

#include <cstdint>

namespace prototok {

struct FirstLayerText;
struct PackedHeadTile;
struct ArgmaxTile;

// One set per instruction set.
struct PairKernels {
  void (*product)(const PackedProduct& product);
  void (*sum)(const PackedSum& sum);
  void (*head_tile)(const PackedHeadTile& tile);
  void (*argmax_tile)(const ArgmaxTile& tile);
  void (*first_layer_forward)(const FirstLayerText& text);
  void (*first_layer_backward)(const FirstLayerText& text);
  std::int64_t tile_rows;  // that a product multiplies at a time
  // Products are so fast that they wait for weights: threads that have one tile share its outputs,
  // not its rows.
  bool by_outputs;
};

}  // namespace prototok
