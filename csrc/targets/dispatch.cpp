#include "targets/dispatch.h"

#include "targets/amx.h"

#include <atomic>
#include <stdexcept>

namespace prototok {

// Each by its own file.
const Kernels& baseline_kernels();
const Kernels& amx_emulated_kernels();
std::string why_no_amx();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512bf16_kernels();
#if defined(PROTOTOK_COMPILES_AMX)
const Kernels& amx_kernels();
#endif
#endif

namespace {

struct Target {
  const char* name;
  const Kernels* kernels;
  std::string missing;  // why it cannot run here; "" where it can
  bool emulated = false;
};

std::string unless(bool had) { return had ? "" : "the processor does not have it"; }

// All, best first. Found once.
const std::vector<Target>& targets() {
  static const std::vector<Target> found = [] {
    std::vector<Target> of;
#if !defined(PROTOTOK_COMPILES_AMX)
    of.push_back({"amx", nullptr, why_no_amx()});
#endif
#if defined(__x86_64__)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#if defined(PROTOTOK_COMPILES_AMX)
    of.push_back({"amx", &amx_kernels(), avx512bf16 ? why_no_amx() : unless(false)});
#endif
    of.push_back({"avx512bf16", &avx512bf16_kernels(), unless(avx512bf16)});
    of.push_back({"avx512", &avx512_kernels(), unless(avx512)});
    of.push_back({"avx2", &avx2_kernels(),
                  unless(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))});
#endif
    of.push_back({"amx-emulated", &amx_emulated_kernels(), "", true});
    of.push_back({"baseline", &baseline_kernels(), ""});
    return of;
  }();
  return found;
}

const Target& named(const std::string& name) {
  for (const Target& target : targets())
    if (name == target.name && target.missing.empty()) return target;
  throw std::invalid_argument("instruction_set: this processor does not have '" + name + "'");
}

std::atomic<const Target*> preferred{nullptr};

// Best first; from one on where there is one that is preferred.
std::vector<const Target*> available_from(const Target* from) {
  std::vector<const Target*> of;
  if (from != nullptr) of.push_back(from);
  for (const Target& target : targets())
    if (target.missing.empty() && !target.emulated && (from == nullptr || &target > from))
      of.push_back(&target);
  return of;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Target* target : available_from(preferred.load())) names.emplace_back(target->name);
  return names;
}

std::vector<std::pair<std::string, std::string>> missing_instruction_sets() {
  std::vector<std::pair<std::string, std::string>> of;
  for (const Target& target : targets())
    if (!target.missing.empty()) of.emplace_back(target.name, target.missing);
  return of;
}

void prefer_instruction_set(const std::string& name) {
  preferred.store(name.empty() ? nullptr : &named(name));
}

const Kernels& kernels_for(const std::string& instruction_set) {
  static const Target* best = available_from(nullptr).front();
  if (!instruction_set.empty()) return *named(instruction_set).kernels;
  const Target* from = preferred.load();
  return *(from == nullptr ? best : from)->kernels;
}

const Kernels& kernels_with_pairs() {
  for (const Target* target : available_from(preferred.load()))
    if (target->kernels->pairs != nullptr) return *target->kernels;
  throw std::invalid_argument("instruction_set: this processor has no products of bfloat16 pairs");
}

}  // namespace prototok
