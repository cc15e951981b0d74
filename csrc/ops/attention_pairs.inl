// The attention of attention.inl in bf16, its products in pairs by the instruction for them: twice
// the rate of fp32. Included by targets/avx512bf16.cpp, behind all_kernels.inl.
//
// Of a product's two factors one is read a pair of neighbours at a time and handed to all lanes,
// the other a vector of pairs at a time. So every matrix is laid out for the side it stands on:
//   rows         (rows, length): pairs lie along a row
//   transposed   word (t, j) is the pair 2 t, 2 t + 1 of row j
//   interleaved  word (j, t) holds element t of rows 2 j and 2 j + 1
// Weights and slopes are rounded to bf16 as any bf16 attention rounds them; sums are fp32.
// Letters: N positions, P = N rounded up to vectors, c head size, C = c rounded up to vectors of
// words, E = c rounded up to vectors of pairs.

using Pair = std::uint32_t;

constexpr int kPairRows = 6;  // even: rows come in pairs, too

constexpr std::int64_t pairs_padded(std::int64_t count) { return (count + 31) / 32 * 32; }

struct PairScalars {
  const Pair* at;
  std::int64_t row, column;
};

template <int kRows, int kVectors>
inline void pair_tile(PairScalars a, const Pair* b, std::int64_t b_row, float* c,
                      std::int64_t c_row, std::int64_t depth, bool add) {
  __m512 sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      sum[r][v] = add ? _mm512_loadu_ps(c + r * c_row + v * kLanes) : _mm512_setzero_ps();
  for (std::int64_t k = 0; k < depth; ++k) {
    __m512bh right[kVectors];
    for (int v = 0; v < kVectors; ++v)
      right[v] = (__m512bh)_mm512_loadu_si512(b + k * b_row + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const __m512bh left =
          (__m512bh)_mm512_set1_epi32(int(a.at[r * a.row + k * a.column]));
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, right[v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(c + r * c_row + v * kLanes, sum[r][v]);
}

template <int kVectors>
inline void pair_rows(std::int64_t rows, PairScalars a, const Pair* b, std::int64_t b_row, float* c,
                      std::int64_t c_row, std::int64_t depth, bool add) {
  switch (rows) {
    case 1: return pair_tile<1, kVectors>(a, b, b_row, c, c_row, depth, add);
    case 2: return pair_tile<2, kVectors>(a, b, b_row, c, c_row, depth, add);
    case 3: return pair_tile<3, kVectors>(a, b, b_row, c, c_row, depth, add);
    case 4: return pair_tile<4, kVectors>(a, b, b_row, c, c_row, depth, add);
    case 5: return pair_tile<5, kVectors>(a, b, b_row, c, c_row, depth, add);
    default: return pair_tile<kPairRows, kVectors>(a, b, b_row, c, c_row, depth, add);
  }
}

// At most kPairRows rows; columns a multiple of kLanes; depth in pairs.
inline void pair_product(std::int64_t rows, std::int64_t columns, PairScalars a, const Pair* b,
                         std::int64_t b_row, float* c, std::int64_t c_row, std::int64_t depth,
                         bool add) {
  std::int64_t j = 0;
  for (; j + 4 * kLanes <= columns; j += 4 * kLanes)
    pair_rows<4>(rows, a, b + j, b_row, c + j, c_row, depth, add);
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes)
    pair_rows<2>(rows, a, b + j, b_row, c + j, c_row, depth, add);
  if (j < columns) pair_rows<1>(rows, a, b + j, b_row, c + j, c_row, depth, add);
}

inline const Pair* pairs(const bf16* from) { return reinterpret_cast<const Pair*>(from); }

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

// Rows (N, E), with zeros in what is padded -> transposed (E / 2, P), and `rows` has
// room for P rows.
inline void transpose_pairs(const bf16* rows, Pair* to, std::int64_t E, std::int64_t P) {
  for (std::int64_t j = 0; j < P; j += 16)
    for (std::int64_t t = 0; t < E / 2; t += 16)
      transpose_words(pairs(rows + j * E) + t, E / 2, to + t * P + j, P);
}

inline __mmask16 lanes_between(std::int64_t j, std::int64_t first, std::int64_t last) {
  const std::int64_t low = first - j, high = last + 1 - j;
  const std::uint32_t before = low <= 0 ? 0u : low >= 16 ? 0xffffu : (1u << low) - 1u;
  const std::uint32_t through = high >= 16 ? 0xffffu : high <= 0 ? 0u : (1u << high) - 1u;
  return __mmask16(through & ~before);
}

// Logits in units of log 2 -> their exponentials relative to the largest, 0 outside [first, last]
// up to `columns`; returns 1 / their sum.
template <class T>
inline float softmax_of_row(const float* x, T* weights, std::int64_t first, std::int64_t last,
                            std::int64_t columns) {
  const __m512 nothing = _mm512_set1_ps(-kInfinity);
  __m512 best = nothing;
  for (std::int64_t j = 0; j < columns; j += kLanes)
    best = _mm512_mask_max_ps(best, lanes_between(j, first, last), best, _mm512_loadu_ps(x + j));
  const Floats top = splat(_mm512_reduce_max_ps(best));
  Floats sum = {};
  for (std::int64_t j = 0; j < columns; j += kLanes) {
    const __mmask16 seen = lanes_between(j, first, last);
    const Floats power = exp2_of(load(x + j) - top);
    const Floats value = (Floats)_mm512_maskz_mov_ps(seen, (__m512)power);
    store(weights + j, value);
    sum += value;
  }
  return 1.0f / lane_sum<kLanes>(sum);
}

inline Pair* take_pairs(AttentionScratch& scratch, std::int64_t rows, std::int64_t columns) {
  return reinterpret_cast<Pair*>(scratch.take(rows, columns));
}

inline bf16* take_rows(AttentionScratch& scratch, std::int64_t rows, std::int64_t E) {
  return reinterpret_cast<bf16*>(scratch.take(rows, E / 2));
}

void attention_heads_in_pairs(const AttentionShape& shape, const bf16* qkv, bf16* out,
                              std::int64_t kv_head, float* memory) {
  const std::int64_t N = shape.length, c = shape.size;
  const std::int64_t P = padded(N), C = padded(c), E = pairs_padded(c), depth = (c + 1) / 2;
  const std::int64_t group = shape.heads / shape.kv_heads;
  const std::int64_t width = (shape.heads + 2 * shape.kv_heads) * c, out_width = shape.heads * c;
  AttentionScratch scratch{memory};
  bf16* rows = take_rows(scratch, P > kQueryBlock ? P : kQueryBlock, E);
  Pair* keys_t = take_pairs(scratch, E / 2, P);
  Pair* values = take_pairs(scratch, P / 2, C);
  bf16* weights = reinterpret_cast<bf16*>(scratch.take(kPairRows, P / 2));
  float* logits = scratch.take(kPairRows, P);
  float* mixed = scratch.take(kPairRows, C);
  float inverse[kPairRows];

  clear(reinterpret_cast<float*>(rows), (P > kQueryBlock ? P : kQueryBlock) * E / 2);
  const bf16* keys = qkv + (shape.heads + kv_head) * c;
  for (std::int64_t j = 0; j < N; ++j)
    turn_head(keys + j * width, rows + j * E, shape, j, 1.0f, 1.0f);
  transpose_pairs(rows, keys_t, E, P);
  const bf16* value = keys + shape.kv_heads * c;
  for (std::int64_t j = 0; j < N; j += 2)
    interleave(value + j * width, j + 1 < N ? value + (j + 1) * width : nullptr,
               values + j / 2 * C, c);
  for (std::int64_t j = (N + 1) / 2; j < P / 2; ++j)
    clear(reinterpret_cast<float*>(values + j * C), C);

  bf16* queries = rows;
  for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (std::int64_t begin = 0; begin < N; begin += kPairRows) {
      const std::int64_t tile = N - begin < kPairRows ? N - begin : kPairRows;
      const std::int64_t columns = padded(begin + tile);
      for (std::int64_t i = 0; i < tile; ++i)
        turn_head(qkv + (begin + i) * width + head * c, queries + i * E, shape, begin + i, 1.0f,
                  shape.scaling * 1.4426950408889634f);
      pair_product(tile, columns, {pairs(queries), E / 2, 1}, keys_t, P, logits, P, depth, false);
      for (std::int64_t i = 0; i < tile; ++i)
        inverse[i] = softmax_of_row(logits + i * P, weights + i * P, lowest(shape, begin + i),
                                    begin + i, columns);
      pair_product(tile, C, {pairs(weights), P / 2, 1}, values, C, mixed, C,
                   (begin + tile + 1) / 2, false);
      for (std::int64_t i = 0; i < tile; ++i)
        copy_scaled(mixed + i * C, out + (begin + i) * out_width + head * c, c, inverse[i]);
    }
}

// The weights p and the slopes ds of two queries, from exponentials, their sums' inverses and dp:
// interleaved, and ds in rows as well.
inline void slopes_of_rows(const float* const powers[2], const float* const grads[2],
                           const float inverse[2], Pair* weights, Pair* slopes,
                           bf16* const slope_rows[2], std::int64_t columns) {
  Floats sum[2] = {};
  for (std::int64_t j = 0; j < columns; j += kLanes)
    for (int r = 0; r < 2; ++r) sum[r] += load(powers[r] + j) * load(grads[r] + j);
  float mean[2];
  for (int r = 0; r < 2; ++r) mean[r] = lane_sum<kLanes>(sum[r]) * inverse[r];
  for (std::int64_t j = 0; j < columns; j += kLanes) {
    __m512i p[2], ds[2];
    for (int r = 0; r < 2; ++r) {
      const Floats weight = load(powers[r] + j) * inverse[r];
      const Floats slope = weight * (load(grads[r] + j) - mean[r]);
      const __m256i narrow_slope = (__m256i)_mm512_cvtneps_pbh((__m512)slope);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(slope_rows[r] + j), narrow_slope);
      ds[r] = _mm512_cvtepu16_epi32(narrow_slope);
      p[r] = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)weight));
    }
    _mm512_storeu_si512(weights + j, _mm512_or_si512(p[0], _mm512_slli_epi32(p[1], 16)));
    _mm512_storeu_si512(slopes + j, _mm512_or_si512(ds[0], _mm512_slli_epi32(ds[1], 16)));
  }
}

// attention_backward_heads, with the formulas that stand there.
void attention_backward_heads_in_pairs(const AttentionShape& shape, const bf16* qkv,
                                       const bf16* grad_out, bf16* grad_qkv, std::int64_t kv_head,
                                       float* memory) {
  const std::int64_t N = shape.length, c = shape.size;
  const std::int64_t P = padded(N), C = padded(c), E = pairs_padded(c), depth = (c + 1) / 2;
  const std::int64_t group = shape.heads / shape.kv_heads;
  const std::int64_t width = (shape.heads + 2 * shape.kv_heads) * c, out_width = shape.heads * c;
  AttentionScratch scratch{memory};
  bf16* rows = take_rows(scratch, P, E);
  Pair* keys = take_pairs(scratch, P / 2, C);
  Pair* keys_t = take_pairs(scratch, E / 2, P);
  Pair* values_t = take_pairs(scratch, E / 2, P);
  float* grad_keys = scratch.take(P, C);
  float* grad_values = scratch.take(P, C);
  bf16* query_rows = take_rows(scratch, kQueryBlock, E);
  bf16* grad_rows = take_rows(scratch, kQueryBlock, E);
  Pair* queries = take_pairs(scratch, kQueryBlock / 2, C);
  Pair* grads = take_pairs(scratch, kQueryBlock / 2, C);
  Pair* weights = take_pairs(scratch, kQueryBlock / 2, P);
  Pair* slopes = take_pairs(scratch, kQueryBlock / 2, P);
  bf16* slope_rows = reinterpret_cast<bf16*>(scratch.take(kPairRows, P / 2));
  float* powers = scratch.take(kPairRows, P);
  float* grad_weights = scratch.take(kPairRows, P);
  float* grad_queries = scratch.take(kPairRows, C);

  clear(reinterpret_cast<float*>(rows), P * E / 2);
  clear(reinterpret_cast<float*>(query_rows), kQueryBlock * E);  // and grad_rows
  clear(grad_keys, 2 * P * C);                                   // and grad_values
  const bf16* key = qkv + (shape.heads + kv_head) * c;
  for (std::int64_t j = 0; j < N; ++j)
    turn_head(key + j * width, rows + j * E, shape, j, 1.0f, 1.0f);
  for (std::int64_t j = 0; j < P; j += 2)
    interleave(rows + j * E, rows + (j + 1) * E, keys + j / 2 * C, c);
  transpose_pairs(rows, keys_t, E, P);
  for (std::int64_t j = 0; j < N; ++j)
    copy_scaled(key + j * width + shape.kv_heads * c, rows + j * E, c, 1.0f);
  transpose_pairs(rows, values_t, E, P);

  for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (std::int64_t begin = 0; begin < N; begin += kQueryBlock) {
      const std::int64_t count = N - begin < kQueryBlock ? N - begin : kQueryBlock;
      const std::int64_t even = count + count % 2;
      for (std::int64_t i = 0; i < count; ++i) {
        turn_head(qkv + (begin + i) * width + head * c, query_rows + i * E, shape, begin + i, 1.0f,
                  shape.scaling * 1.4426950408889634f);
        copy_scaled(grad_out + (begin + i) * out_width + head * c, grad_rows + i * E, c, 1.0f);
      }
      if (even > count) {  // a query of zeros, which adds nothing
        clear(reinterpret_cast<float*>(query_rows + count * E), E / 2);
        clear(reinterpret_cast<float*>(grad_rows + count * E), E / 2);
      }
      for (std::int64_t i = 0; i < even; i += 2) {
        interleave(query_rows + i * E, query_rows + (i + 1) * E, queries + i / 2 * C, c);
        interleave(grad_rows + i * E, grad_rows + (i + 1) * E, grads + i / 2 * C, c);
      }
      for (std::int64_t i = 0; i < even; i += kPairRows) {
        const std::int64_t tile = even - i < kPairRows ? even - i : kPairRows;
        const std::int64_t seen = begin + i + tile, columns = padded(seen);
        pair_product(tile, columns, {pairs(query_rows + i * E), E / 2, 1}, keys_t, P, powers, P,
                     depth, false);
        pair_product(tile, columns, {pairs(grad_rows + i * E), E / 2, 1}, values_t, P, grad_weights,
                     P, depth, false);
        for (std::int64_t r = 0; r < tile; r += 2) {
          float inverse[2];
          for (int k = 0; k < 2; ++k) {
            const std::int64_t query = begin + i + r + k;
            float* row = powers + (r + k) * P;
            inverse[k] = softmax_of_row(row, row, lowest(shape, query), query, columns);
          }
          const float* const powers_of[2] = {powers + r * P, powers + (r + 1) * P};
          const float* const grads_of[2] = {grad_weights + r * P, grad_weights + (r + 1) * P};
          bf16* const rows_of[2] = {slope_rows + r * P, slope_rows + (r + 1) * P};
          slopes_of_rows(powers_of, grads_of, inverse, weights + (i + r) / 2 * P,
                         slopes + (i + r) / 2 * P, rows_of, columns);
        }
        pair_product(tile, C, {pairs(slope_rows), P / 2, 1}, keys, C, grad_queries, C,
                     (seen + 1) / 2, false);
        for (std::int64_t r = 0; r < tile && i + r < count; ++r)
          turn_head(grad_queries + r * C, grad_qkv + (begin + i + r) * width + head * c, shape,
                    begin + i + r, -1.0f, shape.scaling);
      }
      // Tiles of keys end where those of queries do: beyond the columns of its own tile a query has
      // no weights, not even zeros.
      for (std::int64_t j = 0, tile; j < begin + even; j += tile) {
        const std::int64_t end = j < begin ? begin : begin + even;
        tile = end - j < kPairRows ? end - j : kPairRows;
        const std::int64_t skip = j > begin ? (j - begin) / 2 : 0;  // pairs that do not see key j
        pair_product(tile, C, {slopes + skip * P + j, 1, P}, queries + skip * C, C,
                     grad_keys + j * C, C, even / 2 - skip, true);
        pair_product(tile, C, {weights + skip * P + j, 1, P}, grads + skip * C, C,
                     grad_values + j * C, C, even / 2 - skip, true);
      }
    }
  for (std::int64_t j = 0; j < N; ++j) {
    bf16* grad_key = grad_qkv + j * width + (shape.heads + kv_head) * c;
    // The queries were scaled by log2 e for the exponentials.
    turn_head(grad_keys + j * C, grad_key, shape, j, -1.0f, 1.0f / 1.4426950408889634f);
    copy_scaled(grad_values + j * C, grad_key + shape.kv_heads * c, c, 1.0f);
  }
}
