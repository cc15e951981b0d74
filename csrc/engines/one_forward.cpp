#include "engines/one_forward.h"

#include "simd/arena.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

namespace prototok {
namespace {

// Of M positions of all texts. Not a thread's scratch memory, which stays: there may be many.
struct Between {
  bf16 *stream, *hidden;   // (M, d)
  std::int64_t* targets;   // (M,), which the head asks for
  float *loss, *margin;    // (M,), which it gives with them
  Between(Arena& arena, std::int64_t M, std::int64_t d)
      : stream(arena.take<bf16>(M * d)), hidden(arena.take<bf16>(M * d)),
        targets(arena.take<std::int64_t>(M)), loss(arena.take<float>(M)),
        margin(arena.take<float>(M)) {}
};

}  // namespace

void one_forward(const DecoderBlocks& blocks, PackedHead& head, OneForward input, std::int64_t* ids,
                 int threads) {
  const std::int64_t R = input.blocks.texts, N = input.blocks.length, d = blocks.model().hidden;
  const std::size_t bytes = bytes_of<Between>(R * N, d);
  const std::unique_ptr<unsigned char[], Free> memory(
      static_cast<unsigned char*>(std::aligned_alloc(64, bytes)));
  if (!memory && bytes > 0) throw std::bad_alloc();
  Arena arena(memory.get(), bytes);
  const Between between(arena, R * N, d);
  for (std::int64_t r = 0; r < R; ++r)
    for (std::int64_t n = 0; n < N; ++n)
      std::copy_n(input.vectors + (r * input.slots + input.layout[n]) * d, d,
                  between.stream + (r * N + n) * d);
  input.blocks.of = {between.stream, nullptr, nullptr};
  blocks.forward(input.blocks, between.hidden, nullptr, threads);
  std::fill_n(between.targets, R * N, std::int64_t{0});
  Head asked{};
  asked.element = Element::bf16;
  asked.rows = R * N;
  asked.temperature = 1.0f;
  asked.targets = between.targets;
  asked.loss = between.loss;
  asked.predicted = ids;
  asked.margin = between.margin;
  head.run(between.hidden, nullptr, asked, kHeadTile, threads);
}

}  // namespace prototok
