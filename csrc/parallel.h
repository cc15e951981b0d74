#pragma once

#include <cstdint>
#include <functional>

namespace prototok {

// Calls body(begin, end) on disjoint ranges of at most `grain` rows that cover [0, rows), on up to
// `threads` threads, and returns when all are done. Ranges are handed out as threads come free.
void parallel_rows(std::int64_t rows, std::int64_t grain, int threads,
                   const std::function<void(std::int64_t, std::int64_t)>& body);

}  // namespace prototok
