#include "products/packed_matrix.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace prototok {

// A panel is read from end to end: on small pages the processor stops foreseeing it every 4 KiB.
constexpr std::size_t kHugePage = std::size_t(2) << 20;

PackedMatrix::PackedMatrix(const bf16* weight, std::int64_t outputs, std::int64_t inputs,
                           std::int64_t output_stride, std::int64_t input_stride)
    : inputs_(inputs), outputs_(outputs) {
  const std::size_t bytes = std::size_t(panels_padded(outputs) * inputs) * sizeof(bf16);
  const std::size_t page = bytes >= kHugePage / 2 ? kHugePage : 64;
  const std::size_t whole = (bytes + page - 1) / page * page;
  data_.reset(reinterpret_cast<bf16*>(aligned_bytes(whole, page).release()));
#if defined(__linux__)
  // Pages that were in use before are let go first: only memory without any gets large ones. Where
  // either call fails, small pages serve as well.
  if (page == kHugePage) {
    madvise(data_.get(), whole, MADV_DONTNEED);
    madvise(data_.get(), whole, MADV_HUGEPAGE);
  }
#endif
  bf16* to = data_.get();
  for (std::int64_t first = 0; first < outputs; first += kPanel)
    for (std::int64_t i = 0; i < inputs; i += 2)
      for (std::int64_t o = first; o < first + kPanel; ++o)
        for (std::int64_t pair = 0; pair < 2; ++pair)
          *to++ = o < outputs ? weight[o * output_stride + (i + pair) * input_stride] : bf16{0};
}

}  // namespace prototok
