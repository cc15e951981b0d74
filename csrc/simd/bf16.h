#pragma once

#include <cstdint>

namespace prototok {

// bfloat16 as it lies in memory: the upper half of a float.
struct bf16 {
  std::uint16_t bits;
};

}  // namespace prototok
