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
  float* rescale;  // (tile,)
  TileScratch(Arena& arena, std::int64_t tile, std::int64_t hidden)
      : logits(arena.take<bf16>(tile * kHeadChunk)),
        sum(arena.take<float>(tile * panels_padded(hidden))),
        rescale(arena.take<float>(tile)) {}
};

struct ArgmaxScratch {
  bf16* logits;      // (tile, kArgmaxChunk)
  float* best;       // (tile,)
  ArgmaxScratch(Arena& arena, std::int64_t tile)
      : logits(arena.take<bf16>(tile * kArgmaxChunk)), best(arena.take<float>(tile)) {}
};

// What threads that share outputs found, a row of it each.
struct Found {
  float* best;       // (threads, tile)
  std::int64_t* id;  // (threads, tile)
  Found(Arena& arena, std::int64_t threads, std::int64_t tile)
      : best(arena.take<float>(threads * tile)), id(arena.take<std::int64_t>(threads * tile)) {}
};

// The rows of a tile, `most` at the most, of which a thread has some: alike, so that none waits for
// another.
std::int64_t alike(std::int64_t rows, std::int64_t most, int threads) {
  const std::int64_t share = (rows + threads - 1) / threads;
  const std::int64_t tiles = (share + most - 1) / most;
  return (share + tiles - 1) / tiles;
}

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
  head.vocabulary = V;
  check_targets(head);
  if (head.rows == 0) return;
  if (grad != nullptr)
    std::call_once(packed_to_hidden_, [&] { to_hidden_ = packed_transposed(weight_, V, d); });
  const auto tile_of = [&](std::int64_t begin, std::int64_t end, const TileScratch& scratch,
                           const Member& member) {
    // The weights of the gradient are there, and safe to look at, only where it is asked for.
    const bf16* to_hidden = grad == nullptr ? nullptr : to_hidden_.data();
    PackedHeadTile part{head, member, d, hidden + begin * d, weight_, to_logits_.data(),
                        to_hidden, grad == nullptr ? nullptr : grad + begin * d,
                        scratch.logits, scratch.sum, scratch.rescale};
    part.head.rows = end - begin;
    part.head.targets += begin;
    if (head.token_weight != nullptr) part.head.token_weight += begin;
    part.head.loss += begin;
    part.head.predicted += begin;
    part.head.margin += begin;
    kernels_.pairs->head_tile(part);
  };
  tile = std::min(tile, kHeadTile);
  if (kernels_.pairs->by_outputs && head.rows <= tile) {
    const Scratch<TileScratch> scratch(head.rows, d);
    parallel_team(threads, [&](const Member& member) { tile_of(0, head.rows, *scratch, member); });
    return;
  }
  tile = alike(head.rows, tile, threads);
  parallel_rows(head.rows, tile, threads, [&](std::int64_t begin, std::int64_t end) {
    const Scratch<TileScratch> scratch(tile, d);
    tile_of(begin, end, *scratch, Member());
  });
}

void PackedHead::argmax(const bf16* hidden, std::int64_t rows, std::int64_t* ids,
                        int threads) const {
  const std::int64_t V = to_logits_.outputs(), d = to_logits_.inputs();
  if (!kernels_.pairs->by_outputs || rows > kHeadTile) {
    parallel_rows(rows, alike(rows, kHeadTile, threads), threads,
                  [&](std::int64_t begin, std::int64_t end) {
                    const Scratch<ArgmaxScratch> scratch(end - begin);
                    kernels_.pairs->argmax_tile({end - begin, d, hidden + begin * d,
                                                 to_logits_.data(), 0, V, scratch->logits,
                                                 scratch->best, ids + begin});
                  });
    return;
  }
  const Scratch<Found> found(threads, rows);
  parallel_team(threads, [&](const Member& member) {
    const Scratch<ArgmaxScratch> scratch(rows);
    const std::int64_t at = member.index() * rows;
    kernels_.pairs->argmax_tile({rows, d, hidden, to_logits_.data(), first_output(member, V),
                                 last_output(member, V), scratch->logits, found->best + at,
                                 found->id + at});
    member.meet();
    for (std::int64_t r = member.first(rows); r < member.last(rows); ++r) {
      std::int64_t of = r;  // the first of equals, which has the lowest id
      for (std::int64_t i = r + rows; i < member.count() * rows; i += rows)
        if (found->best[i] > found->best[of]) of = i;
      ids[r] = found->id[of];
    }
  });
}

}  // namespace prototok
