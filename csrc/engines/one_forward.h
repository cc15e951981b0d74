// One forward: it lays vectors out over the positions of texts, takes them through blocks and head, and
// gives the id behind each position. For a small model a call costs little more than its products, so
// what is the same for all texts of a layout is looked at once.
// Letters: R texts, N positions, S vectors of a text, d hidden size.
#pragma once

#include "engines/decoder_blocks.h"
#include "engines/packed_head.h"

#include <cstdint>
#include <vector>

namespace prototok {

class PreparedForward {
 public:
  // `constants`: of any number of texts; what enters is made here. layout (N,): the vector at each
  // position. Blocks, head, and what `constants` points to must live as long.
  PreparedForward(const DecoderBlocks& blocks, const PackedHead& head,
                  const BlocksInput& constants, std::vector<std::int64_t> layout);

  std::int64_t hidden() const { return blocks_.model().hidden; }
  std::int64_t length() const { return constants_.length; }
  std::int64_t fewest_slots() const { return fewest_slots_; }  // that the layout can be of

  // vectors (R, S, d), float or bf16, S at least fewest_slots() -> ids (R, N): the argmax of the
  // logits, the lowest id among equals. `tile`: as of BlocksInput.
  template <class T>
  void operator()(const T* vectors, std::int64_t texts, std::int64_t slots, std::int64_t* ids,
                  std::int64_t tile, int threads) const;

 private:
  const DecoderBlocks& blocks_;
  const PackedHead& head_;
  BlocksInput constants_;
  std::vector<std::int64_t> layout_;
  std::int64_t fewest_slots_ = 0;
};

}  // namespace prototok
