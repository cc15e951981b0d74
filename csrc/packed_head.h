// Logits of a frozen bf16 head, what `head` says of them, and the gradient of what they were made
// from, a tile of rows at a time: its logits stay in a thread's cache between the three.
// Letters: R rows, V vocabulary, d hidden size.
#pragma once

#include "ops.h"
#include "packed_product.h"

#include <cstdint>
#include <mutex>

namespace prototok {

class PackedHead {
 public:
  // weight (V, d) must live as long. Throws std::invalid_argument for odd sizes and for a processor
  // without AVX-512 BF16.
  PackedHead(const bf16* weight, std::int64_t vocabulary, std::int64_t hidden);

  // hidden, grad (R, d); grad may be null. Of `head` everything but logits, gradient and
  // vocabulary; throws as `head` does. `tile`: rows whose logits a thread holds.
  void run(const bf16* hidden, bf16* grad, Head head, std::int64_t tile, int threads);

 private:
  const bf16* weight_;
  PackedMatrix to_logits_, to_hidden_;
  std::once_flag packed_to_hidden_;
};

}  // namespace prototok
