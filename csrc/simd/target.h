// The instruction set that a translation unit of targets/ compiles for. Before its first include
// such a file defines
//   PROTOTOK_TARGET      the set's name, and the namespace of everything that is compiled for it
//   PROTOTOK_ATTRIBUTES  the set as the compiler's `target` attribute; baseline defines none
//   PROTOTOK_LANES       floats in a vector
//   PROTOTOK_AVX512, PROTOTOK_AVX512_BF16, PROTOTOK_AMX  where these instructions may be used
//   PROTOTOK_PAIRS       where it has products of bf16 pairs
//   PROTOTOK_TILES       where these may run in tiles, those of AMX or emulated ones
// A header with code for a target puts all of it between PROTOTOK_TARGET_BEGIN and
// PROTOTOK_TARGET_END, behind its includes. So a function compiled for a newer processor has a name
// of its own and cannot be the one that the linker keeps for an older one, and the inline functions
// of the standard headers stay fit for every processor.
//
// No lambdas in such code: GCC does not compile them for the set that a pragma asks for.
#pragma once

#if !defined(PROTOTOK_TARGET) || !defined(PROTOTOK_LANES)
#error "this header is for the files of targets/ alone"
#endif

#if defined(PROTOTOK_AVX512)
#include <immintrin.h>
#endif

#define PROTOTOK_PRAGMA(tokens) _Pragma(#tokens)

#if !defined(PROTOTOK_ATTRIBUTES)
#define PROTOTOK_ATTRIBUTES_BEGIN
#define PROTOTOK_ATTRIBUTES_END
#elif defined(__clang__)
#define PROTOTOK_ATTRIBUTES_OF(set) \
  PROTOTOK_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define PROTOTOK_ATTRIBUTES_BEGIN PROTOTOK_ATTRIBUTES_OF(PROTOTOK_ATTRIBUTES)
#define PROTOTOK_ATTRIBUTES_END PROTOTOK_PRAGMA(clang attribute pop)
#else
#define PROTOTOK_ATTRIBUTES_OF(set) \
  PROTOTOK_PRAGMA(GCC push_options) PROTOTOK_PRAGMA(GCC target(set))
#define PROTOTOK_ATTRIBUTES_BEGIN PROTOTOK_ATTRIBUTES_OF(PROTOTOK_ATTRIBUTES)
#define PROTOTOK_ATTRIBUTES_END PROTOTOK_PRAGMA(GCC pop_options)
#endif

#define PROTOTOK_TARGET_BEGIN \
  PROTOTOK_ATTRIBUTES_BEGIN   \
  namespace prototok {        \
  namespace PROTOTOK_TARGET {

#define PROTOTOK_TARGET_END \
  }                         \
  }                         \
  PROTOTOK_ATTRIBUTES_END
