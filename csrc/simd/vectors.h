// Vectors of the target's width, and rows of floats or bfloat16 that are read and written by them.
//
// GCC's and clang's vector extensions rather than intrinsics: one text serves every width, and the
// compiler splits vectors that the target lacks.
#pragma once

#include "simd/bf16.h"
#include "simd/target.h"

#include <cstdint>
#include <limits>

PROTOTOK_TARGET_BEGIN

constexpr int kLanes = PROTOTOK_LANES;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * kLanes)));

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Not value + 0, which the compiler must compute: it is another number for -0.
inline Floats splat(float value) { return value - Floats{}; }

inline Floats load(const float* from) {
  Floats value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline Floats load(const bf16* from) {
  Halves bits;
  __builtin_memcpy(&bits, from, sizeof bits);
#ifdef PROTOTOK_AVX512  // for which GCC takes the conversion apart
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
#else
  return (Floats)(__builtin_convertvector(bits, Words) << 16);
#endif
}

inline void store(float* to, Floats value) { __builtin_memcpy(to, &value, sizeof value); }

#ifdef PROTOTOK_AVX512_BF16
inline void store(bf16* to, Floats value) {
  const __m256bh halves = _mm512_cvtneps_pbh((__m512)value);
  __builtin_memcpy(to, &halves, sizeof halves);
}
#else
inline void store(bf16* to, Floats value) {
  const Words bits = (Words)value;
  const Words nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words kept = value != value ? Words{} + 0x7fc0u : nearest_even;  // NaN must stay NaN
  const Halves halves = __builtin_convertvector(kept, Halves);
  __builtin_memcpy(to, &halves, sizeof halves);
}
#endif

// Two vectors that lie one behind the other.
inline void store_two(bf16* to, Floats first, Floats second) {
#ifdef PROTOTOK_AVX512_BF16
  const __m512bh halves = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  __builtin_memcpy(to, &halves, sizeof halves);
#else
  store(to, first);
  store(to + kLanes, second);
#endif
}

// Fewer than kLanes elements; the lanes without one get `fill`.
#ifdef PROTOTOK_AVX512
inline __mmask16 first_lanes(std::int64_t count) { return __mmask16((1u << count) - 1u); }

inline Floats load_tail(const float* from, std::int64_t count, float fill) {
  return (Floats)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes(count), from);
}

inline Floats load_tail(const bf16* from, std::int64_t count, float fill) {
  const __mmask16 lanes = first_lanes(count);
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from));
  return (Floats)_mm512_mask_mov_ps(_mm512_set1_ps(fill), lanes,
                                    (__m512)_mm512_slli_epi32(words, 16));
}

inline void store_tail(float* to, std::int64_t count, Floats value) {
  _mm512_mask_storeu_ps(to, first_lanes(count), (__m512)value);
}

inline void store_tail(bf16* to, std::int64_t count, Floats value) {
  bf16 lanes[kLanes];
  store(lanes, value);
  __m256i halves;
  __builtin_memcpy(&halves, lanes, sizeof halves);
  _mm256_mask_storeu_epi16(to, first_lanes(count), halves);
}
#else
template <class T>
inline Floats load_tail(const T* from, std::int64_t count, float fill) {
  alignas(64) float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = fill;
  for (std::int64_t i = 0; i < count; ++i) {
    if constexpr (sizeof(T) == sizeof(float)) {
      lanes[i] = from[i];
    } else {
      const std::uint32_t word = std::uint32_t{from[i].bits} << 16;
      __builtin_memcpy(&lanes[i], &word, sizeof word);
    }
  }
  return load(lanes);
}

template <class T>
inline void store_tail(T* to, std::int64_t count, Floats value) {
  T lanes[kLanes];
  store(lanes, value);
  for (std::int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}
#endif

// A whole vector, or the `left` elements that are left with `fill` behind them.
template <class T>
inline Floats load_some(const T* from, std::int64_t left, float fill = 0.0f) {
  return left >= kLanes ? load(from) : load_tail(from, left, fill);
}

template <class T>
inline void store_some(T* to, std::int64_t left, Floats value) {
  if (left >= kLanes)
    store(to, value);
  else
    store_tail(to, left, value);
}

template <int kCount>
struct Lanes {
  typedef float type __attribute__((vector_size(4 * kCount)));
};

template <int kCount>
inline float lane_sum(typename Lanes<kCount>::type value) {
  if constexpr (kCount == 4) {
    return (value[0] + value[2]) + (value[1] + value[3]);
  } else {
    typename Lanes<kCount / 2>::type halves[2];
    __builtin_memcpy(halves, &value, sizeof value);
    return lane_sum<kCount / 2>(halves[0] + halves[1]);
  }
}

template <int kCount>
inline float lane_maximum(typename Lanes<kCount>::type value) {
  if constexpr (kCount == 2) {
    return value[0] > value[1] ? value[0] : value[1];
  } else {
    typename Lanes<kCount / 2>::type halves[2];
    __builtin_memcpy(halves, &value, sizeof value);
    return lane_maximum<kCount / 2>(halves[0] > halves[1] ? halves[0] : halves[1]);
  }
}

inline bool any_lane(Ints value) {
#ifdef PROTOTOK_AVX512
  return _mm512_test_epi32_mask((__m512i)value, (__m512i)value) != 0;
#else
  std::int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= value[i];
  return any != 0;
#endif
}

inline float load_one(const float* from) { return *from; }

inline float load_one(const bf16* from) {
  const std::uint32_t word = std::uint32_t{from->bits} << 16;
  float value;
  __builtin_memcpy(&value, &word, sizeof value);
  return value;
}

inline void store_one(float* to, float value) { *to = value; }

inline void store_one(bf16* to, float value) {
  std::uint32_t word;
  __builtin_memcpy(&word, &value, sizeof word);
  const std::uint32_t nearest_even = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  to->bits = std::uint16_t(value != value ? 0x7fc0u : nearest_even);
}

// a where it is larger, else b; so b where either is NaN.
inline Floats larger(Floats a, Floats b) {
#ifdef PROTOTOK_AVX512
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// The larger; x where it is NaN.
inline Floats no_less(Floats x, float lowest) {
#ifdef PROTOTOK_AVX512
  return (Floats)_mm512_max_ps(_mm512_set1_ps(lowest), (__m512)x);
#else
  return x < lowest ? splat(lowest) : x;
#endif
}

constexpr std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// Up to whole vectors.
constexpr std::int64_t padded(std::int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// `count` is a multiple of kLanes, or what lies behind may be cleared, too.
inline void clear(float* from, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kLanes) store(from + i, Floats{});
}

template <class From, class To>
inline void copy_scaled(const From* from, To* to, std::int64_t count, float scale) {
  for (std::int64_t t = 0; t < count; t += kLanes)
    store_some(to + t, count - t, load_some(from + t, count - t) * scale);
}

// Rows of `count` elements, `from_row` and `to_row` apart, converted.
template <class From, class To>
inline void copy_rows(const From* from, std::int64_t from_row, To* to, std::int64_t to_row,
                      std::int64_t rows, std::int64_t count) {
  for (std::int64_t r = 0; r < rows; ++r)
    copy_scaled(from + r * from_row, to + r * to_row, count, 1.0f);
}

PROTOTOK_TARGET_END
