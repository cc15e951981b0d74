// Rotary, causal softmax and the weighted sum of values for the query heads of one key-value head
// of one row, straight from the stacked product and straight to the output projection's input.
// Included by all_kernels.inl.
//
// All products are small matrices in fp32 that stay in the caches: queries are taken kQueryBlock at a
// time, against the keys up to the last of them. Work above the diagonal is left out by tiles.
// Letters: N positions, P = N rounded up to vectors, c head size, C = c rounded up to vectors.

constexpr int kTileRows = 4;
constexpr int kTileVectors = kLanes == 16 ? 4 : 2;  // accumulators that fit in the registers

constexpr std::int64_t padded(std::int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// A matrix that is read an element at a time: element (i, k) is at[i * row + k * column].
struct Scalars {
  const float* at;
  std::int64_t row, column;
};

// c(R, V vectors) = [c +] a(R, depth) b(depth, V vectors).
template <int kRows, int kVectors>
inline void product_tile(Scalars a, const float* b, std::int64_t b_row, float* c,
                         std::int64_t c_row, std::int64_t depth, bool add) {
  Floats sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      sum[r][v] = add ? load(c + r * c_row + v * kLanes) : Floats{};
  for (std::int64_t k = 0; k < depth; ++k) {
    Floats right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * b_row + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const float left = a.at[r * a.row + k * a.column];
      for (int v = 0; v < kVectors; ++v) sum[r][v] += right[v] * left;
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(c + r * c_row + v * kLanes, sum[r][v]);
}

template <int kVectors>
inline void product_rows(std::int64_t rows, Scalars a, const float* b, std::int64_t b_row, float* c,
                         std::int64_t c_row, std::int64_t depth, bool add) {
  switch (rows) {
    case 1: return product_tile<1, kVectors>(a, b, b_row, c, c_row, depth, add);
    case 2: return product_tile<2, kVectors>(a, b, b_row, c, c_row, depth, add);
    case 3: return product_tile<3, kVectors>(a, b, b_row, c, c_row, depth, add);
    default: return product_tile<kTileRows, kVectors>(a, b, b_row, c, c_row, depth, add);
  }
}

// At most kTileRows rows and any number of columns, a multiple of kLanes.
inline void product(std::int64_t rows, std::int64_t columns, Scalars a, const float* b,
                    std::int64_t b_row, float* c, std::int64_t c_row, std::int64_t depth, bool add) {
  std::int64_t j = 0;
  for (; j + kTileVectors * kLanes <= columns; j += kTileVectors * kLanes)
    product_rows<kTileVectors>(rows, a, b + j, b_row, c + j, c_row, depth, add);
  if constexpr (kTileVectors == 4)
    for (; j + 2 * kLanes <= columns; j += 2 * kLanes)
      product_rows<2>(rows, a, b + j, b_row, c + j, c_row, depth, add);
  for (; j < columns; j += kLanes)
    product_rows<1>(rows, a, b + j, b_row, c + j, c_row, depth, add);
}

// to = scale * the rotation by `direction` (1 or -1) times the angle of the position.
template <class From, class To>
inline void turn_head(const From* from, To* to, const AttentionShape& shape, std::int64_t position,
                      float direction, float scale) {
  const std::int64_t half = shape.rotary / 2;
  const float* cos = shape.cos + position * shape.table_row;
  const float* sin = shape.sin + position * shape.table_row;
  for (std::int64_t t = 0; t < half; t += kLanes) {
    const std::int64_t left = half - t;
    const Floats x = load_some(from + t, left), y = load_some(from + half + t, left);
    const Floats c = load_some(cos + t, left) * scale;
    const Floats s = load_some(sin + t, left) * (scale * direction);
    store_some(to + t, left, x * c - y * s);
    store_some(to + half + t, left, y * c + x * s);
  }
  for (std::int64_t t = 2 * half; t < shape.size; t += kLanes)
    store_some(to + t, shape.size - t, load_some(from + t, shape.size - t) * scale);
}

template <class From, class To>
inline void copy_scaled(const From* from, To* to, std::int64_t count, float scale) {
  for (std::int64_t t = 0; t < count; t += kLanes)
    store_some(to + t, count - t, load_some(from + t, count - t) * scale);
}

// (count,) -> a column.
inline void store_column(const float* from, float* to, std::int64_t to_row, std::int64_t count) {
  for (std::int64_t t = 0; t < count; ++t) to[t * to_row] = from[t];
}

// Logits in units of log 2 -> their exponentials relative to the largest, 0 outside [first, last]
// up to `columns`; returns 1 / their sum.
inline float softmax_row(float* x, std::int64_t first, std::int64_t last, std::int64_t columns) {
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  Floats best = splat(-kInfinity);
  for (std::int64_t j = 0; j < columns; j += kLanes) {
    const Ints index = lane + std::int32_t(j);
    const Ints seen = (index >= std::int32_t(first)) & (index <= std::int32_t(last));
    const Floats value = seen ? load(x + j) : splat(-kInfinity);
    store(x + j, value);
    best = larger(value, best);
  }
  const float top = lane_maximum<kLanes>(best);
  Floats sum = {};
  for (std::int64_t j = 0; j < columns; j += kLanes) {
    const Floats value = exp2_of(load(x + j) - top);
    store(x + j, value);
    sum += value;
  }
  return 1.0f / lane_sum<kLanes>(sum);
}

// Where the matrices of one call lie in its scratch memory.
struct AttentionScratch {
  float* next;
  float* take(std::int64_t rows, std::int64_t columns) {
    float* taken = next;
    next += rows * columns;
    return taken;
  }
};

inline std::int64_t lowest(const AttentionShape& shape, std::int64_t position) {
  return position >= shape.window ? position - shape.window + 1 : 0;
}

inline void clear(float* from, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kLanes) store(from + i, Floats{});
}

// The rows of the logits of a block of queries that starts at `begin`, as exponentials; inverse[i]
// is 1 / the sum of row i.
inline void block_weights(const AttentionShape& shape, const float* queries, const float* keys_t,
                          std::int64_t begin, std::int64_t rows, float* weights, float* inverse) {
  const std::int64_t P = padded(shape.length), C = padded(shape.size);
  for (std::int64_t i = 0; i < rows; i += kTileRows) {
    const std::int64_t tile = rows - i < kTileRows ? rows - i : kTileRows;
    const std::int64_t columns = padded(begin + i + tile);
    product(tile, columns, {queries + i * C, C, 1}, keys_t, P, weights + i * P, P, shape.size,
            false);
    for (std::int64_t r = i; r < i + tile; ++r)
      inverse[r] =
          softmax_row(weights + r * P, lowest(shape, begin + r), begin + r, columns);
  }
}

template <class T>
void attention_heads(const AttentionShape& shape, const T* qkv, T* out, std::int64_t kv_head,
                     float* memory) {
  const std::int64_t N = shape.length, c = shape.size, P = padded(N), C = padded(c);
  const std::int64_t group = shape.heads / shape.kv_heads;
  const std::int64_t width = (shape.heads + 2 * shape.kv_heads) * c, out_width = shape.heads * c;
  AttentionScratch scratch{memory};
  float* keys_t = scratch.take(c, P);
  float* values = scratch.take(N, C);
  float* queries = scratch.take(kQueryBlock, C);
  float* weights = scratch.take(kQueryBlock, P);
  float* mixed = scratch.take(kQueryBlock, C);
  float inverse[kQueryBlock];

  clear(keys_t, c * P);
  clear(values, N * C);
  for (std::int64_t j = 0; j < N; ++j) {
    const T* key = qkv + j * width + (shape.heads + kv_head) * c;
    turn_head(key, queries, shape, j, 1.0f, 1.0f);
    store_column(queries, keys_t + j, P, c);
    copy_scaled(key + shape.kv_heads * c, values + j * C, c, 1.0f);
  }
  for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (std::int64_t begin = 0; begin < N; begin += kQueryBlock) {
      const std::int64_t rows = N - begin < kQueryBlock ? N - begin : kQueryBlock;
      for (std::int64_t i = 0; i < rows; ++i)
        turn_head(qkv + (begin + i) * width + head * c, queries + i * C, shape, begin + i, 1.0f,
             shape.scaling * 1.4426950408889634f);
      block_weights(shape, queries, keys_t, begin, rows, weights, inverse);
      for (std::int64_t i = 0; i < rows; i += kTileRows) {
        const std::int64_t tile = rows - i < kTileRows ? rows - i : kTileRows;
        product(tile, C, {weights + i * P, P, 1}, values, C, mixed + i * C, C, begin + i + tile,
                false);
      }
      for (std::int64_t i = 0; i < rows; ++i)
        copy_scaled(mixed + i * C, out + (begin + i) * out_width + head * c, c, inverse[i]);
    }
}

// With p the weights, g the gradient of the output and s the logits:
//   dv_j = sum_i p_ij g_i     dp_ij = <g_i, v_j>     ds_ij = p_ij (dp_ij - sum_j p_ij dp_ij)
//   dq_i = scaling sum_j ds_ij k_j     dk_j = scaling sum_i ds_ij q_i
// and both are turned back. The weights are made again from q and k: nothing but the stacked
// product is kept from the forward pass.
template <class T>
void attention_backward_heads(const AttentionShape& shape, const T* qkv, const T* grad_out,
                              T* grad_qkv, std::int64_t kv_head, float* memory) {
  const std::int64_t N = shape.length, c = shape.size, P = padded(N), C = padded(c);
  const std::int64_t group = shape.heads / shape.kv_heads;
  const std::int64_t width = (shape.heads + 2 * shape.kv_heads) * c, out_width = shape.heads * c;
  AttentionScratch scratch{memory};
  float* keys = scratch.take(N, C);
  float* keys_t = scratch.take(c, P);
  float* values_t = scratch.take(c, P);
  float* grad_keys = scratch.take(N, C);
  float* grad_values = scratch.take(N, C);
  float* queries = scratch.take(kQueryBlock, C);
  float* grads = scratch.take(kQueryBlock, C);
  float* grad_queries = scratch.take(kQueryBlock, C);
  float* weights = scratch.take(kQueryBlock, P);
  float* slopes = scratch.take(kQueryBlock, P);
  float inverse[kQueryBlock];

  clear(keys, N * C);
  clear(keys_t, c * P);
  clear(values_t, c * P);
  clear(grad_keys, N * C);
  clear(grad_values, N * C);
  clear(queries, kQueryBlock * C);
  clear(grads, kQueryBlock * C);
  for (std::int64_t j = 0; j < N; ++j) {
    const T* key = qkv + j * width + (shape.heads + kv_head) * c;
    turn_head(key, keys + j * C, shape, j, 1.0f, 1.0f);
    store_column(keys + j * C, keys_t + j, P, c);
    copy_scaled(key + shape.kv_heads * c, queries, c, 1.0f);
    store_column(queries, values_t + j, P, c);
  }
  const float log2e = 1.4426950408889634f;
  for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (std::int64_t begin = 0; begin < N; begin += kQueryBlock) {
      const std::int64_t rows = N - begin < kQueryBlock ? N - begin : kQueryBlock;
      for (std::int64_t i = 0; i < rows; ++i) {
        turn_head(qkv + (begin + i) * width + head * c, queries + i * C, shape, begin + i, 1.0f,
             shape.scaling * log2e);
        copy_scaled(grad_out + (begin + i) * out_width + head * c, grads + i * C, c, 1.0f);
      }
      block_weights(shape, queries, keys_t, begin, rows, weights, inverse);
      for (std::int64_t i = 0; i < rows; i += kTileRows) {
        const std::int64_t tile = rows - i < kTileRows ? rows - i : kTileRows;
        const std::int64_t seen = begin + i + tile, columns = padded(seen);
        product(tile, columns, {grads + i * C, C, 1}, values_t, P, slopes + i * P, P, c, false);
        for (std::int64_t r = i; r < i + tile; ++r) {
          float* p = weights + r * P;
          float* slope = slopes + r * P;
          Floats sum = {};
          for (std::int64_t j = 0; j < columns; j += kLanes) {
            const Floats weight = load(p + j) * inverse[r];
            store(p + j, weight);
            sum += weight * load(slope + j);
          }
          const float mean = lane_sum<kLanes>(sum);
          for (std::int64_t j = 0; j < columns; j += kLanes)
            store(slope + j, load(p + j) * (load(slope + j) - mean));
        }
        product(tile, C, {slopes + i * P, P, 1}, keys, C, grad_queries + i * C, C, seen, false);
      }
      for (std::int64_t j = 0; j < begin + rows; j += kTileRows) {
        const std::int64_t tile = begin + rows - j < kTileRows ? begin + rows - j : kTileRows;
        // The first query of the block that sees key j.
        const std::int64_t skip = j > begin ? j - begin : 0;
        product(tile, C, {slopes + skip * P + j, 1, P}, queries + skip * C, C, grad_keys + j * C, C,
                rows - skip, true);
        product(tile, C, {weights + skip * P + j, 1, P}, grads + skip * C, C, grad_values + j * C,
                C, rows - skip, true);
      }
      for (std::int64_t i = 0; i < rows; ++i)
        turn_head(grad_queries + i * C, grad_qkv + (begin + i) * width + head * c, shape, begin + i,
             -1.0f, shape.scaling);
    }
  for (std::int64_t j = 0; j < N; ++j) {
    T* grad_key = grad_qkv + j * width + (shape.heads + kv_head) * c;
    // The queries were scaled by log2 e for the exponentials.
    turn_head(grad_keys + j * C, grad_key, shape, j, -1.0f, 1.0f / log2e);
    copy_scaled(grad_values + j * C, grad_key + shape.kv_heads * c, c, 1.0f);
  }
}
