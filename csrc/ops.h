// The CPU operations over whole tensors: plain pointers and sizes, contiguous rows.
// Letters: R rows, V vocabulary, D coordinates a row.
#pragma once

#include "row_kernels.h"

#include <cstdint>
#include <string>
#include <vector>

namespace prototok {

// The instruction sets that this processor can run, best first; the names `kernels_for` takes.
std::vector<std::string> instruction_sets();

// Throws std::invalid_argument for a name that `instruction_sets` does not list; "" is the best.
const RowKernels& kernels_for(const std::string& instruction_set);

enum class Element { f32, bf16 };

struct Head {
  const void* logits;         // (R, V)
  void* gradient;             // (R, V), may be `logits`; null when not wanted
  const std::int64_t* targets;  // (R,) in [0, V)
  const float* token_weight;  // (R,); null = ones
  float temperature;
  std::int64_t rows, vocabulary;
  Element element;
  float* loss;               // (R,)
  std::int64_t* predicted;   // (R,)
  float* margin;             // (R,)
};

// Throws std::out_of_range, with nothing written, when a target is not in [0, V).
void head(const Head& head, const RowKernels& kernels, int threads);

struct AdamW {
  float* param;               // (R, D), and so are the next three
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
  std::int64_t* step;         // (R,) updates done so far
  const float* lr;            // (R,)
  const std::uint8_t* active;  // (R,) 0 or 1; the other rows are not touched
  std::int64_t rows, coordinates;
  double beta1, beta2, eps, weight_decay;
};

void adamw(const AdamW& adamw, const RowKernels& kernels, int threads);

}  // namespace prototok
