// The text of the target `amx` with emulated tiles, for every processor: what tests run where there
// are no tiles. Never the best set of a processor.
#define PROTOTOK_TARGET amx_emulated
#define PROTOTOK_LANES 4
#define PROTOTOK_PAIRS
#define PROTOTOK_TILES

#include "targets/dispatch.h"
#include "targets/kernels_of_target.h"

namespace prototok {

const Kernels& amx_emulated_kernels() { return amx_emulated::kKernels; }

}  // namespace prototok
