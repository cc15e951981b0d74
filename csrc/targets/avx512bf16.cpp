// Compiled for AVX-512 with bfloat16 instructions whatever the build's flags; called only where the
// processor has them.
#if defined(__x86_64__)

#define PROTOTOK_TARGET avx512bf16
#define PROTOTOK_ATTRIBUTES "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"
#define PROTOTOK_LANES 16
#define PROTOTOK_AVX512
#define PROTOTOK_AVX512_BF16
#define PROTOTOK_PAIRS

#include "targets/dispatch.h"
#include "targets/kernels_of_target.h"

namespace prototok {

const Kernels& avx512bf16_kernels() { return avx512bf16::kKernels; }

}  // namespace prototok

#endif  // __x86_64__
