// Included behind all_kernels.inl, once per instruction set, for the same reasons.

#if !defined(__clang__)
inline Floats folded(Floats a, Floats b, Ints one, Ints other) {
  return __builtin_shuffle(a, b, one) + __builtin_shuffle(a, b, other);
}
#endif

typedef typename Lanes<4>::type Four;

// The sums of the lanes of four vectors: four of each are folded side by side.
inline Four four_lane_sums(const Floats* from) {
#if defined(__clang__)
  return Four{lane_sum<kLanes>(from[0]), lane_sum<kLanes>(from[1]), lane_sum<kLanes>(from[2]),
              lane_sum<kLanes>(from[3])};
#else
  Ints low, high, front, back;
  for (int i = 0; i < kLanes; ++i) {
    const int group = i / 4 * 4, second = i % 2 * kLanes;  // of the two vectors that are shuffled
    low[i] = group + i % 4 / 2 + second;
    high[i] = low[i] + 2;
    front[i] = group + i % 2 + (i % 4 / 2) * kLanes;
    back[i] = front[i] + 2;
  }
  const Floats ab = folded(from[0], from[1], low, high), cd = folded(from[2], from[3], low, high);
  const Floats sums = folded(ab, cd, front, back);  // (a, b, c, d) of every four lanes
  Four parts[kLanes / 4];
  __builtin_memcpy(parts, &sums, sizeof sums);
  for (int i = 1; i < kLanes / 4; ++i) parts[0] += parts[i];
  return parts[0];
#endif
}

inline Four load_four(const float* from) {
  Four value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline Four load_four(const bf16* from) {
  std::uint16_t bits[4];
  __builtin_memcpy(bits, from, sizeof bits);
  const std::uint32_t words[4] = {std::uint32_t{bits[0]} << 16, std::uint32_t{bits[1]} << 16,
                                  std::uint32_t{bits[2]} << 16, std::uint32_t{bits[3]} << 16};
  Four value;
  __builtin_memcpy(&value, words, sizeof value);
  return value;
}

// A product's inputs and weights, kStep of them at a time.
template <class T>
struct Dot {
  static constexpr int kStep = kLanes;
  typedef Floats Operand;
  static Operand operand(const T* from) { return load(from); }
  static Floats add(Floats sum, Operand a, Operand b) { return sum + a * b; }
};

#ifdef PROTOTOK_BF16_INSTRUCTIONS
template <>
struct Dot<bf16> {
  static constexpr int kStep = 2 * kLanes;
  typedef __m512i Operand;
  static Operand operand(const bf16* from) { return _mm512_loadu_si512(from); }
  static Floats add(Floats sum, Operand a, Operand b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// kRows tokens x kOutputs sums in registers.
template <int kRows, int kOutputs, bool kPrefetch, class T>
inline void linear_tile(const T* weight, const T* bias, const T* inputs, float* out,
                        const LinearShape& shape, std::int64_t o) {
  using D = Dot<T>;
  const std::int64_t count = shape.inputs;
  const T* w = weight + o * count;
  Floats sum[kRows][kOutputs] = {};
  std::int64_t i = 0;
  for (; i + D::kStep <= count; i += D::kStep) {
    typename D::Operand x[kRows];
    for (int m = 0; m < kRows; ++m) x[m] = D::operand(inputs + m * count + i);
    for (int t = 0; t < kOutputs; ++t) {
      // The tile after this one: its rows are too short a stream for the processor to foresee.
      if constexpr (kPrefetch) __builtin_prefetch(w + (t + kOutputs) * count + i);
      const typename D::Operand value = D::operand(w + t * count + i);
      for (int m = 0; m < kRows; ++m) sum[m][t] = D::add(sum[m][t], x[m], value);
    }
  }
  for (int m = 0; m < kRows; ++m) {
    const T* x = inputs + m * count;
    float* to = out + m * shape.outputs + o;
    if constexpr (kOutputs % 4 == 0) {
      for (int t = 0; t < kOutputs; t += 4) {
        Four value = four_lane_sums(sum[m] + t);
        for (std::int64_t j = i; j < count; ++j)  // behind the last whole vector
          for (int k = 0; k < 4; ++k) value[k] += load_one(x + j) * load_one(w + (t + k) * count + j);
        if (bias != nullptr) value += load_four(bias + o + t);
        if (shape.add) value += load_four(to + t);
        __builtin_memcpy(to + t, &value, sizeof value);
      }
    } else {
      for (int t = 0; t < kOutputs; ++t) {
        float value = lane_sum<kLanes>(sum[m][t]);
        for (std::int64_t j = i; j < count; ++j)
          value += load_one(x + j) * load_one(w + t * count + j);
        if (bias != nullptr) value += load_one(bias + o + t);
        to[t] = shape.add ? to[t] + value : value;
      }
    }
  }
}

constexpr int kTokens = kLanes == 16 ? 4 : 2;  // a tile: a question of registers

// Tokens first ... last - 1 with kOutputs rows of the weight.
template <int kOutputs, class T>
inline void linear_strip(const T* weight, const T* bias, const T* inputs, float* out,
                         const LinearShape& shape, std::int64_t first, std::int64_t last,
                         std::int64_t o) {
  std::int64_t m = first;
  if (m + kTokens <= last) {
    linear_tile<kTokens, kOutputs, true>(weight, bias, inputs + m * shape.inputs,
                                         out + m * shape.outputs, shape, o);
    m += kTokens;
  }
  for (; m + kTokens <= last; m += kTokens)
    linear_tile<kTokens, kOutputs, false>(weight, bias, inputs + m * shape.inputs,
                                          out + m * shape.outputs, shape, o);
  for (; m < last; ++m)
    linear_tile<1, kOutputs, false>(weight, bias, inputs + m * shape.inputs,
                                    out + m * shape.outputs, shape, o);
}

// Tokens go by in blocks that stay in the first cache while the weights pass.
template <class T>
void linear(const void* weight, const void* bias, const void* inputs, float* out,
            const LinearShape& shape, std::int64_t begin, std::int64_t end) {
  constexpr int kOutputs = 4;
  const T* w = static_cast<const T*>(weight);
  const T* b = static_cast<const T*>(bias);
  const T* x = static_cast<const T*>(inputs);
  const std::int64_t fitting = 24576 / (shape.inputs * std::int64_t(sizeof(T)));
  const std::int64_t block = std::max<std::int64_t>(kTokens, fitting / kTokens * kTokens);
  for (std::int64_t first = 0; first < shape.tokens; first += block) {
    const std::int64_t last = std::min(first + block, shape.tokens);
    std::int64_t o = begin;
    if (shape.tokens == 1)
      for (; o + 2 * kOutputs <= end; o += 2 * kOutputs)
        linear_tile<1, 2 * kOutputs, true>(w, b, x, out, shape, o);
    for (; o + kOutputs <= end; o += kOutputs)
      linear_strip<kOutputs>(w, b, x, out, shape, first, last, o);
    for (; o < end; ++o) linear_strip<1>(w, b, x, out, shape, first, last, o);
  }
}

template <class T, class Out>
inline void norm_row(const float* x, const T* weight, const T* bias, float eps, std::int64_t size,
                     Out* out) {
  float mean = 0.0f;
  if (bias != nullptr) {
    Floats sum = {};
    for (std::int64_t i = 0; i < size; i += kLanes) sum += load_some(x + i, size - i, 0.0f);
    mean = lane_sum<kLanes>(sum) / float(size);
  }
  Floats squares = {};
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const Floats centred = load_some(x + i, size - i, mean) - mean;
    squares += centred * centred;
  }
  const float scale = 1.0f / std::sqrt(lane_sum<kLanes>(squares) / float(size) + eps);
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const std::int64_t left = size - i;
    Floats value = (load_some(x + i, left) - mean) * scale * load_some(weight + i, left);
    if (bias != nullptr) value += load_some(bias + i, left);
    store_some(out + i, left, value);
  }
}

template <class T>
void norm(const float* x, const void* weight, const void* bias, float eps, std::int64_t size,
          void* out) {
  norm_row(x, static_cast<const T*>(weight), static_cast<const T*>(bias), eps, size,
           static_cast<T*>(out));
}

template <class T>
void turn(float* head, const void* norm, float eps, const float* cos, const float* sin,
          std::int64_t size, std::int64_t rotated) {
  if (norm != nullptr)
    norm_row(head, static_cast<const T*>(norm), static_cast<const T*>(nullptr), eps, size, head);
  const std::int64_t half = rotated / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const float low = head[i], high = head[half + i];
    head[i] = low * cos[i] - high * sin[i];
    head[half + i] = high * cos[i] + low * sin[i];
  }
}

template <class T>
void keep(const float* key, const float* value, void* keys, void* values, std::int64_t size,
          std::int64_t capacity, std::int64_t position) {
  T* column = static_cast<T*>(keys) + position;
  T* row = static_cast<T*>(values) + position * size;
  for (std::int64_t i = 0; i < size; ++i) {
    store_one(column + i * capacity, key[i]);
    store_one(row + i, value[i]);
  }
}

// Keys lie with positions next to each other, so that lanes are positions and no sum runs across
// them; `begin` is rounded down to a whole vector and what it adds is masked.
template <class T>
void attend(const float* q, const void* keys, const void* values, float scaling, std::int64_t size,
            std::int64_t capacity, std::int64_t begin, std::int64_t end, float* scores, void* out) {
  const T* k = static_cast<const T*>(keys);
  const T* v = static_cast<const T*>(values);
  const std::int64_t aligned = begin / kLanes * kLanes;
  Floats best = splat(-kInfinity);
  for (std::int64_t t = aligned; t < end; t += kLanes) {
    Floats sum[2] = {};
    std::int64_t i = 0;
    for (; i + 2 <= size; i += 2) {
      sum[0] += q[i] * load(k + i * capacity + t);
      sum[1] += q[i + 1] * load(k + (i + 1) * capacity + t);
    }
    if (i < size) sum[0] += q[i] * load(k + i * capacity + t);
    Floats score = (sum[0] + sum[1]) * (scaling * 1.4426950408889634f);
    for (std::int64_t lane = 0; lane < kLanes; ++lane)
      if (t + lane < begin || t + lane >= end) score[lane] = -kInfinity;
    best = larger(score, best);
    store(scores + t, score);
  }
  float top = best[0];
  for (int lane = 1; lane < kLanes; ++lane) top = best[lane] > top ? best[lane] : top;
  Floats total = {};
  for (std::int64_t t = aligned; t < end; t += kLanes) {
    const Floats weight = exp2_of(load(scores + t) - top);
    total += weight;
    store(scores + t, weight);
  }
  const float scale = 1.0f / lane_sum<kLanes>(total);
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const std::int64_t left = size - i;
    Floats sum[2] = {};
    std::int64_t t = begin;
    for (; t + 2 <= end; t += 2) {
      sum[0] += scores[t] * load_some(v + t * size + i, left);
      sum[1] += scores[t + 1] * load_some(v + (t + 1) * size + i, left);
    }
    if (t < end) sum[0] += scores[t] * load_some(v + t * size + i, left);
    store_some(static_cast<T*>(out) + i, left, (sum[0] + sum[1]) * scale);
  }
}

template <class T>
void activate(const float* x, Activation kind, bool gated, std::int64_t size, void* out) {
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const std::int64_t left = size - i;
    Floats value = activation(load_some(x + i, left), kind);
    if (gated) value *= load_some(x + size + i, left);
    store_some(static_cast<T*>(out) + i, left, value);
  }
}

inline std::int64_t argmax(const float* x, std::int64_t count) {
  const float top = block_maximum(x, count);
  std::int64_t i = 0;
  while (i + 1 < count && x[i] != top) ++i;
  return i;
}

template <class T>
void widen(const void* from, float* to, std::int64_t count) {
  const T* x = static_cast<const T*>(from);
  for (std::int64_t i = 0; i < count; i += kLanes)
    store_some(to + i, count - i, load_some(x + i, count - i));
}

template <class T>
constexpr DecoderKernels decoder_kernels_of() {
  return {norm<T>, linear<T>, turn<T>, keep<T>, attend<T>, activate<T>, argmax, widen<T>};
}

const DecoderKernelSets kDecoderKernels{decoder_kernels_of<float>(), decoder_kernels_of<bf16>()};
