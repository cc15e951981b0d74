// Compiled for AVX-512 whatever the build's flags; called only where the processor has it.
#if defined(__x86_64__)

#define PROTOTOK_TARGET avx512
#define PROTOTOK_ATTRIBUTES "avx512f,avx512bw,avx512vl,avx512dq,fma"
#define PROTOTOK_LANES 16
#define PROTOTOK_AVX512

#include "targets/dispatch.h"
#include "targets/kernels_of_target.h"

namespace prototok {

const Kernels& avx512_kernels() { return avx512::kKernels; }

}  // namespace prototok

#endif  // __x86_64__
