#include "targets/dispatch.h"

#include <stdexcept>

namespace prototok {

// Each by its own file.
const Kernels& baseline_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512bf16_kernels();
#endif

namespace {

struct Target {
  const char* name;
  const Kernels* kernels;
};

// Found once, best first.
const std::vector<Target>& targets() {
  static const std::vector<Target> found = [] {
    std::vector<Target> of;
#if defined(__x86_64__)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512bf16"))
      of.push_back({"avx512bf16", &avx512bf16_kernels()});
    if (avx512) of.push_back({"avx512", &avx512_kernels()});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      of.push_back({"avx2", &avx2_kernels()});
#endif
    of.push_back({"baseline", &baseline_kernels()});
    return of;
  }();
  return found;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Target& target : targets()) names.emplace_back(target.name);
  return names;
}

const Kernels& kernels_for(const std::string& instruction_set) {
  if (instruction_set.empty()) return *targets().front().kernels;
  for (const Target& target : targets())
    if (instruction_set == target.name) return *target.kernels;
  throw std::invalid_argument("instruction_set: this processor does not have '" + instruction_set +
                              "'");
}

const Kernels& kernels_with_pairs() {
  for (const Target& target : targets())
    if (target.kernels->pairs != nullptr) return *target.kernels;
  throw std::invalid_argument("instruction_set: this processor does not have 'avx512bf16'");
}

}  // namespace prototok
