#include "ops.h"

#include "parallel.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace prototok {
namespace {

// Elements a thread should be handed at once: small enough to share evenly with a busy machine,
// large enough (some microseconds) to be worth the hand-over.
constexpr std::int64_t kElementsPerRange = 32768;

std::int64_t grain_for(std::int64_t row_length) {
  return std::max<std::int64_t>(1, kElementsPerRange / std::max<std::int64_t>(1, row_length));
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    names.emplace_back("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) names.emplace_back("avx2");
#endif
  names.emplace_back("baseline");
  return names;
}

const RowKernels& kernels_for(const std::string& instruction_set) {
  static const std::vector<std::string> available = instruction_sets();
  const std::string& name = instruction_set.empty() ? available.front() : instruction_set;
  if (std::find(available.begin(), available.end(), name) == available.end())
    throw std::invalid_argument("instruction_set: this processor does not have '" + name + "'");
#if defined(__x86_64__)
  if (name == "avx512") return avx512_kernels();
  if (name == "avx2") return avx2_kernels();
#endif
  return baseline_kernels();
}

void head(const Head& head, const RowKernels& kernels, int threads) {
  for (std::int64_t row = 0; row < head.rows; ++row)
    if (head.targets[row] < 0 || head.targets[row] >= head.vocabulary)
      throw std::out_of_range("targets: " + std::to_string(head.targets[row]) + " in row " +
                              std::to_string(row) + " is not in [0, " +
                              std::to_string(head.vocabulary) + ")");
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
