// A text on its way through the first block, in either direction.
#pragma once

#include "engines/first_layer.h"
#include "simd/arena.h"
#include "simd/target.h"

#include <cstdint>

PROTOTOK_TARGET_BEGIN

// A text with its sizes and the memory that both directions share. Of the two vectors m is number 0.
struct FirstLayerPass {
  const FirstLayerModel& model;
  const FirstLayerProducts& products;
  const FirstLayerTexts& text;
  FirstLayerSizes size;
  FirstLayerSaved saved;

  explicit FirstLayerPass(const FirstLayerText& call)
      : model(call.model),
        products(call.products),
        text(call.text),
        size(call.model, call.length),
        saved(saved_of(call.text, size)) {}

  const float* vector(int index) const { return index == 0 ? text.m : text.e; }
  float* grad_vector(int index) const { return index == 0 ? text.grad_m : text.grad_e; }
  float* qkv(int index) const { return saved.qkv + index * size.stacked_row; }
  // Where k and v of the key-value head of query head h begin among those of all heads.
  std::int64_t kv(std::int64_t h) const {
    return h / (model.heads / model.kv_heads) * model.head_size;
  }
  // Where keys and values begin in a stacked product.
  std::int64_t keys() const { return model.heads * model.head_size; }
  std::int64_t values() const { return (model.heads + model.kv_heads) * model.head_size; }
  // Behind a prefix the spanning vector of head h of one of the two: those of e, then those of m.
  std::int64_t step(int vector, std::int64_t h) const {
    return 2 + (vector == 0 ? size.heads : 0) + h;
  }

 private:
  static FirstLayerSaved saved_of(const FirstLayerTexts& text, const FirstLayerSizes& size) {
    Arena arena(reinterpret_cast<unsigned char*>(text.saved), bytes_of<FirstLayerSaved>(size));
    return {arena, size};
  }
};

PROTOTOK_TARGET_END
