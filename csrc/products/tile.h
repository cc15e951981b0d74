// The register tile that all products are made of, and products of two small matrices.
//
// A tile adds products of left factors (one a row) and right factors (one a column) to sums that
// stay in registers. It does not know how the factors are read: they are fp32, or pairs of bf16
// where the target multiplies such, and either the left one is an element that all lanes of a
// vector get (Outer), or both are vectors and a sum's lanes are added up at the end (Dots).
#pragma once

#include "simd/bf16.h"
#include "simd/target.h"
#include "simd/vectors.h"

#include <cstdint>

PROTOTOK_TARGET_BEGIN

inline Floats everywhere(const float* from) { return splat(*from); }
inline Floats vector_at(const float* from) { return load(from); }
inline Floats multiply_add(Floats sum, Floats a, Floats b) { return sum + a * b; }

#ifdef PROTOTOK_PAIRS
// Two neighbours, which one instruction multiplies with two others and adds to one sum.
struct Pair {
  bf16 first, second;
};

inline const Pair* pairs(const bf16* from) { return reinterpret_cast<const Pair*>(from); }
#endif

#if defined(PROTOTOK_AVX512_BF16)
typedef __m512bh PairVector;

inline PairVector everywhere(const Pair* from) {
  std::int32_t pair;
  __builtin_memcpy(&pair, from, sizeof pair);
  return (PairVector)_mm512_set1_epi32(pair);
}

inline PairVector vector_at(const Pair* from) { return (PairVector)_mm512_loadu_si512(from); }

inline Floats multiply_add(Floats sum, PairVector a, PairVector b) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, a, b);
}
#elif defined(PROTOTOK_PAIRS)
// The same without the instruction, the second of a pair first as it does.
typedef Words PairVector;

inline PairVector everywhere(const Pair* from) {
  std::uint32_t pair;
  __builtin_memcpy(&pair, from, sizeof pair);
  return PairVector{} + pair;
}

inline PairVector vector_at(const Pair* from) {
  PairVector value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline Floats multiply_add(Floats sum, PairVector a, PairVector b) {
  sum += (Floats)(a & 0xffff0000u) * (Floats)(b & 0xffff0000u);
  return sum + (Floats)(a << 16) * (Floats)(b << 16);
}
#endif

// The loops over a tile's sums are unrolled by pragma: GCC's own unrolling comes too late for it to
// see that the sums can stay in registers all along.

// Not `= {}`, which GCC does in memory.
template <int kRows, int kColumns>
[[gnu::always_inline]] inline void clear(Floats (&sum)[kRows][kColumns]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) sum[r][c] = Floats{};
}

// sum[r][c] += left(r, k) right(c, k) over k < depth.
template <int kRows, int kColumns, class Factors>
[[gnu::always_inline]] inline void accumulate(const Factors& factors, std::int64_t depth,
                                              Floats (&sum)[kRows][kColumns]) {
  using Vector = typename Factors::Vector;
  for (std::int64_t k = 0; k < depth; k += Factors::kStep) {
    Vector right[kColumns];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) right[c] = factors.right(c, k);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vector left = factors.left(r, k);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) sum[r][c] = multiply_add(sum[r][c], left, right[c]);
    }
  }
}

// A matrix that is read an element at a time: element (i, k) is at[i * row + k * column].
template <class E>
struct Elements {
  const E* at;
  std::int64_t row, column;
};

// Elements of `a`, and vectors of the rows of `b`, which lie b_row apart.
template <class E>
struct Outer {
  using Vector = decltype(vector_at(static_cast<const E*>(nullptr)));
  static constexpr int kStep = 1;
  Elements<E> a;
  const E* b;
  std::int64_t b_row;

  Vector left(int r, std::int64_t k) const { return everywhere(a.at + r * a.row + k * a.column); }
  Vector right(int c, std::int64_t k) const { return vector_at(b + k * b_row + c * kLanes); }
};

// How elements lie in the vectors that Dots multiplies.
template <class T>
struct DotVector {
  typedef Floats type;
  static constexpr int kStep = kLanes;
  static type at(const T* from) { return load(from); }
};

#ifdef PROTOTOK_PAIRS
template <>
struct DotVector<bf16> {
  typedef PairVector type;
  static constexpr int kStep = 2 * kLanes;
  static type at(const bf16* from) { return vector_at(pairs(from)); }
};
#endif

// Vectors of the rows of `a` and of `b`. With kPrefetch rows of `a` those are also asked for that lie
// so many further on: rows too short for the processor to foresee.
template <class T, int kPrefetch = 0>
struct Dots {
  using Vector = typename DotVector<T>::type;
  static constexpr int kStep = DotVector<T>::kStep;
  const T* a;
  std::int64_t a_row;
  const T* b;
  std::int64_t b_row;

  Vector left(int r, std::int64_t k) const {
    if constexpr (kPrefetch > 0) __builtin_prefetch(a + (r + kPrefetch) * a_row + k);
    return DotVector<T>::at(a + r * a_row + k);
  }
  Vector right(int c, std::int64_t k) const { return DotVector<T>::at(b + c * b_row + k); }
};

// Calls tile.run<rows>(); more than kMost rows are taken for kMost.
template <int kMost, class Tile>
inline void run_rows(std::int64_t rows, const Tile& tile) {
  if constexpr (kMost > 1)
    if (rows < kMost) return run_rows<kMost - 1>(rows, tile);
  tile.template run<kMost>();
}

// Rows and vectors of a tile whose sums fit in the registers.
template <class E>
struct TileShape {
  static constexpr int kRows = 4, kVectors = kLanes == 16 ? 4 : 2;
};

#ifdef PROTOTOK_PAIRS
template <>
struct TileShape<Pair> {
  // An even number of rows: they come in pairs, too. Without an instruction for pairs a vector of them
  // is two of fp32 while it is multiplied.
  static constexpr int kRows = kLanes == 16 ? 6 : 4, kVectors = kLanes == 16 ? 4 : 2;
};
#endif

constexpr int kTileRows = TileShape<float>::kRows;

template <class E, int kVectors>
struct ProductTile {
  Outer<E> factors;
  float* c;
  std::int64_t c_row, depth;
  bool add;

  template <int kRows>
  void run() const {
    Floats sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] = add ? load(c + r * c_row + v * kLanes) : Floats{};
    accumulate(factors, depth, sum);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store(c + r * c_row + v * kLanes, sum[r][v]);
  }
};

template <int kVectors, class E>
inline void product_columns(std::int64_t rows, Elements<E> a, const E* b, std::int64_t b_row,
                            float* c, std::int64_t c_row, std::int64_t depth, bool add) {
  run_rows<TileShape<E>::kRows>(rows,
                                ProductTile<E, kVectors>{{a, b, b_row}, c, c_row, depth, add});
}

// c (rows, columns) = [c +] a (rows, depth) b (depth, columns): at most a tile of rows, and columns
// a multiple of kLanes.
template <class E>
inline void product(std::int64_t rows, std::int64_t columns, Elements<E> a, const E* b,
                    std::int64_t b_row, float* c, std::int64_t c_row, std::int64_t depth,
                    bool add) {
  constexpr int kVectors = TileShape<E>::kVectors;
  std::int64_t j = 0;
  for (; j + kVectors * kLanes <= columns; j += kVectors * kLanes)
    product_columns<kVectors>(rows, a, b + j, b_row, c + j, c_row, depth, add);
  if constexpr (kVectors == 4)
    for (; j + 2 * kLanes <= columns; j += 2 * kLanes)
      product_columns<2>(rows, a, b + j, b_row, c + j, c_row, depth, add);
  for (; j < columns; j += kLanes)
    product_columns<1>(rows, a, b + j, b_row, c + j, c_row, depth, add);
}

// The same for any number of rows.
template <class E>
inline void all_products(std::int64_t rows, std::int64_t columns, Elements<E> a, const E* b,
                         std::int64_t b_row, float* c, std::int64_t c_row, std::int64_t depth,
                         bool add) {
  constexpr std::int64_t kRows = TileShape<E>::kRows;
  for (std::int64_t r = 0; r < rows; r += kRows)
    product(rows - r < kRows ? rows - r : kRows, columns, {a.at + r * a.row, a.row, a.column}, b,
            b_row, c + r * c_row, c_row, depth, add);
}

template <int kRows, int kColumns>
inline void dots_tile(const Dots<float>& rows, float* c, std::int64_t c_row, std::int64_t length,
                      bool add) {
  Floats sum[kRows][kColumns];
  clear(sum);
  accumulate(rows, length, sum);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int k = 0; k < kColumns; ++k) {
      float& to = c[r * c_row + k];
      to = (add ? to : 0.0f) + lane_sum<kLanes>(sum[r][k]);
    }
}

template <int kRows>
inline void dots_rows(const Dots<float>& of, std::int64_t others, float* c, std::int64_t c_row,
                      std::int64_t length, bool add) {
  std::int64_t s = 0;
  for (; s + 4 <= others; s += 4)
    dots_tile<kRows, 4>({of.a, of.a_row, of.b + s * of.b_row, of.b_row}, c + s, c_row, length, add);
  for (; s < others; ++s)
    dots_tile<kRows, 1>({of.a, of.a_row, of.b + s * of.b_row, of.b_row}, c + s, c_row, length, add);
}

// c (rows, others) = [c +] a (rows, length) b (others, length)^T: rows padded with zeros to vectors.
inline void all_dots(std::int64_t rows, const float* a, std::int64_t a_row, std::int64_t others,
                     const float* b, std::int64_t b_row, float* c, std::int64_t c_row,
                     std::int64_t length, bool add) {
  std::int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    dots_rows<4>({a + r * a_row, a_row, b, b_row}, others, c + r * c_row, c_row, length, add);
  for (; r < rows; ++r)
    dots_rows<1>({a + r * a_row, a_row, b, b_row}, others, c + r * c_row, c_row, length, add);
}

PROTOTOK_TARGET_END
