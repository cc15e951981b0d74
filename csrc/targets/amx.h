// Where the target `amx` can be compiled at all.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>)
#define PROTOTOK_COMPILES_AMX
#endif
#endif
