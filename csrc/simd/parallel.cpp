#include "simd/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace prototok {
namespace {

// The first exception of many threads; read when all have left.
class FirstError {
 public:
  // Of the exception that is being handled.
  void keep(std::atomic<bool>& failed) {
    if (!failed.exchange(true)) error_ = std::current_exception();
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::exception_ptr error_;
};

struct Work {
  std::atomic<std::int64_t> next{0};
  std::int64_t rows, grain;
  const void* body;
  void (*call)(const void*, std::int64_t, std::int64_t);
  std::atomic<bool> failed{false};
  FirstError error;
};

void take_ranges(void* pointer) noexcept {
  Work& work = *static_cast<Work*>(pointer);
  try {
    while (!work.failed) {
      const std::int64_t begin = work.next.fetch_add(work.grain);
      if (begin >= work.rows) return;
      work.call(work.body, begin, std::min(begin + work.grain, work.rows));
    }
  } catch (...) {
    work.error.keep(work.failed);
  }
}

// torch runs on an OpenMP runtime of its own, and after each of its parallel regions the threads of
// that runtime spin for a while in wait of the next. A second pool (another libgomp, or std::thread)
// then shares the cores with threads that do nothing (measured in docs/dev/log.md). So this
// borrows the runtime that is already in the process, through the entry point that GCC's `#pragma
// omp parallel` compiles to. Linking with -fopenmp would not do: some torch wheels carry libgomp
// under a name of their own, and the linker would then load the system's beside it.
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
// The number of threads in a region.
using ThreadCount = int (*)();

struct OpenMp {
  GompParallel parallel = nullptr;  // null: there is none
  ThreadCount count = nullptr;      // null where there is none, or another runtime would answer
};

// The one in the process. It is looked for until it is found, because torch may be imported after this
// module. Looking it up each time would take tens of microseconds among hundreds of libraries.
OpenMp loaded_openmp() {
#if defined(__unix__) || defined(__APPLE__)
  static std::atomic<GompParallel> found{nullptr};
  static std::atomic<ThreadCount> found_count{nullptr};
  if (const GompParallel parallel = found.load(std::memory_order_acquire))
    return {parallel, found_count.load(std::memory_order_relaxed)};
  const auto parallel = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (parallel == nullptr) return {};
  void* count = dlsym(RTLD_DEFAULT, "omp_get_num_threads");
  Dl_info of_count, of_parallel;
  if (count != nullptr && dladdr(count, &of_count) != 0 &&
      dladdr(reinterpret_cast<void*>(parallel), &of_parallel) != 0 &&
      of_count.dli_fbase == of_parallel.dli_fbase)
    found_count.store(reinterpret_cast<ThreadCount>(count), std::memory_order_relaxed);
  found.store(parallel, std::memory_order_release);
  return {parallel, found_count.load(std::memory_order_relaxed)};
#else
  return {};
#endif
}

struct Team {
  Member::Place place;
  std::atomic<int> joined{0};
  std::atomic<int> count{0};
  const void* body;
  void (*call)(const void*, const Member&);
  FirstError error;

  void join(int members) noexcept {
    try {
      call(body, Member(place, joined.fetch_add(1), members));
    } catch (...) {
      error.keep(place.failed);
    }
  }
};

struct OpenMpTeam {
  Team team;
  ThreadCount count;
};

void join_region(void* pointer) noexcept {
  OpenMpTeam& work = *static_cast<OpenMpTeam*>(pointer);
  work.team.join(work.count());
}

// What those throw who would wait for a thread that has thrown.
struct MemberLeft {};

// Returns when `ready()` is true. For as long as a wait should take the thread only rests, then it
// lets others run, which may be who it waits for.
template <class Ready>
void wait_until(const Ready& ready) {
  constexpr int kRests = 4096;
  for (int rests = 0; !ready();) {
    if (rests == kRests) {
      std::this_thread::yield();
      continue;
    }
    ++rests;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
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
  const OpenMp openmp = used > 1 ? loaded_openmp() : OpenMp();
  if (openmp.parallel != nullptr)
    openmp.parallel(take_ranges, &work, unsigned(used), 0);
  else
    parallel_team(used, [&](const Member&) { take_ranges(&work); });
  work.error.rethrow();
}

void Member::meet() const {
  if (count_ == 1) return;
  const unsigned round = place_->round.load(std::memory_order_acquire);
  if (place_->waiting.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
    place_->waiting.store(0, std::memory_order_relaxed);
    place_->round.store(round + 1, std::memory_order_release);
    return;
  }
  const auto all_came = [&] { return place_->round.load(std::memory_order_acquire) != round; };
  wait_until([&] { return all_came() || place_->failed; });
  if (!all_came()) throw MemberLeft();
}

void parallel_members(int threads, const void* body,
                      void (*call)(const void* body, const Member& member)) {
  if (threads <= 1) return call(body, Member());
  OpenMpTeam work{};
  Team& team = work.team;
  team.body = body;
  team.call = call;
  const OpenMp openmp = loaded_openmp();
  if (openmp.count != nullptr) {
    work.count = openmp.count;
    openmp.parallel(join_region, &work, unsigned(threads), 0);
    return team.error.rethrow();
  }
  // Nobody begins before it is known how many could be had.
  std::vector<std::thread> helpers;
  helpers.reserve(std::size_t(threads - 1));
  try {
    while (int(helpers.size()) < threads - 1)
      helpers.emplace_back([&team] {
        wait_until([&] { return team.count.load(std::memory_order_acquire) > 0; });
        team.join(team.count.load(std::memory_order_relaxed));
      });
  } catch (const std::system_error&) {
    // With those that there are.
  }
  const int members = int(helpers.size()) + 1;
  team.count.store(members, std::memory_order_release);
  team.join(members);
  for (std::thread& helper : helpers) helper.join();
  team.error.rethrow();
}

}  // namespace prototok
