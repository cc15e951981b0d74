// Compiled for AVX-512 with bfloat16 instructions and the tiles of AMX whatever the build's flags;
// called only where the processor has both and the system lets this process use them.
#include "targets/amx.h"

#include <string>

#if defined(PROTOTOK_COMPILES_AMX)

#define PROTOTOK_TARGET amx
#define PROTOTOK_ATTRIBUTES \
  "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,amx-tile,amx-bf16"
#define PROTOTOK_LANES 16
#define PROTOTOK_AVX512
#define PROTOTOK_AVX512_BF16
#define PROTOTOK_AMX
#define PROTOTOK_PAIRS
#define PROTOTOK_TILES

#include "targets/dispatch.h"
#include "targets/kernels_of_target.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace prototok {
namespace {

constexpr int kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA

// Of the parts of a thread's state that the system saves, by bit; OSXSAVE must be there.
std::uint32_t saved_state() {
  std::uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

}  // namespace

const Kernels& amx_kernels() { return amx::kKernels; }

std::string why_no_amx() {
  constexpr unsigned kSaves = 1u << 27, kTiles = 1u << 24, kBf16 = 1u << 22, kTileState = 3u << 17;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) == 0 || (d & kBf16) == 0)
    return "the processor has no AMX tiles for bfloat16";
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kSaves) == 0 ||
      (saved_state() & kTileState) != kTileState)
    return "the system does not save the state of tiles";
  // Once a process, for all its threads; asking again is answered alike.
  if (syscall(SYS_arch_prctl, kAskForState, kTileData) != 0)
    return std::string("the system does not let this process use tiles: ") + std::strerror(errno);
  return "";
}

}  // namespace prototok

#else

namespace prototok {

std::string why_no_amx() { return "the kernels were built without it, for this system or compiler"; }

}  // namespace prototok

#endif
