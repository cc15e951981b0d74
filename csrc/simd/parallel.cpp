#include "simd/parallel.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace prototok {
namespace {

struct Work {
  std::atomic<std::int64_t> next{0};
  std::int64_t rows, grain;
  const void* body;
  void (*call)(const void*, std::int64_t, std::int64_t);
};

void take_ranges(void* pointer) {
  Work& work = *static_cast<Work*>(pointer);
  for (;;) {
    const std::int64_t begin = work.next.fetch_add(work.grain);
    if (begin >= work.rows) return;
    work.call(work.body, begin, std::min(begin + work.grain, work.rows));
  }
}

// torch runs on an OpenMP runtime of its own, and after each of its parallel regions the threads of
// that runtime spin for a while in wait of the next. A second pool (another libgomp, or std::thread)
// then shares the cores with threads that do nothing (measured in docs/dev/log.md). So this
// borrows the runtime that is already in the process, through the entry point that GCC's `#pragma
// omp parallel` compiles to. Linking with -fopenmp would not do: some torch wheels carry libgomp
// under a name of their own, and the linker would then load the system's beside it.
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

GompParallel loaded_openmp() {
#if defined(__unix__) || defined(__APPLE__)
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

}  // namespace

void parallel_ranges(std::int64_t rows, std::int64_t grain, int threads, const void* body,
                     void (*call)(const void* body, std::int64_t begin, std::int64_t end)) {
  Work work;
  work.rows = rows;
  work.grain = std::max<std::int64_t>(1, grain);
  work.body = body;
  work.call = call;
  const std::int64_t ranges = (rows + work.grain - 1) / work.grain;
  const int used = int(std::min<std::int64_t>(threads, ranges));
  if (used <= 1) {
    take_ranges(&work);
    return;
  }
  // Looked up at each call (under a microsecond) because torch may be imported after this module.
  if (const GompParallel openmp = loaded_openmp()) {
    openmp(take_ranges, &work, unsigned(used), 0);
    return;
  }
  std::vector<std::thread> helpers;
  for (int i = 1; i < used; ++i) helpers.emplace_back(take_ranges, &work);
  take_ranges(&work);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace prototok
