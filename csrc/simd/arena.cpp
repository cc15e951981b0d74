#include "simd/arena.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

namespace prototok {
namespace {

// Only pages that are touched cost memory, and most calls never need a second block.
constexpr std::size_t kSmallestBlock = std::size_t(1) << 20;

struct Block {
  AlignedBytes memory;
  std::size_t bytes = 0, used = 0;

  explicit Block(std::size_t wanted)
      : memory(aligned_bytes(std::max(kSmallestBlock, wanted))),
        bytes(std::max(kSmallestBlock, wanted)) {}
};

// A frame must not move while it lasts. So where a block is full another one is added, and when the
// last frame is gone one block takes the place of all.
struct ThreadMemory {
  std::vector<Block> blocks;
  std::size_t current = 0, frames = 0;
};

ThreadMemory& thread_memory() {
  static thread_local ThreadMemory memory;
  return memory;
}

}  // namespace

AlignedBytes aligned_bytes(std::size_t bytes, std::size_t alignment) {
  const std::size_t units = std::max<std::size_t>(1, (bytes + alignment - 1) / alignment);
  const std::size_t whole = units * alignment;
  AlignedBytes memory(static_cast<unsigned char*>(std::aligned_alloc(alignment, whole)));
  if (!memory) throw std::bad_alloc();
  return memory;
}

ScratchFrame::ScratchFrame(std::size_t bytes) : bytes_(std::max<std::size_t>(64, bytes)) {
  bytes_ = (bytes_ + 63) / 64 * 64;
  ThreadMemory& of = thread_memory();
  block_ = of.current;
  while (block_ < of.blocks.size() &&
         of.blocks[block_].used + bytes_ > of.blocks[block_].bytes)
    ++block_;
  if (block_ == of.blocks.size()) of.blocks.emplace_back(bytes_);
  Block& block = of.blocks[block_];
  begin_ = block.used;
  memory_ = block.memory.get() + begin_;
  block.used += bytes_;
  of.current = block_;
  ++of.frames;
}

ScratchFrame::~ScratchFrame() {
  ThreadMemory& of = thread_memory();
  of.blocks[block_].used = begin_;
  while (of.current > 0 && of.blocks[of.current].used == 0) --of.current;
  if (--of.frames > 0 || of.blocks.size() == 1) return;
  std::size_t total = 0;
  for (const Block& block : of.blocks) total += block.bytes;
  of.blocks.clear();
  try {
    of.blocks.emplace_back(total);
  } catch (const std::bad_alloc&) {
    // The next frame asks again.
  }
}

}  // namespace prototok
