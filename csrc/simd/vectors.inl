// Included once per instruction set, inside an anonymous namespace and after `kLanes` is defined,
// so that no function compiled for a newer processor can be the one the linker keeps for an older.
//
// GCC's and clang's vector extensions rather than intrinsics: one text serves every width, and the
// compiler splits vectors that the target lacks.

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * kLanes)));

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// A block of fp32 is 8 KiB: its maximum and its sum are two reads, the second from the L1 cache.
constexpr std::int64_t kBlock = 2048;
constexpr int kChains = 4;  // independent accumulators, enough to hide the latency of an addition
constexpr std::int64_t kStride = kChains * kLanes;

inline Floats splat(float value) { return Floats{} + value; }

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

#ifdef PROTOTOK_BF16_INSTRUCTIONS
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

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

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

// The larger; x where it is NaN.
inline Floats no_less(Floats x, float lowest) {
#ifdef PROTOTOK_AVX512
  return (Floats)_mm512_max_ps(_mm512_set1_ps(lowest), (__m512)x);
#else
  return x < lowest ? splat(lowest) : x;
#endif
}

// 2^x for x <= 126 to 1.5 units in the last place; below 2^-127 it may be 0; NaN stays NaN.
inline Floats exp2_of(Floats x) {
#ifdef PROTOTOK_AVX512
  const Floats kept = no_less(x, -160.0f);
  const __m512 whole =
      _mm512_roundscale_ps((__m512)kept, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Floats p = exp2_of_fraction(kept - (Floats)whole);
  return (Floats)_mm512_scalef_ps((__m512)p, whole);
#else
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats kept = no_less(x, -127.0f), shifted = kept + magic;
  const Floats p = exp2_of_fraction(kept - (shifted - magic));
  const Ints exponent = (Ints)shifted - (Ints)magic;
  return p * (Floats)((exponent + 127) << 23);  // exponent -127 gives the bits of 0
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

template <class T>
inline float block_maximum(const T* x, std::int64_t count) {
  Floats best[kChains];
  for (Floats& b : best) b = splat(-kInfinity);
  std::int64_t i = 0;
  for (; i + kStride <= count; i += kStride)
    for (int c = 0; c < kChains; ++c) best[c] = larger(load(x + i + c * kLanes), best[c]);
  for (; i + kLanes <= count; i += kLanes) best[0] = larger(load(x + i), best[0]);
  if (i < count) best[0] = larger(load_tail(x + i, count - i, -kInfinity), best[0]);
  for (int c = 1; c < kChains; ++c) best[0] = larger(best[0], best[c]);
  return lane_maximum<kLanes>(best[0]);
}

// The first of `count` that equals `value`, or `count`.
template <class T>
inline std::int64_t first_equal(const T* x, std::int64_t count, float value) {
  std::int64_t i = 0;
  for (; i + kStride <= count; i += kStride) {
    Ints equal = {};
    for (int c = 0; c < kChains; ++c) equal |= load(x + i + c * kLanes) == value;
    if (any_lane(equal)) break;
  }
  while (i < count && load_one(x + i) != value) ++i;
  return i;
}

// Sum of 2^((x - shift) * scale).
template <class T>
inline double block_sum(const T* x, std::int64_t count, float shift, float scale) {
  Floats sum[kChains] = {};
  std::int64_t i = 0;
  for (; i + kStride <= count; i += kStride)
    for (int c = 0; c < kChains; ++c)
      sum[c] += exp2_of((load(x + i + c * kLanes) - shift) * scale);
  for (; i + kLanes <= count; i += kLanes)
    sum[0] += exp2_of((load(x + i) - shift) * scale);
  if (i < count)
    sum[0] += exp2_of((load_tail(x + i, count - i, -kInfinity) - shift) * scale);
  for (int c = 1; c < kChains; ++c) sum[0] += sum[c];
  double total = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) total += sum[0][lane];
  return total;
}

// What is known of the logits other than the target's.
struct Others {
  float best = -kInfinity;
  std::int64_t block_begin = 0, block_end = 0;  // where `best` was first seen
  double sum = 0.0;                             // of 2^((x - best) * scale)
};

// One read from memory: a block's maximum may rescale the sum so far, then the block is added.
template <class T>
inline void scan(const T* x, std::int64_t begin, std::int64_t end, float scale, Others& others) {
  for (std::int64_t start = begin; start < end; start += kBlock) {
    const std::int64_t stop = start + kBlock < end ? start + kBlock : end;
    const float top = block_maximum(x + start, stop - start);
    if (top > others.best) {
      others.sum *= std::exp2((double(others.best) - top) * scale);
      others.best = top;
      others.block_begin = start;
      others.block_end = stop;
    }
    // With nothing but -inf so far any finite shift leaves the sum at 0 and lets a NaN through.
    const float shift = others.best == -kInfinity ? 0.0f : others.best;
    others.sum += block_sum(x + start, stop - start, shift, scale);
  }
}

// A row's loss and margin, and what its gradient is made of: p - 1{target} is
// others_factor * 2^((x - best) * scale) of every other logit x, and target_slope of the target.
//
// The target is kept apart from the other logits: the best of those is the margin's other half, and
// loss = log1p(sum of others / target) and p - 1 = -(sum of others) / total lose no digits when the
// target has almost all of the probability, where the end of every fit lies.
struct HeadEnd {
  float loss, margin;
  bool target_wins;  // leaves equals to the caller
  float others_factor, target_slope;  // times token_weight / temperature
};

// `sum` is of 2^((x - best) * scale) over the others, in their own scale of exp(x / temperature).
inline HeadEnd head_end(float own, float best, double sum, float token_weight, float temperature) {
  const double gap = (double(own) - best) / temperature;  // nats
  // In units of the larger of exp(own / T) and exp(best / T).
  const double of_others = own >= best ? std::exp(-gap) : 1.0;
  const double of_target = own >= best ? 1.0 : std::exp(gap);
  const double rest = sum > 0.0 ? sum * of_others : sum;
  const double total = of_target + rest, outer = double(token_weight) / temperature / total;
  const double loss = own >= best ? std::log1p(rest) : std::log(total) - gap;
  return {float(loss), own - best, own > best, float(outer * of_others), float(-rest * outer)};
}

template <class T>
HeadResult head_row(const T* logits, T* gradient, std::int64_t vocabulary, std::int64_t target,
                    float token_weight, float temperature) {
  const float scale = float(1.4426950408889634 / temperature);  // exp(x / T) = 2^(x * scale)
  const float own = load_one(logits + target);
  Others others;
  scan(logits, 0, target, scale, others);
  scan(logits, target + 1, vocabulary, scale, others);
  const HeadEnd end = head_end(own, others.best, others.sum, token_weight, temperature);

  HeadResult result{end.loss, target, end.margin};
  if (!end.target_wins) {
    const std::int64_t begin = others.block_begin, end_of_block = others.block_end;
    const std::int64_t rival =
        begin + first_equal(logits + begin, end_of_block - begin, others.best);
    if (rival < end_of_block && (own != others.best || rival < target)) result.predicted = rival;
  }
  if (gradient == nullptr) return result;

  if (token_weight == 0.0f) {
    std::memset(gradient, 0, std::size_t(vocabulary) * sizeof(T));
    return result;
  }
  const float top = others.best == -kInfinity ? 0.0f : others.best, factor = end.others_factor;
  std::int64_t i = 0;
  for (; i + kStride <= vocabulary; i += kStride)
    for (int c = 0; c < kChains; ++c) {
      const std::int64_t at = i + c * kLanes;
      store(gradient + at, exp2_of((load(logits + at) - top) * scale) * factor);
    }
  for (; i + kLanes <= vocabulary; i += kLanes)
    store(gradient + i, exp2_of((load(logits + i) - top) * scale) * factor);
  if (i < vocabulary) {
    const Floats x = load_tail(logits + i, vocabulary - i, -kInfinity);
    store_tail(gradient + i, vocabulary - i, exp2_of((x - top) * scale) * factor);
  }
  store_one(gradient + target, end.target_slope);
  return result;
}

void adamw_row(float* __restrict param, const float* __restrict grad, float* __restrict exp_avg,
               float* __restrict exp_avg_sq, std::int64_t count, const AdamWCoefficients& k) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float g = grad[i];
    const float m = exp_avg[i] + k.one_minus_beta1 * (g - exp_avg[i]);
    const float v = k.beta2 * exp_avg_sq[i] + k.one_minus_beta2 * g * g;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    param[i] = k.decay * param[i] - k.rate * m / (std::sqrt(v) * k.inverse_root_bias + k.eps);
  }
}
