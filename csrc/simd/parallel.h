#pragma once

#include <cstdint>

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

}  // namespace prototok
