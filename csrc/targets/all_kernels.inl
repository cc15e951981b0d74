// Every kernel for one instruction set; included once for each, inside an anonymous namespace. No
// lambdas in any of it: GCC does not compile them for the instruction set that a pragma asks for.
#include "simd/vectors.inl"

#include "ops/norm.inl"

#include "ops/activation.inl"

#include "ops/attention.inl"

#ifdef PROTOTOK_BF16_INSTRUCTIONS
#include "ops/attention_pairs.inl"
#endif

const RowKernels kKernels{
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
#ifdef PROTOTOK_BF16_INSTRUCTIONS
    attention_heads_in_pairs,
#else
    attention_heads<bf16>,
#endif
    attention_backward_heads<float>,
#ifdef PROTOTOK_BF16_INSTRUCTIONS
    attention_backward_heads_in_pairs,
#else
    attention_backward_heads<bf16>,
#endif
};
