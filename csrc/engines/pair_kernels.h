// What engines do with products of bf16 pairs, on the processors that have an instruction for them.
#pragma once

#include "products/packed_matrix.h"

namespace prototok {

struct FirstLayerText;
struct PackedHeadTile;

// One set per instruction set.
struct PairKernels {
  void (*product)(const PackedProduct& product);
  void (*head_tile)(const PackedHeadTile& tile);
  void (*first_layer_forward)(const FirstLayerText& text);
  void (*first_layer_backward)(const FirstLayerText& text);
};

}  // namespace prototok
