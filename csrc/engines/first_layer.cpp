#include "engines/first_layer.h"

#include "simd/parallel.h"
#include "targets/dispatch.h"

#include <stdexcept>

namespace prototok {
namespace {

// Up to whole vectors of the sets that have it.
std::int64_t vectors_padded(std::int64_t count) { return (count + 15) / 16 * 16; }

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
      coef_row(vectors_padded(span + 16)),  // the heads' vectors begin two behind its own
      head_row(vectors_padded(heads)),
      hidden_row(panels_padded(hidden)),
      wide_row(panels_padded(wide)),
      stacked_row(panels_padded(stacked)),
      mixed_row(panels_padded(mixed)),
      table_row(vectors_padded(model.head_size + 1)) {}

FirstLayerSaved::FirstLayerSaved(Arena& arena, const FirstLayerSizes& size)
    : coef(arena.take<float>(size.length * size.coef_row)),
      shares(arena.take<float>(size.length * size.head_row)),
      rms_inverse(arena.take<float>(size.length)),
      span(arena.take<float>(size.span * size.hidden_row)),
      projected(arena.take<float>(size.span * size.wide_row)),
      qkv(arena.take<float>(2 * size.stacked_row)),
      statistics(arena.take<NormStatistics>(2)) {}

FirstLayer::FirstLayer(const FirstLayerModel& model)
    : kernels_(kernels_with_pairs()), model_(model) {
  const FirstLayerSizes size(model, 1);
  if (model.hidden % 2 || model.activation.inner % 2 || model.head_size % 2)
    throw std::invalid_argument("model: must be of even sizes");
  forward_ = {packed(model.qkv, size.stacked, size.hidden),
              packed(model.out, size.hidden, size.mixed), packed(model.up, size.wide, size.hidden),
              packed(model.down, size.hidden, model.activation.inner)};
}

std::int64_t FirstLayer::saved_floats(std::int64_t length) const {
  return std::int64_t(bytes_of<FirstLayerSaved>(FirstLayerSizes(model_, length)) / sizeof(float));
}

template <class Body>
void FirstLayer::each_text(const FirstLayerTexts& texts, std::int64_t rows, std::int64_t length,
                           int threads, const Body& body) const {
  const std::int64_t d = model_.hidden, of_text = length * d, saved = saved_floats(length);
  parallel_rows(rows, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      FirstLayerTexts text = texts;
      text.e += row * d;
      text.m += row * d;
      text.saved += row * saved;
      text.out = from(texts.out, row * of_text);
      text.grad = from(texts.grad, row * of_text);
      text.grad_e = from(texts.grad_e, row * d);
      text.grad_m = from(texts.grad_m, row * d);
      body(text);
    }
  });
}

void FirstLayer::forward(const FirstLayerTexts& texts, std::int64_t rows, std::int64_t length,
                         int threads) const {
  each_text(texts, rows, length, threads, [&](const FirstLayerTexts& text) {
    kernels_.pairs->first_layer_forward({model_, forward_, text, length});
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
  each_text(texts, rows, length, threads, [&](const FirstLayerTexts& text) {
    kernels_.pairs->first_layer_backward({model_, backward_, text, length});
  });
}

}  // namespace prototok
