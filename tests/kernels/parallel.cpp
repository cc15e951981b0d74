// Exits with 0 if teams of every size share out units and see what the others wrote before they met.
#include "simd/parallel.h"

#include <cstdint>
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
  }
}
