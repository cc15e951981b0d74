// Exponentials, reciprocals and sigmoids of vectors.
#pragma once

#include "simd/target.h"
#include "simd/vectors.h"

PROTOTOK_TARGET_BEGIN

constexpr float kLog2e = 1.4426950408889634f;

// The minimax polynomial of 2^f for f in [-1/2, 1/2], relative error 8e-9.
inline Floats exp2_of_fraction(Floats fraction) {
  Floats p = splat(0.00015453163359779865f);
  p = p * fraction + 0.0013390863314270973f;
  p = p * fraction + 0.009618083015084267f;
  p = p * fraction + 0.055503569543361664f;
  p = p * fraction + 0.24022650718688965f;
  p = p * fraction + 0.6931471824645996f;
  return p * fraction + 1.0f;
}

// 2^x for x <= 126 to 1.5 units in the last place, and 0 below 2^-126: an Intel processor takes some
// 150 cycles for a vector with a denormal result, and what a mask hides is 2^-inf. NaN stays NaN.
inline Floats exp2_of(Floats x) {
#ifdef PROTOTOK_AVX512
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const Floats kept = no_less(x, -126.0f);
  const __m512 whole =
      _mm512_roundscale_ps((__m512)kept, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Floats p = exp2_of_fraction(kept - (Floats)whole);
  return (Floats)_mm512_maskz_scalef_ps(normal, (__m512)p, whole);
#else
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats kept = no_less(x, -126.0f), shifted = kept + magic;
  const Floats p = exp2_of_fraction(kept - (shifted - magic));
  const Ints exponent = (Ints)shifted - (Ints)magic;
  const Floats power = p * (Floats)((exponent + 127) << 23);
  return x < -126.0f ? splat(0.0f) : power;
#endif
}

// 1 / x to a unit in the last place, for x from 1 to 1e37.
inline Floats reciprocal(Floats x) {
#ifdef PROTOTOK_AVX512
  const Floats near = (Floats)_mm512_rcp14_ps((__m512)x);
  return near + near * (1.0f - x * near);
#else
  return 1.0f / x;
#endif
}

// 1 / (1 + exp(-x)) and 1 minus that, both to full precision, for x >= -80.
[[gnu::always_inline]] inline Floats sigmoid(Floats x, Floats& complement) {
  const Floats power = exp2_of(x * -kLog2e);
  const Floats value = reciprocal(power + 1.0f);
  complement = power * value;
  return value;
}

PROTOTOK_TARGET_END
