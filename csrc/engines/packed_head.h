// A frozen bf16 head: what `head` says of its logits, and the gradient of what they were made from,
// a tile of rows and a chunk of the vocabulary at a time, in a thread's cache.
// Letters: R rows, V vocabulary, d hidden size.
#pragma once

#include "ops/ops.h"
#include "products/packed_matrix.h"

#include <cstdint>
#include <mutex>

namespace prototok {

struct Kernels;

constexpr std::int64_t kHeadTile = 256;   // rows that a thread takes at most at a time
constexpr std::int64_t kHeadChunk = 1024;  // logits of a row alive at a time; whole panels

class PackedHead {
 public:
  // weight (V, d) must live as long. Throws std::invalid_argument for odd sizes and for a processor
  // without products of pairs.
  PackedHead(const bf16* weight, std::int64_t vocabulary, std::int64_t hidden);

  std::int64_t vocabulary() const { return to_logits_.outputs(); }
  std::int64_t hidden() const { return to_logits_.inputs(); }

  // Scratch bytes of a thread for a tile of so many rows.
  std::int64_t workspace_bytes(std::int64_t tile) const;

  // hidden, grad (R, d); grad may be null. Of `head` everything but logits, gradient and
  // vocabulary; throws as `head` does. `tile`: rows a thread takes at a time, at most kHeadTile.
  void run(const bf16* hidden, bf16* grad, Head head, std::int64_t tile, int threads);

 private:
  const Kernels& kernels_;
  const bf16* weight_;
  PackedMatrix to_logits_, to_hidden_;
  std::once_flag packed_to_hidden_;
};

// Of `head` the rows of one tile.
struct PackedHeadTile {
  Head head;
  std::int64_t hidden_size;
  const bf16* hidden;     // (rows, d)
  const bf16* weight;     // (V, d)
  const bf16* to_logits;  // PackedMatrix::data()
  const bf16* to_hidden;
  bf16* grad;    // (rows, d); null = not wanted
  bf16* logits;  // (rows, kHeadChunk), overwritten
  float* sum;    // (rows, d rounded up to panels), overwritten
};

}  // namespace prototok
