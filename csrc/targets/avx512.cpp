// Compiled for AVX-512 whatever the build's flags; called only where the processor has it.
#include "engines/decoder_kernels.h"
#include "ops/row_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

// After the standard headers, whose inline functions must stay fit for every processor.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif

namespace prototok {
namespace {
constexpr int kLanes = 16;
#define PROTOTOK_AVX512
#include "targets/all_kernels.inl"
#include "engines/decoder_kernels.inl"
}  // namespace

const RowKernels& avx512_kernels() { return kKernels; }
const DecoderKernelSets& avx512_decoder_kernels() { return kDecoderKernels; }

}  // namespace prototok

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
