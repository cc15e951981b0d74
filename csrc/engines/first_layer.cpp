#include "engines/first_layer.h"

#include "ops/ops.h"
#include "simd/parallel.h"

#include <stdexcept>
#include <vector>

namespace prototok {
namespace {

constexpr std::int64_t kVector = 16;

std::int64_t rounded(std::int64_t count, std::int64_t to) { return (count + to - 1) / to * to; }

// What a direction does not use is null.
template <class T>
T* from(T* first, std::int64_t offset) {
  return first == nullptr ? nullptr : first + offset;
}

}  // namespace

FirstLayerSizes::FirstLayerSizes(const FirstLayerModel& model, std::int64_t length)
    : length(length),
      heads(model.heads),
      span(model.heads + 2),
      hidden(model.hidden),
      wide(model.activation.gated ? 2 * model.activation.inner : model.activation.inner),
      stacked((model.heads + 2 * model.kv_heads) * model.head_size),
      mixed(model.heads * model.head_size),
      coef_row(rounded(span, kVector) + kVector),  // the heads' vectors begin two behind its own
      head_row(rounded(heads, kVector)),
      hidden_row(rounded(hidden, kPanel)),
      wide_row(rounded(wide, kPanel)),
      stacked_row(rounded(stacked, kPanel)),
      mixed_row(rounded(mixed, kPanel)),
      table_row(rounded(model.head_size + 1, kVector)) {}

std::int64_t FirstLayerSizes::saved_floats() const {
  return length * (coef_row + head_row) + rounded(length, kVector) +
         span * (hidden_row + wide_row) + 2 * stacked_row + kVector;
}

std::int64_t FirstLayerSizes::scratch_floats() const {
  const std::int64_t of_span =
      span * (3 * hidden_row + coef_row + 2 * wide_row + mixed_row + 4 * table_row);
  const std::int64_t of_positions =
      length * (2 * coef_row + hidden_row + wide_row + table_row + 2 * head_row);
  return of_span + of_positions + 8 * (hidden_row + wide_row + stacked_row + mixed_row);
}

FirstLayer::FirstLayer(const FirstLayerModel& model) : model_(model) {
  kernels_for("avx512bf16");
  const FirstLayerSizes size(model, 1);
  if (model.hidden % 2 || model.activation.inner % 2 || model.head_size % 2)
    throw std::invalid_argument("model: must be of even sizes");
  forward_ = {packed(model.qkv, size.stacked, size.hidden),
              packed(model.out, size.hidden, size.mixed), packed(model.up, size.wide, size.hidden),
              packed(model.down, size.hidden, model.activation.inner)};
}

std::int64_t FirstLayer::saved_floats(std::int64_t length) const {
  return FirstLayerSizes(model_, length).saved_floats();
}

template <class Body>
void FirstLayer::each_text(const FirstLayerTexts& texts, std::int64_t rows, std::int64_t length,
                           int threads, const Body& body) const {
  const FirstLayerSizes size(model_, length);
  const std::uintptr_t bytes = std::uintptr_t(size.scratch_floats()) * sizeof(float);
  const std::int64_t d = size.hidden, of_text = length * d;
  parallel_rows(rows, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    static thread_local std::vector<unsigned char> memory;
    float* scratch = reinterpret_cast<float*>(at_least(memory, bytes));
    for (std::int64_t row = begin; row < end; ++row) {
      FirstLayerTexts text = texts;
      text.e += row * d;
      text.m += row * d;
      text.saved += row * size.saved_floats();
      text.out = from(texts.out, row * of_text);
      text.grad = from(texts.grad, row * of_text);
      text.grad_e = from(texts.grad_e, row * d);
      text.grad_m = from(texts.grad_m, row * d);
      body(text, scratch);
    }
  });
}

void FirstLayer::forward(const FirstLayerTexts& texts, std::int64_t rows, std::int64_t length,
                         int threads) const {
  each_text(texts, rows, length, threads, [&](const FirstLayerTexts& text, float* scratch) {
#if defined(__x86_64__)
    first_layer_forward_avx512bf16({model_, forward_, text, length, scratch});
#endif
  });
}

void FirstLayer::backward(const FirstLayerTexts& texts, std::int64_t rows, std::int64_t length,
                          int threads) {
  std::call_once(packed_backward_, [&] {
    const FirstLayerSizes size(model_, length);
    backward_ = {packed_transposed(model_.qkv, size.stacked, size.hidden),
                 packed_transposed(model_.out, size.hidden, size.mixed),
                 packed_transposed(model_.up, size.wide, size.hidden),
                 packed_transposed(model_.down, size.hidden, model_.activation.inner)};
  });
  each_text(texts, rows, length, threads, [&](const FirstLayerTexts& text, float* scratch) {
#if defined(__x86_64__)
    first_layer_backward_avx512bf16({model_, backward_, text, length, scratch});
#endif
  });
}

}  // namespace prototok
