#include "engines/first_layer.h"

#include "simd/parallel.h"
#include "targets/dispatch.h"

#include <algorithm>
#include <cstring>
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

void copy_padded(const float* from, std::int64_t count, float* to, std::int64_t to_row,
                 std::int64_t rows) {
  for (std::int64_t r = 0; r < rows; ++r) std::copy_n(from + r * count, count, to + r * to_row);
}

void widen(const bf16* from, std::int64_t count, float* to) {
  for (std::int64_t t = 0; t < count; ++t) {
    const std::uint32_t word = std::uint32_t{from[t].bits} << 16;
    std::memcpy(to + t, &word, sizeof word);
  }
}

}  // namespace

FirstLayerSizes::FirstLayerSizes(const FirstLayerModel& model, std::int64_t length)
    : length(length),
      heads(model.heads),
      hidden(model.hidden),
      wide(model.activation.gated ? 2 * model.activation.inner : model.activation.inner),
      stacked((model.heads + 2 * model.kv_heads) * model.head_size),
      mixed(model.heads * model.head_size),
      front(model.front.length),
      own(2 + model.heads * (front > 0 ? 2 : 1)),
      fixed(front > 0 ? model.heads * (front - 1) : 0),
      span(own + fixed),
      coef_row(vectors_padded(span + 16)),  // the heads' vectors begin two behind its own
      head_row(vectors_padded(heads)),
      hidden_row(panels_padded(hidden)),
      wide_row(panels_padded(wide)),
      stacked_row(panels_padded(stacked)),
      mixed_row(panels_padded(mixed)),
      table_row(vectors_padded(model.head_size + 1)) {}

FirstLayerFront::FirstLayerFront(Arena& arena, const FirstLayerSizes& size)
    : length(size.front),
      keys(arena.take<float>(size.front * (size.stacked - size.mixed) / 2)),
      values(arena.take<float>((size.stacked - size.mixed) / 2)),
      shift(arena.take<float>(size.hidden_row)),
      fixed(arena.take<float>(size.fixed * size.hidden_row)),
      centred(arena.take<float>(size.fixed * size.hidden_row)),
      projected(arena.take<float>(size.fixed * size.wide_row)) {}

FirstLayerSaved::FirstLayerSaved(Arena& arena, const FirstLayerSizes& size)
    : coef(arena.take<float>(size.length * size.coef_row)),
      shares(arena.take<float>(size.length * size.head_row)),
      rms_inverse(arena.take<float>(size.length)),
      span(arena.take<float>(size.own * size.hidden_row)),
      projected(arena.take<float>(size.own * size.wide_row)),
      qkv(arena.take<float>(2 * size.stacked_row)),
      statistics(arena.take<NormStatistics>(2)) {}

FirstLayer::FirstLayer(const FirstLayerModel& model)
    : kernels_(kernels_with_pairs()),
      model_(model),
      packed_(std::make_shared<FirstLayerPacked>()) {
  const FirstLayerSizes size(model, 1);
  if (model.hidden % 2 || model.activation.inner % 2 || model.head_size % 2)
    throw std::invalid_argument("model: must be of even sizes");
  packed_->forward = {packed(model.qkv, size.stacked, size.hidden),
                      packed(model.out, size.hidden, size.mixed),
                      packed(model.up, size.wide, size.hidden),
                      packed(model.down, size.hidden, model.activation.inner)};
}

FirstLayer::FirstLayer(const FirstLayer& bare, const FirstLayerPrefix& prefix)
    : kernels_(bare.kernels_), model_(bare.model_), packed_(bare.packed_) {
  model_.front = {};
  model_.front.length = prefix.length;
  const FirstLayerSizes size(model_, 1);
  const std::size_t bytes = bytes_of<FirstLayerFront>(size);
  front_ = aligned_bytes(bytes);
  std::memset(front_.get(), 0, bytes);
  Arena arena(front_.get(), bytes);
  const FirstLayerFront& front = model_.front = {arena, size};
  const std::int64_t c = model_.head_size, K = model_.kv_heads, P = prefix.length;
  for (std::int64_t k = 0; k < K; ++k) {
    for (std::int64_t j = 0; j < P; ++j)
      widen(prefix.kv + (k * P + j) * c, c, front.keys + (j * K + k) * c);
    widen(prefix.kv + (K + k) * P * c, c, front.values + k * c);
  }
  copy_padded(prefix.shift, size.hidden, front.shift, size.hidden_row, 1);
  copy_padded(prefix.fixed, size.hidden, front.fixed, size.hidden_row, size.fixed);
  copy_padded(prefix.centred, size.hidden, front.centred, size.hidden_row, size.fixed);
  copy_padded(prefix.projected, size.wide, front.projected, size.wide_row, size.fixed);
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
    kernels_.pairs->first_layer_forward({model_, packed_->forward, text, length});
  });
}

void FirstLayer::backward(const FirstLayerTexts& texts, std::int64_t rows, std::int64_t length,
                          int threads) const {
  std::call_once(packed_->with_backward, [&] {
    const FirstLayerSizes size(model_, length);
    packed_->backward = {packed_transposed(model_.qkv, size.stacked, size.hidden),
                         packed_transposed(model_.out, size.hidden, size.mixed),
                         packed_transposed(model_.up, size.wide, size.hidden),
                         packed_transposed(model_.down, size.hidden, model_.activation.inner)};
  });
  each_text(texts, rows, length, threads, [&](const FirstLayerTexts& text) {
    kernels_.pairs->first_layer_backward({model_, packed_->backward, text, length});
  });
}

}  // namespace prototok
