#include "engines/one_forward.h"

#include "simd/arena.h"

#include <algorithm>

namespace prototok {
namespace {

// Of M positions of all texts.
struct ForwardScratch {
  bf16 *stream, *hidden;   // (M, d)
  std::int64_t* targets;   // (M,), which the head asks for
  float *loss, *margin;    // (M,), which it gives with them
  ForwardScratch(Arena& arena, std::int64_t M, std::int64_t d)
      : stream(arena.take<bf16>(M * d)), hidden(arena.take<bf16>(M * d)),
        targets(arena.take<std::int64_t>(M)), loss(arena.take<float>(M)),
        margin(arena.take<float>(M)) {}
};

}  // namespace

void one_forward(const DecoderBlocks& blocks, PackedHead& head, OneForward input, std::int64_t* ids,
                 int threads) {
  const std::int64_t R = input.blocks.texts, N = input.blocks.length, d = blocks.model().hidden;
  const Scratch<ForwardScratch> scratch(R * N, d);
  for (std::int64_t r = 0; r < R; ++r)
    for (std::int64_t n = 0; n < N; ++n)
      std::copy_n(input.vectors + (r * input.slots + input.layout[n]) * d, d,
                  scratch->stream + (r * N + n) * d);
  input.blocks.of = {scratch->stream, nullptr, nullptr};
  blocks.forward(input.blocks, scratch->hidden, nullptr, threads);
  std::fill_n(scratch->targets, R * N, std::int64_t{0});
  Head asked{};
  asked.element = Element::bf16;
  asked.rows = R * N;
  asked.temperature = 1.0f;
  asked.targets = scratch->targets;
  asked.loss = scratch->loss;
  asked.predicted = ids;
  asked.margin = scratch->margin;
  head.run(scratch->hidden, nullptr, asked, kHeadTile, threads);
}

}  // namespace prototok
