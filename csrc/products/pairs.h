// How the two factors of a product in pairs are laid out. One of them is read a pair of neighbours at
// a time and handed to all lanes, the other a vector of pairs at a time. So every matrix is laid out
// for the side it stands on:
//   rows         (rows, length): pairs lie along a row
//   transposed   pair (t, j) is the pair 2 t, 2 t + 1 of row j
//   interleaved  pair (j, t) holds element t of rows 2 j and 2 j + 1
#pragma once

#include "products/tile.h"
#include "simd/bf16.h"
#include "simd/target.h"
#include "simd/vectors.h"

#include <cstdint>

PROTOTOK_TARGET_BEGIN

constexpr std::int64_t rounded_up(std::int64_t count, std::int64_t to) {
  return (count + to - 1) / to * to;
}

// Up to whole vectors of pairs of 16 lanes, which is also the depth of a tile of AMX.
constexpr std::int64_t pairs_padded(std::int64_t count) { return rounded_up(count, 32); }

inline void store(Pair* to, Words pairs) { __builtin_memcpy(to, &pairs, sizeof pairs); }

inline void clear(Pair* from, std::int64_t count) {
  for (std::int64_t t = 0; t < count; t += kLanes) store(from + t, Words{});
}

inline void clear(bf16* from, std::int64_t count) {
  clear(reinterpret_cast<Pair*>(from), count / 2);
}

// bf16 as the first of pairs: up to kLanes that lie in memory, and rounded ones.
inline Words words_of(const bf16* from, std::int64_t left) {
#ifdef PROTOTOK_AVX512
  return (Words)_mm512_cvtepu16_epi32(
      left >= kLanes ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                     : _mm256_maskz_loadu_epi16(first_lanes(left), from));
#else
  return (Words)load_some(from, left) >> 16;
#endif
}

inline Words words_of(Floats values) {
#ifdef PROTOTOK_AVX512_BF16
  return (Words)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)values));
#else
  bf16 narrow[kLanes];
  store(narrow, values);
  return words_of(narrow, kLanes);
#endif
}

// Two rows of `count` elements, the second may be missing -> (count rounded up to vectors,) words.
inline void interleave(const bf16* first, const bf16* second, Pair* to, std::int64_t count) {
  for (std::int64_t t = 0; t < count; t += kLanes) {
    Words words = words_of(first + t, count - t);
    if (second != nullptr) words |= words_of(second + t, count - t) << 16;
    store(to + t, words);
  }
}

// Sixteen rows of sixteen words.
inline void transpose_words(const Pair* from, std::int64_t from_row, Pair* to,
                            std::int64_t to_row) {
#ifdef PROTOTOK_AVX512
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * from_row);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; ++k) {
      a[i + 2 * k] = _mm512_unpacklo_epi64(b[i + k], b[i + k + 2]);
      a[i + 2 * k + 1] = _mm512_unpackhi_epi64(b[i + k], b[i + k + 2]);
    }
  // a[4 g + k] holds of rows 4 g … 4 g + 3 the columns k, k + 4, k + 8, k + 12.
  for (int k = 0; k < 4; ++k) {
    const __m512i low = _mm512_shuffle_i32x4(a[k], a[4 + k], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(a[8 + k], a[12 + k], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(a[k], a[4 + k], 0xdd);
    const __m512i high_odd = _mm512_shuffle_i32x4(a[8 + k], a[12 + k], 0xdd);
    _mm512_storeu_si512(to + k * to_row, _mm512_shuffle_i32x4(low, high, 0x88));
    _mm512_storeu_si512(to + (k + 8) * to_row, _mm512_shuffle_i32x4(low, high, 0xdd));
    _mm512_storeu_si512(to + (k + 4) * to_row, _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
    _mm512_storeu_si512(to + (k + 12) * to_row, _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd));
  }
#else
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k) to[k * to_row + i] = from[i * from_row + k];
#endif
}

// Words (rows, columns), both multiples of 16, -> (columns, rows); rows lie from_row and to_row apart.
inline void transpose_blocks(const Pair* from, std::int64_t from_row, std::int64_t rows,
                             std::int64_t columns, Pair* to, std::int64_t to_row) {
  for (std::int64_t i = 0; i < rows; i += 16)
    for (std::int64_t k = 0; k < columns; k += 16)
      transpose_words(from + i * from_row + k, from_row, to + k * to_row + i, to_row);
}

// rows (P, E), with zeros in what is padded -> transposed (E / 2, P).
inline void transpose_pairs(const bf16* rows, Pair* to, std::int64_t E, std::int64_t P) {
  transpose_blocks(pairs(rows), E / 2, P, E / 2, to, P);
}

// Products of such factors in vectors.
struct PairsInVectors {
  static constexpr std::int64_t kRows = TileShape<Pair>::kRows;  // of a product at most
  static constexpr std::int64_t kColumns = 16;  // keys come in whole vectors of 16 lanes
  // Whether the left factor must be rows, or any elements will do.
  static constexpr bool kOfRows = false;

  // The pairs that a product over so many reads: those behind them must be zero.
  static constexpr std::int64_t depth(std::int64_t pairs) { return pairs; }

  // c (rows, columns) = [c +] a (rows, depth) b (depth, columns).
  void operator()(std::int64_t rows, std::int64_t columns, Elements<Pair> a, const Pair* b,
                  std::int64_t b_row, float* c, std::int64_t c_row, std::int64_t depth,
                  bool add) const {
    product(rows, columns, a, b, b_row, c, c_row, depth, add);
  }
};

PROTOTOK_TARGET_END
