#include "affine_layer.h"

#include "ops.h"
#include "parallel.h"

#include <stdexcept>
#include <vector>

namespace prototok {
namespace {

constexpr std::int64_t kVector = 16;

// What a direction does not use is null.
template <class T>
T* from(T* first, std::int64_t offset) {
  return first == nullptr ? nullptr : first + offset;
}

std::int64_t rounded(std::int64_t count, std::int64_t to) { return (count + to - 1) / to * to; }

}  // namespace

AffineSizes::AffineSizes(const AffineLayerModel& model, std::int64_t length)
    : length(length),
      heads(model.heads),
      span(model.heads + 2),
      hidden(model.hidden),
      wide(model.activation.gated ? 2 * model.activation.inner : model.activation.inner),
      coef_row(rounded(span, kVector) + kVector),  // the heads' vectors begin two behind its own
      head_row(rounded(heads, kVector)),
      hidden_row(rounded(hidden, kPanel)),
      wide_row(rounded(wide, kPanel)) {}

std::int64_t AffineSizes::saved_floats() const {
  return length * (coef_row + head_row) + rounded(length, kVector) + span * wide_row;
}

std::int64_t AffineSizes::scratch_floats() const {
  const std::int64_t of_span = span * (3 * hidden_row + coef_row + 2 * wide_row);
  const std::int64_t of_positions = length * (3 * coef_row + hidden_row + wide_row);
  return of_span + of_positions + 4 * (hidden_row + wide_row);
}

AffineLayer::AffineLayer(const AffineLayerModel& model) : model_(model) {
  kernels_for("avx512bf16");
  const AffineSizes size(model, 1);
  if (model.hidden % 2 || model.activation.inner % 2)
    throw std::invalid_argument("model: must be of even sizes");
  up_ = packed(model.up, size.wide, size.hidden);
  down_ = packed(model.down, size.hidden, model.activation.inner);
}

std::int64_t AffineLayer::saved_floats(std::int64_t length) const {
  return AffineSizes(model_, length).saved_floats();
}

template <class Body>
void AffineLayer::each_text(const AffineTexts& texts, std::int64_t rows, std::int64_t length,
                            int threads, const Body& body) const {
  const AffineSizes size(model_, length);
  const std::uintptr_t bytes = std::uintptr_t(size.scratch_floats()) * sizeof(float);
  const std::int64_t of_heads = size.heads * length, of_span = size.span * size.hidden;
  const std::int64_t of_text = length * size.hidden;
  parallel_rows(rows, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    static thread_local std::vector<unsigned char> memory;
    float* scratch = reinterpret_cast<float*>(at_least(memory, bytes));
    for (std::int64_t row = begin; row < end; ++row)
      body({from(texts.a, row * of_heads), from(texts.b, row * of_heads),
            texts.span + row * of_span, texts.bias, texts.saved + row * size.saved_floats(),
            from(texts.out, row * of_text), from(texts.grad, row * of_text),
            from(texts.grad_a, row * of_heads), from(texts.grad_b, row * of_heads),
            from(texts.grad_span, row * of_span)},
           scratch);
  });
}

void AffineLayer::forward(const AffineTexts& texts, std::int64_t rows, std::int64_t length,
                          int threads) const {
  each_text(texts, rows, length, threads, [&](const AffineTexts& text, float* scratch) {
#if defined(__x86_64__)
    affine_forward_avx512bf16({model_, text, length, up_.data(), down_.data(), scratch});
#endif
  });
}

void AffineLayer::backward(const AffineTexts& texts, std::int64_t rows, std::int64_t length,
                           int threads) {
  std::call_once(packed_backward_, [&] {
    const AffineSizes size(model_, length);
    up_back_ = packed_transposed(model_.up, size.wide, size.hidden);
    down_back_ = packed_transposed(model_.down, size.hidden, model_.activation.inner);
  });
  each_text(texts, rows, length, threads, [&](const AffineTexts& text, float* scratch) {
#if defined(__x86_64__)
    affine_backward_avx512bf16({model_, text, length, up_back_.data(), down_back_.data(), scratch});
#endif
  });
}

}  // namespace prototok
