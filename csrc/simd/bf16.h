#pragma once

#include <cstdint>
#include <cstring>

namespace prototok {

// bfloat16 as it lies in memory: the upper half of a float.
struct bf16 {
  std::uint16_t bits;
};

// The nearest, the even one of two; NaN stays NaN. What computes rounds whole vectors (vectors.h).
inline bf16 rounded(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return {0x7fc0};
  return {std::uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

}  // namespace prototok
