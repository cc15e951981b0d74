// What every processor of the architecture can run.
#include "engines/decoder_kernels.h"
#include "ops/row_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

namespace prototok {
namespace {
constexpr int kLanes = 4;
#include "targets/all_kernels.inl"
#include "engines/decoder_kernels.inl"
}  // namespace

const RowKernels& baseline_kernels() { return kKernels; }
const DecoderKernelSets& baseline_decoder_kernels() { return kDecoderKernels; }

}  // namespace prototok
