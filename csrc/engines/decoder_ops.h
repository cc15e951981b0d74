// The kernels of decoder_kernels.h.
#pragma once

#include "engines/decoder_kernels.h"
#include "ops/activation.h"
#include "ops/cached_attention.h"
#include "ops/head.h"
#include "ops/norm.h"
#include "ops/rotary.h"
#include "products/linear.h"
#include "simd/target.h"
#include "simd/vectors.h"

#include <algorithm>
#include <cstdint>

PROTOTOK_TARGET_BEGIN

template <class T>
struct DecoderOps {
  static const T* of(const void* from) { return static_cast<const T*>(from); }
  static T* of(void* from) { return static_cast<T*>(from); }

  static void norm(const float* x, const void* weight, const void* bias, float eps,
                   std::int64_t size, void* out) {
    const NormStatistics statistics = norm_statistics(x, size, bias != nullptr, eps);
    normalize_row(x, statistics, of(weight), of(bias), of(out), size);
  }

  static void linear(const void* weight, const void* bias, const void* inputs, float* out,
                     const LinearShape& shape, std::int64_t begin, std::int64_t end) {
    PROTOTOK_TARGET::linear(of(weight), of(bias), of(inputs), out, shape, begin, end);
  }

  static void turn(float* head, const void* norm, float eps, std::int64_t size,
                   const RotaryTable& table, std::int64_t position) {
    if (norm != nullptr)
      normalize_row<float, T>(head, norm_statistics(head, size, false, eps), of(norm), nullptr,
                              head, size);
    rotate_head(head, head, size, table, position, 1.0f, 1.0f);
  }

  static void keep(const float* key, const float* value, void* keys, void* values,
                   std::int64_t size, std::int64_t capacity, std::int64_t position) {
    PROTOTOK_TARGET::keep(key, value, of(keys), of(values), size, capacity, position);
  }

  static void attend(const float* q, const void* keys, const void* values, float scaling,
                     std::int64_t size, std::int64_t capacity, std::int64_t begin,
                     std::int64_t end, float* scores, void* out) {
    PROTOTOK_TARGET::attend(q, of(keys), of(values), scaling, size, capacity, begin, end, scores,
                            of(out));
  }

  static void activate(const float* x, const ActivationShape& shape, void* out) {
    activation_row<float, T>(x, nullptr, of(out), shape);
  }

  static std::int64_t argmax(const float* x, std::int64_t count) {
    return std::min(first_equal(x, count, block_maximum(x, count)), count - 1);
  }

  static void widen(const void* from, float* to, std::int64_t count) {
    copy_scaled(of(from), to, count, 1.0f);
  }
};

template <class T>
constexpr DecoderKernels decoder_kernels() {
  using Ops = DecoderOps<T>;
  return {Ops::norm,   Ops::linear,   Ops::turn,   Ops::keep,
          Ops::attend, Ops::activate, Ops::argmax, Ops::widen};
}

PROTOTOK_TARGET_END
