// Memory for what a call needs beside its arguments. A layout is a struct whose constructor takes
// its pieces from an arena; the same constructor on an empty arena finds how many bytes that is, so
// that no formula has to agree with it.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace prototok {

// What owns aligned memory deletes it by this.
struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using AlignedBytes = std::unique_ptr<unsigned char[], Free>;

// At least so many bytes, from a multiple of the alignment on; bad_alloc where there are none left.
AlignedBytes aligned_bytes(std::size_t bytes, std::size_t alignment = 64);

// Hands out pieces of one memory, each on cache lines of its own: a vector across two of them is
// read at half the speed. Without memory it only counts, and every piece is null.
class Arena {
 public:
  Arena() = default;
  Arena(unsigned char* memory, std::size_t bytes) : memory_(memory), bytes_(bytes) {}

  template <class T>
  T* take(std::int64_t count) {
    const std::size_t begin = used_;
    used_ += (std::size_t(count) * sizeof(T) + kLine - 1) / kLine * kLine;
    if (memory_ == nullptr) return nullptr;
    assert(used_ <= bytes_);
    return reinterpret_cast<T*>(memory_ + begin);
  }

  std::size_t used() const { return used_; }

 private:
  static constexpr std::size_t kLine = 64;
  unsigned char* memory_ = nullptr;
  std::size_t bytes_ = 0, used_ = 0;
};

// What Layout(arena, shape...) takes.
template <class Layout, class... Shape>
std::size_t bytes_of(const Shape&... shape) {
  Arena dry;
  Layout(dry, shape...);
  return dry.used();
}

// Scratch memory of the calling thread, taken and given back like a stack: it lasts as long as this
// object. A thread keeps its memory between calls, so that after the first ones nothing is allocated.
class ScratchFrame {
 public:
  explicit ScratchFrame(std::size_t bytes);
  ~ScratchFrame();
  ScratchFrame(const ScratchFrame&) = delete;
  ScratchFrame& operator=(const ScratchFrame&) = delete;

  unsigned char* memory() const { return memory_; }
  Arena arena() const { return {memory_, bytes_}; }

 private:
  unsigned char* memory_;
  std::size_t bytes_, block_, begin_;
};

// A layout in scratch memory of the calling thread.
template <class Layout>
class Scratch {
 public:
  template <class... Shape>
  explicit Scratch(const Shape&... shape)
      : frame_(bytes_of<Layout>(shape...)), layout_(placed(frame_.arena(), shape...)) {}

  const Layout* operator->() const { return &layout_; }
  const Layout& operator*() const { return layout_; }

 private:
  template <class... Shape>
  static Layout placed(Arena arena, const Shape&... shape) {
    return Layout(arena, shape...);
  }

  ScratchFrame frame_;
  Layout layout_;
};

}  // namespace prototok
