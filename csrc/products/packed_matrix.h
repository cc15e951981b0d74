// A product with a frozen bf16 weight that was laid out once for it. Sums are fp32 and run over the
// inputs in pairs, in one order whatever the rows around, so that a row's result is its own.
// Vectors (packed_tile.h) and tiles (tiled_product.h) read the same panels.
// Letters: M rows, I inputs, O outputs.
#pragma once

#include "simd/arena.h"
#include "simd/bf16.h"
#include "simd/parallel.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace prototok {

constexpr std::int64_t kPanel = 64;  // outputs that are computed side by side

// Rows from which a processor with tiles takes them. A sum in tiles is rounded in another order than
// one in vectors. So whoever asks for a product says whether its rows are few by what belongs to a
// text (its length, its two vectors), never by how many rows happen to share the call.
constexpr std::int64_t kTilesFrom = 5;

constexpr std::int64_t panels_padded(std::int64_t outputs) {
  return (outputs + kPanel - 1) / kPanel * kPanel;
}

// Panels of kPanel outputs, each (I / 2, kPanel, 2), so that a vector holds pairs of inputs of
// neighbouring outputs, and 16 rows of 64 bytes, 256 apart, are a tile of AMX; the outputs that are
// missing in the last panel are zero.
class PackedMatrix {
 public:
  PackedMatrix() = default;
  // Element (o, i) stands at weight[o * output_stride + i * input_stride]; `inputs` is even.
  PackedMatrix(const bf16* weight, std::int64_t outputs, std::int64_t inputs,
               std::int64_t output_stride, std::int64_t input_stride);

  const bf16* data() const { return data_.get(); }
  std::int64_t inputs() const { return inputs_; }
  std::int64_t outputs() const { return outputs_; }

 private:
  std::unique_ptr<bf16[], Free> data_;
  std::int64_t inputs_ = 0, outputs_ = 0;
};

// Of the panels of so many outputs the first of a thread's share.
inline std::int64_t first_output(const Member& member, std::int64_t outputs) {
  return member.first(panels_padded(outputs) / kPanel) * kPanel;
}
inline std::int64_t last_output(const Member& member, std::int64_t outputs) {
  return std::min(outputs, member.last(panels_padded(outputs) / kPanel) * kPanel);
}

struct PackedProduct {
  const bf16* inputs;  // (M, I)
  const bf16* weight;  // PackedMatrix::data()
  const bf16* bias;    // (O,); null = none
  bf16* out;           // (M, O)
  std::int64_t rows, depth, outputs;
  bool add;  // to what `out` holds
  bool few;  // rows of a text: fewer than kTilesFrom
  std::int64_t out_row = outputs;  // from a row of `out` to the next
  const bf16* next = nullptr;  // the weights that will be read after these, where that is known

  // The same of the outputs that are a thread's share.
  PackedProduct of_member(const Member& member) const {
    const std::int64_t first = first_output(member, outputs), last = last_output(member, outputs);
    PackedProduct part = *this;
    part.weight += first * depth;
    if (bias != nullptr) part.bias += first;
    part.out += first;
    part.outputs = last - first;
    return part;
  }
};

// Of a weight (outputs, inputs): for rows of its inputs, and for rows of its outputs (a gradient).
inline PackedMatrix packed(const bf16* weight, std::int64_t outputs, std::int64_t inputs) {
  return {weight, outputs, inputs, inputs, 1};
}
inline PackedMatrix packed_transposed(const bf16* weight, std::int64_t outputs,
                                      std::int64_t inputs) {
  return {weight, inputs, outputs, 1, inputs};
}

// Of a part of the inputs, onto fp32 sums that hold those of other parts.
struct PackedSum {
  const bf16* inputs;  // (M, part)
  const bf16* weight;  // where the part begins in the first panel
  float* sum;          // (M, O rounded up to panels)
  const float* scale;  // (M,) of what `sum` holds; null = it holds nothing yet
  std::int64_t rows, part, depth, outputs;
  bool few;  // rows of a text: fewer than kTilesFrom
  std::int64_t sum_row = panels_padded(outputs);  // from a row of `sum` to the next
  const bf16* next = nullptr;

  // The same of the outputs that are a thread's share.
  PackedSum of_member(const Member& member) const {
    const std::int64_t first = first_output(member, outputs), last = last_output(member, outputs);
    PackedSum some = *this;
    some.weight += first * depth;
    some.sum += first;
    some.outputs = last - first;
    return some;
  }
};

}  // namespace prototok
