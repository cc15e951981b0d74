// Compiled for AVX-512 with bfloat16 instructions whatever the build's flags; called only where the
// processor has it.
#include "engines/decoder_kernels.h"
#include "engines/first_layer.h"
#include "engines/packed_head.h"
#include "products/packed_product.h"
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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#endif

namespace prototok {
namespace {
constexpr int kLanes = 16;
#define PROTOTOK_AVX512
#define PROTOTOK_BF16_INSTRUCTIONS
#include "targets/all_kernels.inl"
#include "engines/decoder_kernels.inl"
#include "products/packed_product.inl"
#include "engines/packed_head.inl"
#include "engines/first_layer.inl"
}  // namespace

const RowKernels& avx512bf16_kernels() { return kKernels; }
const DecoderKernelSets& avx512bf16_decoder_kernels() { return kDecoderKernels; }
void packed_product_avx512bf16(const PackedProduct& product) { packed_product(product); }
void first_layer_forward_avx512bf16(const FirstLayerText& text) { first_layer_forward(text); }
void first_layer_backward_avx512bf16(const FirstLayerText& text) { first_layer_backward(text); }
void packed_head_tile_avx512bf16(const PackedHeadTile& tile) { packed_head_tile(tile); }

}  // namespace prototok

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
