// A frozen bf16 head: what `head` says of its logits, and the gradient of what they were made from,
// a tile of rows and a chunk of the vocabulary at a time, in a thread's cache. Threads take tiles of
// their own or, where the weights are what they would wait for, share one tile: its products by
// outputs, so that each weight is read by one thread, and what lies between them by rows. A row's
// result is the same in either way.
// Letters: R rows, V vocabulary, d hidden size.
#pragma once

#include "ops/ops.h"
#include "products/packed_matrix.h"
#include "simd/parallel.h"

#include <cstdint>
#include <mutex>

namespace prototok {

struct Kernels;

constexpr std::int64_t kHeadTile = 256;   // rows that a thread takes at most at a time
constexpr std::int64_t kHeadChunk = 1024;  // logits of a row alive at a time; whole panels
constexpr std::int64_t kArgmaxChunk = 512;  // of those that only the largest is wanted of

class PackedHead {
 public:
  // weight (V, d) must live as long. Throws std::invalid_argument for odd sizes and for a processor
  // without products of pairs.
  PackedHead(const bf16* weight, std::int64_t vocabulary, std::int64_t hidden);

  std::int64_t hidden() const { return to_logits_.inputs(); }

  // Scratch bytes of a tile of so many rows.
  std::int64_t workspace_bytes(std::int64_t tile) const;

  // hidden, grad (R, d); grad may be null. Of `head` everything but logits, gradient and
  // vocabulary; throws as `head` does. `tile`: rows that a tile may have; it has at most kHeadTile.
  void run(const bf16* hidden, bf16* grad, Head head, std::int64_t tile, int threads);

  // ids (R,): of the largest logit of each row, the lowest id among equals; 0 where no logit is larger
  // than -inf. As `run` predicts where the target is 0.
  void argmax(const bf16* hidden, std::int64_t rows, std::int64_t* ids, int threads) const;

 private:
  const Kernels& kernels_;
  const bf16* weight_;
  PackedMatrix to_logits_, to_hidden_;
  std::once_flag packed_to_hidden_;
};

// Of rows, among the outputs [begin, end).
struct ArgmaxTile {
  std::int64_t rows, hidden_size;
  const bf16* hidden;      // (rows, d)
  const bf16* to_logits;   // PackedMatrix::data()
  std::int64_t begin, end;  // whole panels, but for the last of all
  bf16* logits;            // (rows, kArgmaxChunk), overwritten
  float* best;             // (rows,)
  std::int64_t* id;        // (rows,)
};

// Of `head` the rows of one tile, and who of those that share it this is.
struct PackedHeadTile {
  Head head;
  Member member;
  std::int64_t hidden_size;
  const bf16* hidden;     // (rows, d)
  const bf16* weight;     // (V, d)
  const bf16* to_logits;  // PackedMatrix::data()
  const bf16* to_hidden;
  bf16* grad;    // (rows, d); null = not wanted
  bf16* logits;  // (rows, kHeadChunk), overwritten
  float* sum;    // (rows, d rounded up to panels), overwritten
  float* rescale;  // (rows,), overwritten
};

}  // namespace prototok
