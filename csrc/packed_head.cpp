#include "packed_head.h"

#include "parallel.h"

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

void PackedHead::run(const bf16* hidden, bf16* grad, Head head, std::int64_t tile, int threads) {
  const std::int64_t V = to_logits_.outputs(), d = to_logits_.inputs();
  head.vocabulary = V;
  check_targets(head);
  if (grad != nullptr)
    std::call_once(packed_to_hidden_, [&] { to_hidden_ = packed_transposed(weight_, V, d); });
  const RowKernels& kernels = kernels_for("avx512bf16");
  parallel_rows(head.rows, tile, threads, [&](std::int64_t begin, std::int64_t end) {
    static thread_local std::vector<unsigned char> memory;
    bf16* logits =
        reinterpret_cast<bf16*>(at_least(memory, std::uintptr_t(tile * V) * sizeof(bf16)));
    Head part = head;
    part.rows = end - begin;
    part.logits = logits;
    part.gradient = grad == nullptr ? nullptr : logits;
    part.targets += begin;
    if (part.token_weight != nullptr) part.token_weight += begin;
    part.loss += begin;
    part.predicted += begin;
    part.margin += begin;
    multiply(hidden + begin * d, to_logits_, nullptr, logits, part.rows);
    prototok::head(part, kernels, 1);
    if (grad != nullptr) multiply(logits, to_hidden_, nullptr, grad + begin * d, part.rows);
  });
}

}  // namespace prototok
