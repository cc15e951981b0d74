// The instruction sets that the kernels are compiled for, and which of them this processor has.
#pragma once

#include "engines/decoder_kernels.h"
#include "engines/pair_kernels.h"
#include "ops/row_kernels.h"

#include <string>
#include <utility>
#include <vector>

namespace prototok {

// Everything that is compiled for one instruction set.
struct Kernels : RowKernels {
  DecoderKernels decoder_f32, decoder_bf16;
  const PairKernels* pairs;  // null: the set has no products of bf16 pairs
};

// The sets that this processor can run, best first.
std::vector<std::string> instruction_sets();

// Those it cannot run, each with the reason.
std::vector<std::pair<std::string, std::string>> missing_instruction_sets();

// Makes a set the best one for this process, and those behind it the only others; "" undoes that.
// Beside what `instruction_sets` lists "amx-emulated" is taken. Throws std::invalid_argument for any
// other name.
void prefer_instruction_set(const std::string& name);

// Takes the same names; "" is the best.
const Kernels& kernels_for(const std::string& instruction_set);

// The best set with products of bf16 pairs. Throws std::invalid_argument where there is none.
const Kernels& kernels_with_pairs();

}  // namespace prototok
