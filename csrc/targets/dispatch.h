// The instruction sets that the kernels are compiled for, and which of them this processor has.
#pragma once

#include "engines/decoder_kernels.h"
#include "engines/pair_kernels.h"
#include "ops/row_kernels.h"

#include <string>
#include <vector>

namespace prototok {

// Everything that is compiled for one instruction set.
struct Kernels : RowKernels {
  DecoderKernels decoder_f32, decoder_bf16;
  const PairKernels* pairs;  // null: the set has no products of bf16 pairs
};

// The sets that this processor can run, best first; the names `kernels_for` takes.
std::vector<std::string> instruction_sets();

// Throws std::invalid_argument for a name that `instruction_sets` does not list; "" is the best.
const Kernels& kernels_for(const std::string& instruction_set);

// The best set with products of bf16 pairs. Throws std::invalid_argument where there is none.
const Kernels& kernels_with_pairs();

}  // namespace prototok
