#pragma once

#include <cstdint>
#include <vector>

namespace prototok {

// What `parallel_rows` is made of: no std::function, which may allocate.
void parallel_ranges(std::int64_t rows, std::int64_t grain, int threads, const void* body,
                     void (*call)(const void* body, std::int64_t begin, std::int64_t end));

// Calls body(begin, end) on disjoint ranges of at most `grain` rows that cover [0, rows), on up to
// `threads` threads, and returns when all are done. Ranges are handed out as threads come free.
template <class Body>
void parallel_rows(std::int64_t rows, std::int64_t grain, int threads, const Body& body) {
  parallel_ranges(rows, grain, threads, &body,
                  [](const void* body, std::int64_t begin, std::int64_t end) {
                    (*static_cast<const Body*>(body))(begin, end);
                  });
}

// `bytes` of a thread's own memory, which outlives the call, on a cache line: a vector across two of
// them is read at half the speed.
inline unsigned char* at_least(std::vector<unsigned char>& memory, std::uintptr_t bytes) {
  if (memory.size() < bytes + 64) memory.resize(bytes + 64);
  const auto misplaced = reinterpret_cast<std::uintptr_t>(memory.data()) % 64;
  return memory.data() + (misplaced == 0 ? 0 : 64 - misplaced);
}

}  // namespace prototok
