#include "engines/packed_head.h"

#include "simd/arena.h"
#include "simd/parallel.h"
#include "targets/dispatch.h"

#include <algorithm>
#include <stdexcept>

namespace prototok {
namespace {

struct TileScratch {
  bf16* logits;  // (tile, kHeadChunk)
  float* sum;    // (tile, d rounded up to panels)
  TileScratch(Arena& arena, std::int64_t tile, std::int64_t hidden)
      : logits(arena.take<bf16>(tile * kHeadChunk)),
        sum(arena.take<float>(tile * panels_padded(hidden))) {}
};

}  // namespace

PackedHead::PackedHead(const bf16* weight, std::int64_t vocabulary, std::int64_t hidden)
    : kernels_(kernels_with_pairs()), weight_(weight) {
  if (vocabulary % 2 || hidden % 2)
    throw std::invalid_argument("weight: must have an even number of rows and columns");
  to_logits_ = packed(weight, vocabulary, hidden);
}

std::int64_t PackedHead::workspace_bytes(std::int64_t tile) const {
  return std::int64_t(bytes_of<TileScratch>(tile, to_logits_.inputs()));
}

void PackedHead::run(const bf16* hidden, bf16* grad, Head head, std::int64_t tile, int threads) {
  const std::int64_t V = to_logits_.outputs(), d = to_logits_.inputs();
  tile = std::min(tile, kHeadTile);
  head.vocabulary = V;
  check_targets(head);
  if (grad != nullptr)
    std::call_once(packed_to_hidden_, [&] { to_hidden_ = packed_transposed(weight_, V, d); });
  parallel_rows(head.rows, tile, threads, [&](std::int64_t begin, std::int64_t end) {
    const Scratch<TileScratch> scratch(tile, d);
    PackedHeadTile part{head, d, hidden + begin * d, weight_, to_logits_.data(), to_hidden_.data(),
                        grad == nullptr ? nullptr : grad + begin * d, scratch->logits,
                        scratch->sum};
    part.head.rows = end - begin;
    part.head.targets += begin;
    if (head.token_weight != nullptr) part.head.token_weight += begin;
    part.head.loss += begin;
    part.head.predicted += begin;
    part.head.margin += begin;
    kernels_.pairs->head_tile(part);
  });
}

}  // namespace prototok
