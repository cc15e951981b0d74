// What every processor of the architecture can run.
#define PROTOTOK_TARGET baseline
#define PROTOTOK_LANES 4

#include "targets/dispatch.h"
#include "targets/kernels_of_target.h"

namespace prototok {

const Kernels& baseline_kernels() { return baseline::kKernels; }

}  // namespace prototok
