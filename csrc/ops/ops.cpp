#include "ops/ops.h"

#include "simd/parallel.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace prototok {
namespace {

// Elements a thread should be handed at once: small enough to share evenly with a busy machine,
// large enough (some microseconds) to be worth the hand-over.
constexpr std::int64_t kElementsPerRange = 32768;

std::int64_t grain_for(std::int64_t row_length) {
  return std::max<std::int64_t>(1, kElementsPerRange / std::max<std::int64_t>(1, row_length));
}

}  // namespace

void check_targets(const Head& head) {
  for (std::int64_t row = 0; row < head.rows; ++row)
    if (head.targets[row] < 0 || head.targets[row] >= head.vocabulary)
      throw std::out_of_range("targets: " + std::to_string(head.targets[row]) + " in row " +
                              std::to_string(row) + " is not in [0, " +
                              std::to_string(head.vocabulary) + ")");
}

void head(const Head& head, const RowKernels& kernels, int threads) {
  check_targets(head);
  const auto run = [&](auto kernel, auto* logits, auto* gradient, std::int64_t row) {
    const std::int64_t offset = row * head.vocabulary;
    return kernel(logits + offset, gradient == nullptr ? nullptr : gradient + offset,
                  head.vocabulary, head.targets[row],
                  head.token_weight == nullptr ? 1.0f : head.token_weight[row], head.temperature);
  };
  parallel_rows(head.rows, grain_for(head.vocabulary), threads,
                [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const HeadResult result =
          head.element == Element::f32
              ? run(kernels.head_f32, static_cast<const float*>(head.logits),
                    static_cast<float*>(head.gradient), row)
              : run(kernels.head_bf16, static_cast<const bf16*>(head.logits),
                    static_cast<bf16*>(head.gradient), row);
      head.loss[row] = result.loss;
      head.predicted[row] = result.predicted;
      head.margin[row] = result.margin;
    }
  });
}

void residual_norm(const ResidualNorm& norm, const RowKernels& kernels, int threads) {
  const auto run = [&](auto kernel, auto zero, std::int64_t row) {
    using T = decltype(zero);
    const std::int64_t offset = row * norm.coordinates;
    const T* delta = static_cast<const T*>(norm.delta);
    T* sum = static_cast<T*>(norm.sum);
    return kernel(static_cast<const T*>(norm.x) + offset, delta == nullptr ? delta : delta + offset,
                  sum == nullptr ? sum : sum + offset, static_cast<T*>(norm.normed) + offset,
                  static_cast<const T*>(norm.weight), static_cast<const T*>(norm.bias),
                  norm.coordinates, norm.eps);
  };
  parallel_rows(norm.rows, grain_for(norm.coordinates), threads,
                [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const NormStatistics found = norm.element == Element::f32
                                       ? run(kernels.residual_norm_f32, float{}, row)
                                       : run(kernels.residual_norm_bf16, bf16{}, row);
      norm.statistics[2 * row] = found.mean;
      norm.statistics[2 * row + 1] = found.inverse;
    }
  });
}

void residual_norm_backward(const ResidualNormBackward& norm, const RowKernels& kernels,
                            int threads) {
  const auto run = [&](auto kernel, auto zero, std::int64_t row) {
    using T = decltype(zero);
    const std::int64_t offset = row * norm.coordinates;
    const T* grad_sum = static_cast<const T*>(norm.grad_sum);
    kernel(grad_sum == nullptr ? grad_sum : grad_sum + offset,
           static_cast<const T*>(norm.grad_normed) + offset,
           static_cast<const T*>(norm.sum) + offset, static_cast<const T*>(norm.weight),
           static_cast<T*>(norm.grad) + offset, norm.coordinates,
           NormStatistics{norm.statistics[2 * row], norm.statistics[2 * row + 1]}, norm.centred);
  };
  parallel_rows(norm.rows, grain_for(norm.coordinates), threads,
                [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      if (norm.element == Element::f32)
        run(kernels.residual_norm_backward_f32, float{}, row);
      else
        run(kernels.residual_norm_backward_bf16, bf16{}, row);
    }
  });
}

void activation(const ActivationPass& pass, const RowKernels& kernels, int threads) {
  const std::int64_t inner = pass.shape.inner, wide = pass.shape.gated ? 2 * inner : inner;
  const auto run = [&](auto forward, auto backward, auto zero, std::int64_t row) {
    using T = decltype(zero);
    const T* z = static_cast<const T*>(pass.z) + row * wide;
    const T* bias = static_cast<const T*>(pass.bias);
    T* out = static_cast<T*>(pass.out);
    if (pass.grad == nullptr)
      forward(z, bias, out + row * inner, pass.shape);
    else
      backward(static_cast<const T*>(pass.grad) + row * inner, z, bias, out + row * wide,
               pass.shape);
  };
  parallel_rows(pass.rows, grain_for(wide), threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      if (pass.element == Element::f32)
        run(kernels.activation_f32, kernels.activation_backward_f32, float{}, row);
      else
        run(kernels.activation_bf16, kernels.activation_backward_bf16, bf16{}, row);
    }
  });
}

void attention(const Attention& attention, const RowKernels& kernels, int threads) {
  const AttentionShape& shape = attention.shape;
  const std::int64_t out_row = shape.length * shape.heads * shape.size;
  const std::int64_t qkv_row = shape.length * (shape.heads + 2 * shape.kv_heads) * shape.size;
  const auto run = [&](auto forward, auto backward, auto zero, std::int64_t task) {
    using T = decltype(zero);
    const std::int64_t row = task / shape.kv_heads, kv_head = task % shape.kv_heads;
    const T* qkv = static_cast<const T*>(attention.qkv) + row * qkv_row;
    const T* grad_out = static_cast<const T*>(attention.grad_out);
    T* out = static_cast<T*>(attention.out);
    if (grad_out == nullptr)
      forward(shape, qkv, out + row * out_row, kv_head);
    else
      backward(shape, qkv, grad_out + row * out_row, out + row * qkv_row, kv_head);
  };
  parallel_rows(attention.rows * shape.kv_heads, 1, threads,
                [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; ++task) {
      if (attention.element == Element::f32)
        run(kernels.attention_f32, kernels.attention_backward_f32, float{}, task);
      else
        run(kernels.attention_bf16, kernels.attention_backward_bf16, bf16{}, task);
    }
  });
}

void adamw(const AdamW& adamw, const RowKernels& kernels, int threads) {
  parallel_rows(adamw.rows, grain_for(adamw.coordinates), threads,
                [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      if (!adamw.active[row]) continue;
      const double step = double(++adamw.step[row]);
      const double lr = adamw.lr[row];
      AdamWCoefficients k;
      k.beta2 = float(adamw.beta2);
      k.one_minus_beta1 = float(1.0 - adamw.beta1);
      k.one_minus_beta2 = float(1.0 - adamw.beta2);
      k.eps = float(adamw.eps);
      k.decay = float(1.0 - lr * adamw.weight_decay);
      k.rate = float(lr / (1.0 - std::pow(adamw.beta1, step)));
      k.inverse_root_bias = float(1.0 / std::sqrt(1.0 - std::pow(adamw.beta2, step)));
      const std::int64_t offset = row * adamw.coordinates;
      kernels.adamw(adamw.param + offset, adamw.grad + offset, adamw.exp_avg + offset,
                    adamw.exp_avg_sq + offset, adamw.coordinates, k);
    }
  });
}

}  // namespace prototok
