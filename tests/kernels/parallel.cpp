// Exits with 0 if teams of every size share out units and see what the others wrote before they met,
// and what one thread throws comes to who called, once, with all others gone.
#include "simd/parallel.h"

#include <cstdint>
#include <stdexcept>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

// How many threads the OpenMP runtime runs at this moment, where it may give fewer; else `asked`.
int expected(int asked) {
#ifdef _OPENMP
  return asked > 1 ? omp_get_num_threads() : 1;
#else
  return asked;
#endif
}

// Whether what one thread throws while others work, or wait for it, is what the caller catches.
bool throws_once(int threads) {
  std::atomic<int> inside{0}, met{0};
  int caught = 0;
  try {
    prototok::parallel_team(threads, [&](const prototok::Member& member) {
      ++inside;
      member.meet();
      if (inside.fetch_sub(1) == 1) throw std::runtime_error("the last one here");
      member.meet();
      ++met;
    });
  } catch (const std::runtime_error&) {
    ++caught;
  }
  try {
    prototok::parallel_rows(1000, 1, threads, [&](std::int64_t begin, std::int64_t) {
      ++inside;
      if (begin == 7) throw std::runtime_error("a range");
      --inside;
    });
  } catch (const std::runtime_error&) {
    ++caught;
  }
  return caught == 2 && met == 0 && inside == 1;
}

int main() {
  constexpr std::int64_t kUnits = 13, kRounds = 200;
  for (int threads = 1; threads <= 4; ++threads) {
    std::vector<std::int64_t> seen(kUnits, -1);
    std::atomic<int> members{0}, wrong{0}, there{0};
    prototok::parallel_team(threads, [&](const prototok::Member& member) {
      ++members;
      there = expected(threads);
      for (std::int64_t round = 0; round < kRounds; ++round) {
        for (std::int64_t i = member.first(kUnits); i < member.last(kUnits); ++i) seen[i] = round;
        member.meet();
        for (const std::int64_t value : seen) wrong += value != round;
        member.meet();
      }
    });
    if (wrong != 0) return 1;
    if (members != there || members > threads || (threads > 1 && members < 2)) return 2;
    if (!throws_once(threads)) return 3;
  }
}
