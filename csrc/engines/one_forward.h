// One forward of texts to the ids behind their positions: vectors laid out over the positions, through
// blocks and head. What lies between is scratch memory: for a small model a call costs little more than
// its products.
// Letters: R texts, N positions, S vectors of a text, d hidden size.
#pragma once

#include "engines/decoder_blocks.h"
#include "engines/packed_head.h"

#include <cstdint>

namespace prototok {

struct OneForward {
  BlocksInput blocks;  // from the first one on; its stream is made here
  std::int64_t slots;  // S
  const bf16* vectors;          // (R, S, d)
  const std::int64_t* layout;   // (N,) in [0, S): the vector at each position
};

// ids (R, N): the argmax of the logits, the lowest id among equals.
void one_forward(const DecoderBlocks& blocks, PackedHead& head, OneForward input, std::int64_t* ids,
                 int threads);

}  // namespace prototok
