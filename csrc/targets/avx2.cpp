// Compiled for AVX2 whatever the build's flags; called only where the processor has it.
#if defined(__x86_64__)

#define PROTOTOK_TARGET avx2
#define PROTOTOK_ATTRIBUTES "avx2,fma"
#define PROTOTOK_LANES 8
#define PROTOTOK_PAIRS

#include "targets/dispatch.h"
#include "targets/kernels_of_target.h"

namespace prototok {

const Kernels& avx2_kernels() { return avx2::kKernels; }

}  // namespace prototok

#endif  // __x86_64__
