#include "engines/packed_head.h"

#include "simd/parallel.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

namespace prototok {

PackedHead::PackedHead(const bf16* weight, std::int64_t vocabulary, std::int64_t hidden)
    : weight_(weight) {
  kernels_for("avx512bf16");
  if (vocabulary % 2 || hidden % 2)
    throw std::invalid_argument("weight: must have an even number of rows and columns");
  to_logits_ = packed(weight, vocabulary, hidden);
}

std::int64_t PackedHead::workspace_bytes(std::int64_t tile) const {
  const std::int64_t width = (to_logits_.inputs() + kPanel - 1) / kPanel * kPanel;
  return tile * (kHeadChunk * std::int64_t(sizeof(bf16)) + width * std::int64_t(sizeof(float)));
}

void PackedHead::run(const bf16* hidden, bf16* grad, Head head, std::int64_t tile, int threads) {
  const std::int64_t V = to_logits_.outputs(), d = to_logits_.inputs();
  tile = std::min(tile, kHeadTile);
  head.vocabulary = V;
  check_targets(head);
  if (grad != nullptr)
    std::call_once(packed_to_hidden_, [&] { to_hidden_ = packed_transposed(weight_, V, d); });
  parallel_rows(head.rows, tile, threads, [&](std::int64_t begin, std::int64_t end) {
    static thread_local std::vector<unsigned char> memory;
    unsigned char* workspace = at_least(memory, std::uintptr_t(workspace_bytes(tile)));
    PackedHeadTile part{head, d, hidden + begin * d, weight_, to_logits_.data(), to_hidden_.data(),
                        grad == nullptr ? nullptr : grad + begin * d,
                        reinterpret_cast<bf16*>(workspace),
                        reinterpret_cast<float*>(workspace + tile * kHeadChunk * sizeof(bf16))};
    part.head.rows = end - begin;
    part.head.targets += begin;
    if (head.token_weight != nullptr) part.head.token_weight += begin;
    part.head.loss += begin;
    part.head.predicted += begin;
    part.head.margin += begin;
#if defined(__x86_64__)
    packed_head_tile_avx512bf16(part);
#endif
  });
}

}  // namespace prototok
