// One forward: it lays vectors out over the positions of texts, takes them through blocks and head, and
// gives the id behind each position. For a small model a call costs little more than its products.
// Letters: R texts, N positions, S vectors of a text, d hidden size.
#pragma once

#include "engines/decoder_blocks.h"
#include "engines/packed_head.h"

#include <cstdint>

namespace prototok {

struct OneForward {
  BlocksInput blocks;  // from the first block on; what enters is made here
  std::int64_t slots;  // S
  const bf16* vectors;          // (R, S, d)
  const std::int64_t* layout;   // (N,) in [0, S): the vector at each position
};

// ids (R, N): the argmax of the logits, the lowest id among equals.
void one_forward(const DecoderBlocks& blocks, PackedHead& head, OneForward input, std::int64_t* ids,
                 int threads);

}  // namespace prototok
