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

// Up to whole vectors of pairs.
constexpr std::int64_t pairs_padded(std::int64_t count) { return (count + 31) / 32 * 32; }

inline void clear(Pair* from, std::int64_t count) {
  for (std::int64_t t = 0; t < count; t += kLanes)
    _mm512_storeu_si512(from + t, _mm512_setzero_si512());
}

inline void clear(bf16* from, std::int64_t count) {
  clear(reinterpret_cast<Pair*>(from), count / 2);
}

inline __m512i words_of(const bf16* from, std::int64_t left) {
  return _mm512_cvtepu16_epi32(left >= kLanes
                                   ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                                   : _mm256_maskz_loadu_epi16(first_lanes(left), from));
}

// Two rows of `count` elements, the second may be missing -> (count rounded up to vectors,) words.
inline void interleave(const bf16* first, const bf16* second, Pair* to, std::int64_t count) {
  for (std::int64_t t = 0; t < count; t += kLanes) {
    __m512i words = words_of(first + t, count - t);
    if (second != nullptr)
      words = _mm512_or_si512(words, _mm512_slli_epi32(words_of(second + t, count - t), 16));
    _mm512_storeu_si512(to + t, words);
  }
}

// Sixteen rows of sixteen words.
inline void transpose_words(const Pair* from, std::int64_t from_row, Pair* to,
                            std::int64_t to_row) {
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
}

// rows (P, E), with zeros in what is padded -> transposed (E / 2, P).
inline void transpose_pairs(const bf16* rows, Pair* to, std::int64_t E, std::int64_t P) {
  for (std::int64_t j = 0; j < P; j += 16)
    for (std::int64_t t = 0; t < E / 2; t += 16)
      transpose_words(pairs(rows + j * E) + t, E / 2, to + t * P + j, P);
}

PROTOTOK_TARGET_END
