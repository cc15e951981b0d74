// Work for many threads: ranges of rows that do not need each other, and teams that wait for each
// other. What a thread throws ends the others' work where they next look, and is thrown again to who
// called, once all have left: nothing unwinds through another runtime's frames.
#pragma once

#include <atomic>
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

// One of the threads that do something together.
class Member {
 public:
  // Where threads meet.
  struct Place {
    std::atomic<int> waiting{0};
    std::atomic<unsigned> round{0};
    std::atomic<bool> failed{false};  // one has thrown and will not come
  };

  Member() = default;  // alone
  Member(Place& place, int index, int count) : place_(&place), index_(index), count_(count) {}

  bool alone() const { return count_ == 1; }
  int index() const { return index_; }
  int count() const { return count_; }

  // Returns when all have called it: what they wrote before can be read behind it. Throws where one
  // has thrown.
  void meet() const;

  // Of `units` those that are this thread's, [first, last), the same at each call. The first threads
  // have the larger shares.
  std::int64_t first(std::int64_t units) const {
    return (units * index_ + count_ - 1) / count_;
  }
  std::int64_t last(std::int64_t units) const {
    return (units * (index_ + 1) + count_ - 1) / count_;
  }

 private:
  Place* place_ = nullptr;
  int index_ = 0, count_ = 1;
};

void parallel_members(int threads, const void* body,
                      void (*call)(const void* body, const Member& member));

// Calls body(member) on up to `threads` threads, as many as there are, at one time.
template <class Body>
void parallel_team(int threads, const Body& body) {
  parallel_members(threads, &body, [](const void* body, const Member& member) {
    (*static_cast<const Body*>(body))(member);
  });
}

}  // namespace prototok
