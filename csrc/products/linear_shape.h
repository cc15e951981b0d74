#pragma once

#include <cstdint>

namespace prototok {

struct LinearShape {
  std::int64_t tokens, inputs, outputs;
  bool add;  // to what `out` holds
};

}  // namespace prototok
