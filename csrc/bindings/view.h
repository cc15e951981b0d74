// A tensor as Python hands it over: its argument's name, where it lies, of what and in which shape.
// A kernel takes a pointer only through the checks below, so that a wrong tensor is an error that
// names the argument, and never a wrong address.
#pragma once

#include "ops/ops.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace prototok {

using Shape = std::initializer_list<std::int64_t>;

// As torch calls it, without "torch.".
template <class T> constexpr const char* kDtype = nullptr;
template <> inline constexpr const char* kDtype<float> = "float32";
template <> inline constexpr const char* kDtype<bf16> = "bfloat16";
template <> inline constexpr const char* kDtype<std::int64_t> = "int64";
template <> inline constexpr const char* kDtype<std::uint8_t> = "uint8";
template <> inline constexpr const char* kDtype<bool> = "bool";

struct View {
  static constexpr int kDimensions = 8;

  const char* name = "";
  bool given = false;  // false: Python passed None
  void* address = nullptr;
  const char* dtype = "";
  int rank = 0;
  std::array<std::int64_t, kDimensions> shape{}, strides{};  // strides in elements

  // The sizes of a tensor that gives others theirs.
  template <int kRank>
  std::array<std::int64_t, kRank> sizes() const {
    require_given();
    if (rank != kRank)
      throw std::invalid_argument(std::string(name) + ": must have " + std::to_string(kRank) +
                                  " dimensions, saw " + text(shape.data(), rank));
    std::array<std::int64_t, kRank> found;
    std::copy_n(shape.begin(), kRank, found.begin());
    return found;
  }

  // The type of the numbers of a tensor that gives others theirs, one that kernels are made for.
  Element element() const {
    require_given();
    if (is(kDtype<float>)) return Element::f32;
    if (is(kDtype<bf16>)) return Element::bf16;
    throw std::invalid_argument(std::string(name) + ": must be of float32 or bfloat16, saw " + dtype);
  }

  // A contiguous tensor (.., width) as (rows, width).
  View merged() const {
    if (!given) return *this;
    require_contiguous();
    if (rank == 0) throw std::invalid_argument(std::string(name) + ": must have rows, saw ()");
    View out = *this;
    out.rank = 2;
    out.shape[1] = shape[std::size_t(rank - 1)];
    out.shape[0] = 1;
    for (int i = 0; i < rank - 1; ++i) out.shape[0] *= shape[std::size_t(i)];
    out.strides = {out.shape[1], 1};
    return out;
  }

  // Throws std::invalid_argument unless it is contiguous, of this dtype and this shape.
  template <class T>
  T* data(Shape wanted) const {
    return static_cast<T*>(checked(kDtype<std::remove_const_t<T>>, wanted, false));
  }
  // The same, or null where it was not given.
  template <class T>
  T* data_or_null(Shape wanted) const {
    return given ? data<T>(wanted) : nullptr;
  }
  // The same where rows may follow that are not read.
  template <class T>
  T* rows(Shape wanted) const {
    return static_cast<T*>(checked(kDtype<std::remove_const_t<T>>, wanted, true));
  }
  // The same of a dtype known at run time.
  void* data(Element wanted, Shape shape) const {
    return checked(wanted == Element::f32 ? kDtype<float> : kDtype<bf16>, shape, false);
  }
  void* rows_or_null(Element wanted, Shape shape) const {
    return given ? checked(wanted == Element::f32 ? kDtype<float> : kDtype<bf16>, shape, true)
                 : nullptr;
  }
  void* data_or_null(Element wanted, Shape shape) const {
    return given ? data(wanted, shape) : nullptr;
  }

 private:
  void require_given() const {
    if (!given) throw std::invalid_argument(std::string(name) + ": must be a tensor, saw None");
  }

  void* checked(const char* wanted_dtype, Shape wanted, bool more_rows) const {
    require_given();
    bool fits = is(wanted_dtype) && rank == int(wanted.size());
    for (int i = 0; fits && i < rank; ++i) {
      const std::int64_t size = wanted.begin()[i];
      fits = shape[std::size_t(i)] == size || (more_rows && i == 0 && shape[0] > size);
    }
    if (!fits)
      throw std::invalid_argument(std::string(name) + ": must be " + (more_rows ? "at least " : "") +
                                  text(wanted.begin(), int(wanted.size())) + " of " + wanted_dtype +
                                  ", saw " + text(shape.data(), rank) + " of " + dtype);
    require_contiguous();
    const bool empty = std::find(shape.begin(), shape.begin() + rank, 0) != shape.begin() + rank;
    if (address == nullptr && !empty)
      throw std::invalid_argument(std::string(name) + ": has no memory, as a fake tensor has none");
    return address;
  }

  void require_contiguous() const {
    if (!contiguous())
      throw std::invalid_argument(std::string(name) + ": must be contiguous, saw strides " +
                                  text(strides.data(), rank));
  }

  bool is(const char* wanted) const { return std::strcmp(dtype, wanted) == 0; }

  bool contiguous() const {
    std::int64_t expected = 1;
    bool found = true;
    for (int i = rank - 1; i >= 0; --i) {
      const std::int64_t size = shape[std::size_t(i)];
      if (size == 0) return true;  // of nothing, however it lies
      if (size != 1) found = found && strides[std::size_t(i)] == expected;
      expected *= size;
    }
    return found;
  }

  static std::string text(const std::int64_t* sizes, int rank) {
    std::string out = "(";
    for (int i = 0; i < rank; ++i) out += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
    return out + (rank == 1 ? ",)" : ")");
  }
};

}  // namespace prototok
