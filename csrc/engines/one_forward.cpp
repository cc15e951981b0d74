#include "engines/one_forward.h"

#include "simd/arena.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace prototok {
namespace {

// Of M positions of all texts. Not a thread's scratch memory, which stays: there may be many.
struct Between {
  bf16 *stream, *hidden;  // (M, d)
  Between(Arena& arena, std::int64_t M, std::int64_t d)
      : stream(arena.take<bf16>(M * d)), hidden(arena.take<bf16>(M * d)) {}
};

void copy_vector(const bf16* from, std::int64_t d, bf16* to) { std::copy_n(from, d, to); }
void copy_vector(const float* from, std::int64_t d, bf16* to) {
  std::transform(from, from + d, to, rounded);
}

}  // namespace

PreparedForward::PreparedForward(const DecoderBlocks& blocks, const PackedHead& head,
                                 const BlocksInput& constants, std::vector<std::int64_t> layout)
    : blocks_(blocks), head_(head), constants_(constants), layout_(std::move(layout)) {
  if (head.hidden() != hidden())
    throw std::invalid_argument("head: must be of the blocks' hidden size");
  for (const std::int64_t slot : layout_) {
    if (slot < 0) throw std::invalid_argument("layout: must be of vectors that there are");
    fewest_slots_ = std::max(fewest_slots_, slot + 1);
  }
}

template <class T>
void PreparedForward::operator()(const T* vectors, std::int64_t texts, std::int64_t slots,
                                 std::int64_t* ids, std::int64_t tile, int threads) const {
  const std::int64_t N = length(), d = hidden();
  const std::size_t bytes = bytes_of<Between>(texts * N, d);
  const AlignedBytes memory = aligned_bytes(bytes);
  Arena arena(memory.get(), bytes);
  const Between between(arena, texts * N, d);
  for (std::int64_t r = 0; r < texts; ++r)
    for (std::int64_t n = 0; n < N; ++n)
      copy_vector(vectors + (r * slots + layout_[std::size_t(n)]) * d, d,
                  between.stream + (r * N + n) * d);
  BlocksInput input = constants_;
  input.texts = texts;
  input.tile = std::min(tile, texts);
  input.of = {between.stream, nullptr, nullptr};
  blocks_.forward(input, between.hidden, nullptr, threads);
  head_.argmax(between.hidden, texts * N, ids, threads);
}

template void PreparedForward::operator()(const float*, std::int64_t, std::int64_t, std::int64_t*,
                                          std::int64_t, int) const;
template void PreparedForward::operator()(const bf16*, std::int64_t, std::int64_t, std::int64_t*,
                                          std::int64_t, int) const;

}  // namespace prototok
