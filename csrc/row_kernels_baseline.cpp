// What every processor of the architecture can run.
#include "row_kernels.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace prototok {
namespace {
constexpr int kLanes = 4;
#include "row_kernels.inl"
}  // namespace

const RowKernels& baseline_kernels() { return kKernels; }

}  // namespace prototok
