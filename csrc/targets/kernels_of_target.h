// All kernels, compiled for the instruction set of the file that includes this.
#pragma once

#include "engines/decoder_ops.h"
#include "ops/activation.h"
#include "ops/adamw.h"
#include "ops/attention.h"
#include "ops/head.h"
#include "ops/norm.h"
#include "simd/bf16.h"
#include "simd/target.h"
#include "targets/dispatch.h"

#ifdef PROTOTOK_PAIRS
#include "engines/argmax_tile.h"
#include "engines/first_layer_text.h"
#include "engines/packed_head_tile.h"
#include "ops/attention_pairs.h"
#include "products/packed_product.h"
#endif

PROTOTOK_TARGET_BEGIN

#ifdef PROTOTOK_PAIRS
#ifdef PROTOTOK_TILES
constexpr std::int64_t kTogether = kBlockRows;
constexpr bool kByOutputs = true;
#else
constexpr std::int64_t kTogether = TileShape<Pair>::kRows;
constexpr bool kByOutputs = false;
#endif
constexpr PairKernels kPairKernels{packed_product,      packed_sum,           packed_head_tile,
                                   argmax_tile,         first_layer_forward,  first_layer_backward,
                                   kTogether,           kByOutputs};
#endif

constexpr Kernels kKernels{
    {
        head_row<float>,
        head_row<bf16>,
        adamw_row,
        residual_norm_row<float>,
        residual_norm_row<bf16>,
        residual_norm_backward_row<float>,
        residual_norm_backward_row<bf16>,
        activation_row<float, float>,
        activation_row<bf16, bf16>,
        activation_backward_row<float, float>,
        activation_backward_row<bf16, bf16>,
        attention_heads<float>,
#ifdef PROTOTOK_PAIRS
        attention_heads_in_pairs,
#else
        attention_heads<bf16>,
#endif
        attention_backward_heads<float>,
#ifdef PROTOTOK_PAIRS
        attention_backward_heads_in_pairs,
#else
        attention_backward_heads<bf16>,
#endif
    },
    decoder_kernels<float>(),
    decoder_kernels<bf16>(),
#ifdef PROTOTOK_PAIRS
    &kPairKernels,
#else
    nullptr,
#endif
};

PROTOTOK_TARGET_END
