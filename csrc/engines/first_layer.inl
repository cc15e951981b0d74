// One text of first_layer.h in either direction. Included by targets/avx512bf16.cpp, behind
// packed_product.inl.
//
// A position is a combination of S vectors by its row of `coef` (N, S): [0, 1, 0 …] at position 0,
// [1, 0, w_i1 … w_iH] behind it. Of the two vectors m comes first. What has one, two or S rows is
// small enough for fp32; what enters a product with a weight is rounded to bf16.

// What the way back needs of the way there.
struct FirstLayerSaved {
  float* coef;                 // (N, S)
  float* shares;               // (N, H): exp a_i of the sum up to it
  float* rms_inverse;          // (N,)
  float* span;                 // (S, d): base of m, base of e, one U a head
  float* projected;            // (S, W): the first product of the MLP, of the spanning vectors
  float* qkv;                  // (2, Q)
  NormStatistics* statistics;  // (2,)
  FirstLayerSaved(const FirstLayerSizes& size, float* memory) {
    AttentionScratch area{memory};
    coef = area.take(size.length, size.coef_row);
    shares = area.take(size.length, size.head_row);
    rms_inverse = area.take(1, padded(size.length));
    span = area.take(size.span, size.hidden_row);
    projected = area.take(size.span, size.wide_row);
    qkv = area.take(2, size.stacked_row);
    statistics = reinterpret_cast<NormStatistics*>(area.take(1, kLanes));
  }
};

// c(A, B) = [c +] a(A, length) b(B, length)^T; rows padded with zeros to vectors.
template <int kRows>
inline void row_dots(const float* a, std::int64_t a_row, std::int64_t others, const float* b,
                     std::int64_t b_row, float* c, std::int64_t c_row, std::int64_t length,
                     bool add) {
  std::int64_t s = 0;
  for (; s + 4 <= others; s += 4) {
    Floats sum[kRows][4] = {};
    for (std::int64_t t = 0; t < length; t += kLanes)
      for (int k = 0; k < 4; ++k) {
        const Floats right = load(b + (s + k) * b_row + t);
        for (int r = 0; r < kRows; ++r) sum[r][k] += load(a + r * a_row + t) * right;
      }
    for (int r = 0; r < kRows; ++r)
      for (int k = 0; k < 4; ++k) {
        float& to = c[r * c_row + s + k];
        to = (add ? to : 0.0f) + lane_sum<kLanes>(sum[r][k]);
      }
  }
  for (; s < others; ++s)
    for (int r = 0; r < kRows; ++r) {
      Floats sum = {};
      for (std::int64_t t = 0; t < length; t += kLanes)
        sum += load(a + r * a_row + t) * load(b + s * b_row + t);
      float& to = c[r * c_row + s];
      to = (add ? to : 0.0f) + lane_sum<kLanes>(sum);
    }
}

inline void all_dots(std::int64_t rows, const float* a, std::int64_t a_row, std::int64_t others,
                     const float* b, std::int64_t b_row, float* c, std::int64_t c_row,
                     std::int64_t length, bool add) {
  std::int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    row_dots<4>(a + r * a_row, a_row, others, b, b_row, c + r * c_row, c_row, length, add);
  for (; r < rows; ++r)
    row_dots<1>(a + r * a_row, a_row, others, b, b_row, c + r * c_row, c_row, length, add);
}

inline std::int64_t tile_of(std::int64_t rows, std::int64_t from) {
  return std::min<std::int64_t>(rows - from, kTileRows);
}

// Any number of rows of a.
inline void all_products(std::int64_t rows, std::int64_t columns, Scalars a, const float* b,
                         std::int64_t b_row, float* c, std::int64_t c_row, std::int64_t depth,
                         bool add) {
  for (std::int64_t r = 0; r < rows; r += kTileRows)
    product(tile_of(rows, r), columns, {a.at + r * a.row, a.row, a.column}, b, b_row, c + r * c_row,
            c_row, depth, add);
}

// 1 / sqrt(mean square + eps) of a row, about its mean where centred.
inline float inverse_rms(const float* x, std::int64_t count, bool centred, float eps) {
  Floats total = {}, squares = {};
  if (centred)
    for (std::int64_t t = 0; t < count; t += kLanes) total += load_some(x + t, count - t);
  const float mean = lane_sum<kLanes>(total) / float(count);
  for (std::int64_t t = 0; t < count; t += kLanes) {
    const Floats value = load_some(x + t, count - t, mean) - mean;
    squares += value * value;
  }
  return 1.0f / std::sqrt(lane_sum<kLanes>(squares) / float(count) + eps);
}

// (rows, count) bf16 from fp32 rows that are `from_row` apart.
inline void narrow_rows(const float* from, std::int64_t from_row, bf16* to, std::int64_t rows,
                        std::int64_t count) {
  for (std::int64_t r = 0; r < rows; ++r)
    copy_scaled(from + r * from_row, to + r * count, count, 1.0f);
}

inline void add_row(float* to, const bf16* row, std::int64_t count) {
  if (row == nullptr) return;
  for (std::int64_t t = 0; t < count; t += kLanes)
    store_some(to + t, count - t, load_some(to + t, count - t) + load_some(row + t, count - t));
}

// (N, T): cos, sin and 1 of each position, as the features of a head are laid out.
inline void distance_table(const FirstLayerSizes& size, const FirstLayerTexts& text, float* table) {
  const std::int64_t half = text.rotary / 2, T = size.table_row;
  clear(table, size.length * T);
  for (std::int64_t i = 0; i < size.length; ++i) {
    copy_scaled(text.cos + i * text.rotary, table + i * T, half, 1.0f);
    copy_scaled(text.sin + i * text.rotary, table + i * T + half, half, 1.0f);
    table[i * T + 2 * half] = 1.0f;
  }
}

// One query or key of two vectors as the logits take it: normed where the model does that, a key
// also turned by row 0 of the tables, which is where a scaled rotary embedding keeps its factor.
inline float prepared_head(const FirstLayerModel& model, const FirstLayerTexts& text,
                           const float* from, const bf16* norm, bool turned, float* to) {
  const std::int64_t c = model.head_size, half = text.rotary / 2;
  float inverse = 1.0f;
  for (std::int64_t t = 0; t < c; ++t) to[t] = from[t];
  if (norm != nullptr) {
    float squares = 0.0f;
    for (std::int64_t t = 0; t < c; ++t) squares += from[t] * from[t];
    inverse = 1.0f / std::sqrt(squares / float(c) + model.eps);
    for (std::int64_t t = 0; t < c; ++t) to[t] = from[t] * inverse * load_one(norm + t);
  }
  if (turned)
    for (std::int64_t t = 0; t < half; ++t) {
      const float x = to[t], y = to[half + t];
      to[t] = x * text.cos[t] - y * text.sin[t];
      to[half + t] = y * text.cos[t] + x * text.sin[t];
    }
  return inverse;
}

// Adds to grad_from what `grad`, of prepared_head's result, says of `from`; overwrites `grad`.
inline void prepared_head_backward(const FirstLayerModel& model, const FirstLayerTexts& text,
                                   const float* from, const bf16* norm, bool turned, float inverse,
                                   float* grad, float* grad_from) {
  const std::int64_t c = model.head_size, half = text.rotary / 2;
  if (turned)
    for (std::int64_t t = 0; t < half; ++t) {
      const float x = grad[t], y = grad[half + t];
      grad[t] = x * text.cos[t] + y * text.sin[t];
      grad[half + t] = y * text.cos[t] - x * text.sin[t];
    }
  float pull = 0.0f;
  if (norm != nullptr) {
    for (std::int64_t t = 0; t < c; ++t) {
      grad[t] *= load_one(norm + t);
      pull += grad[t] * from[t];
    }
    pull *= inverse * inverse / float(c);
  }
  for (std::int64_t t = 0; t < c; ++t) grad_from[t] += (grad[t] - from[t] * pull) * inverse;
}

// Logits of q against k by their distance are scale * feature · table.
inline void head_feature(const float* q, const float* k, std::int64_t size, std::int64_t half,
                         float scale, float* feature) {
  float rest = 0.0f;
  for (std::int64_t t = 0; t < half; ++t) {
    feature[t] = (q[t] * k[t] + q[half + t] * k[half + t]) * scale;
    feature[half + t] = (q[t] * k[half + t] - q[half + t] * k[t]) * scale;
  }
  for (std::int64_t t = 2 * half; t < size; ++t) rest += q[t] * k[t];
  feature[2 * half] = rest * scale;
}

inline void head_feature_backward(const float* grad, const float* q, const float* k,
                                  std::int64_t size, std::int64_t half, float scale, float* grad_q,
                                  float* grad_k) {
  for (std::int64_t t = 0; t < half; ++t) {
    const float of_cos = grad[t] * scale, of_sin = grad[half + t] * scale;
    grad_q[t] += of_cos * k[t] + of_sin * k[half + t];
    grad_q[half + t] += of_cos * k[half + t] - of_sin * k[t];
    grad_k[t] += of_cos * q[t] - of_sin * q[half + t];
    grad_k[half + t] += of_cos * q[half + t] + of_sin * q[t];
  }
  const float of_rest = grad[2 * half] * scale;
  for (std::int64_t t = 2 * half; t < size; ++t) {
    grad_q[t] += of_rest * k[t];
    grad_k[t] += of_rest * q[t];
  }
}

// The queries of m and the keys of both, prepared, and what their norms divided by.
struct PreparedHeads {
  float *queries, *keys[2];                       // (H, c), (K, c) of m and of e
  float *query_inverses, *key_inverses[2];
  PreparedHeads(const FirstLayerSizes& size, const FirstLayerModel& model,
                const FirstLayerTexts& text, const float* qkv, AttentionScratch& scratch) {
    const std::int64_t c = model.head_size, K = model.kv_heads;
    queries = scratch.take(1, size.mixed_row);
    query_inverses = scratch.take(1, size.head_row);
    for (std::int64_t h = 0; h < size.heads; ++h)
      query_inverses[h] =
          prepared_head(model, text, qkv + h * c, model.q_norm, false, queries + h * c);
    for (int vector = 0; vector < 2; ++vector) {
      keys[vector] = scratch.take(1, size.mixed_row);
      key_inverses[vector] = scratch.take(1, size.head_row);
      for (std::int64_t k = 0; k < K; ++k)
        key_inverses[vector][k] =
            prepared_head(model, text, qkv + vector * size.stacked_row + (size.heads + k) * c,
                          model.k_norm, true, keys[vector] + k * c);
    }
  }
};

// coef and shares from the logits a of m to m at distance i and b of m at position i to e, both
// (N, H) in units of log 2. With P_i the sum of exp a_δ over δ < i, w_i is exp b_i / (exp b_i +
// P_i), and a_i has the share exp a_i / P_{i + 1} of the sum that it joins. The sum is kept
// relative to its largest term: logits may span hundreds of nats.
inline void affine_scan(const FirstLayerSizes& size, const float* a, const float* b,
                        const FirstLayerSaved& saved) {
  const std::int64_t C = size.coef_row, G = size.head_row;
  for (std::int64_t i = 0; i < size.length; ++i) {
    float* coef = saved.coef + i * C;
    clear(coef, C);
    coef[i == 0 ? 1 : 0] = 1.0f;
  }
  for (std::int64_t h = 0; h < size.heads; h += kLanes) {
    Floats best = splat(-kInfinity), sum = {};
    for (std::int64_t i = 0; i < size.length; ++i) {
      if (i > 0) {
        const Floats to_e = load(b + i * G + h), top = larger(to_e, best);
        const Floats of_e = exp2_of(to_e - top), of_m = sum * exp2_of(best - top);
        store_some(saved.coef + i * C + 2 + h, size.heads - h, of_e / (of_e + of_m));
      }
      const Floats to_m = load(a + i * G + h), top = larger(to_m, best);
      const Floats joins = exp2_of(to_m - top);
      sum = sum * exp2_of(best - top) + joins;
      best = top;
      store(saved.shares + i * G + h, joins / sum);
    }
  }
}

// U_i = z_{i+1} + (P_{i+1} / P_{i+2}) U_{i+1} with z = ∂w · w (1 - w) = ∂b; ∂a_i = -share_i U_i; of
// the logits in nats.
inline void affine_scan_backward(const FirstLayerSizes& size, const FirstLayerSaved& saved,
                                 const float* grad_coef, float* grad_a, float* grad_b) {
  const std::int64_t C = size.coef_row, G = size.head_row;
  for (std::int64_t h = 0; h < size.heads; h += kLanes) {
    Floats later = {};  // U_i
    for (std::int64_t i = size.length - 1; i >= 0; --i) {
      const Floats share = load(saved.shares + i * G + h);
      Floats z = {};
      if (i > 0) {
        const std::int64_t at = i * C + 2 + h;
        const Floats w = load(saved.coef + at);
        z = load(grad_coef + at) * w * (1.0f - w);
      }
      store(grad_a + i * G + h, share * later * -1.0f);
      store(grad_b + i * G + h, z);
      later = z + (1.0f - share) * later;
    }
  }
}

// Rows without their means where a LayerNorm follows.
inline void centre_rows(float* rows, std::int64_t row, std::int64_t count, std::int64_t length) {
  for (std::int64_t r = 0; r < count; ++r, rows += row) {
    Floats total = {};
    for (std::int64_t t = 0; t < length; t += kLanes) total += load_some(rows + t, length - t);
    const float mean = lane_sum<kLanes>(total) / float(length);
    for (std::int64_t t = 0; t < length; t += kLanes)
      store_some(rows + t, length - t, load_some(rows + t, length - t) - mean);
  }
}

inline void copy_floats(const float* from, float* to, std::int64_t count) {
  std::memcpy(to, from, std::size_t(count) * sizeof(float));
}

// What the block makes of the two vectors alone: q, k and v, and the spanning vectors.
inline void span_of_pair(const FirstLayerText& call, const FirstLayerSizes& size,
                         const FirstLayerSaved& saved, AttentionScratch scratch) {
  const FirstLayerModel& model = call.model;
  const std::int64_t d = size.hidden, D = size.hidden_row, c = model.head_size;
  const std::int64_t group = model.heads / model.kv_heads, values = size.heads + model.kv_heads;
  bf16* x = reinterpret_cast<bf16*>(scratch.take(2, D));
  bf16* normed = reinterpret_cast<bf16*>(scratch.take(2, D));
  bf16* mixed = reinterpret_cast<bf16*>(scratch.take(2, size.mixed_row));
  for (int vector = 0; vector < 2; ++vector) {
    copy_scaled(vector == 0 ? call.text.m : call.text.e, x + vector * d, d, 1.0f);
    saved.statistics[vector] = residual_norm_row<bf16>(
        x + vector * d, nullptr, nullptr, normed + vector * d, model.input_norm,
        model.input_norm_bias, d, model.eps);
  }
  packed_product(PackedSum{normed, call.products.qkv.data(), saved.qkv, nullptr, 2, d, d,
                           size.stacked});
  for (int vector = 0; vector < 2; ++vector) {
    float* qkv = saved.qkv + vector * size.stacked_row;
    add_row(qkv, model.qkv_bias, size.stacked);
    for (std::int64_t h = 0; h < size.heads; ++h)
      copy_scaled(qkv + (values + h / group) * c, mixed + vector * size.mixed + h * c, c, 1.0f);
  }
  const bf16* out = call.products.out.data();
  packed_product(PackedSum{mixed, out, saved.span, nullptr, 2, size.mixed, size.mixed, d});
  for (int vector = 0; vector < 2; ++vector) {
    add_row(saved.span + vector * D, x + vector * d, d);
    add_row(saved.span + vector * D, model.out_bias, d);
  }
  const float *of_m = saved.qkv, *of_e = saved.qkv + size.stacked_row;
  for (std::int64_t h = 0; h < size.heads; ++h) {
    const std::int64_t value = (values + h / group) * c;
    for (std::int64_t t = 0; t < c; ++t)
      store_one(mixed + t, of_e[value + t] - of_m[value + t]);
    packed_product(PackedSum{mixed, out + h * c * kPanel, saved.span + (2 + h) * D, nullptr, 1, c,
                             size.mixed, d});
  }
}

// The gradients of e and m from those of the spanning vectors and of the logits.
inline void span_of_pair_backward(const FirstLayerText& call, const FirstLayerSizes& size,
                                  const FirstLayerSaved& saved, const float* grad_span,
                                  const float* grad_a, const float* grad_b, const float* table,
                                  AttentionScratch scratch) {
  const FirstLayerModel& model = call.model;
  const FirstLayerTexts& text = call.text;
  const std::int64_t d = size.hidden, D = size.hidden_row, c = model.head_size, H = size.heads;
  const std::int64_t group = H / model.kv_heads, T = size.table_row, half = text.rotary / 2;
  const std::int64_t values = H + model.kv_heads;
  bf16* narrow = reinterpret_cast<bf16*>(scratch.take(size.span, D / 2));
  float* grad_mixed = scratch.take(size.span, size.mixed_row);
  float* grad_qkv = scratch.take(2, size.stacked_row);
  bf16* narrow_qkv = reinterpret_cast<bf16*>(scratch.take(1, size.stacked_row));
  float* grad_normed = scratch.take(2, D);
  float* features[2] = {scratch.take(H, T), scratch.take(H, T)};
  float* grad_queries = scratch.take(1, size.mixed_row);
  float* grad_keys[2] = {scratch.take(1, size.mixed_row), scratch.take(1, size.mixed_row)};
  const PreparedHeads heads(size, model, text, saved.qkv, scratch);

  clear(grad_qkv, 2 * size.stacked_row);
  narrow_rows(grad_span, D, narrow, size.span, d);
  packed_product(PackedSum{narrow, call.products.out.data(), grad_mixed, nullptr, size.span, d, d,
                           size.mixed});
  float *of_m = grad_qkv, *of_e = grad_qkv + size.stacked_row;
  for (std::int64_t h = 0; h < H; ++h)
    for (std::int64_t t = 0; t < c; ++t) {
      const std::int64_t value = (values + h / group) * c + t;
      const float* grad = grad_mixed + h * c + t;
      const float of_difference = grad[(2 + h) * size.mixed_row];
      of_m[value] += grad[0] - of_difference;
      of_e[value] += grad[size.mixed_row] + of_difference;
    }

  all_products(H, T, {grad_a, 1, size.head_row}, table, T, features[0], T, size.length, false);
  all_products(H, T, {grad_b, 1, size.head_row}, table, T, features[1], T, size.length, false);
  clear(grad_queries, size.mixed_row);
  for (int vector = 0; vector < 2; ++vector) {
    clear(grad_keys[vector], size.mixed_row);
    for (std::int64_t h = 0; h < H; ++h)
      head_feature_backward(features[vector] + h * T, heads.queries + h * c,
                            heads.keys[vector] + h / group * c, c, half, model.scaling,
                            grad_queries + h * c, grad_keys[vector] + h / group * c);
    for (std::int64_t k = 0; k < model.kv_heads; ++k) {
      const std::int64_t key = vector * size.stacked_row + (H + k) * c;
      prepared_head_backward(model, text, saved.qkv + key, model.k_norm, true,
                             heads.key_inverses[vector][k], grad_keys[vector] + k * c,
                             grad_qkv + key);
    }
  }
  for (std::int64_t h = 0; h < H; ++h)
    prepared_head_backward(model, text, saved.qkv + h * c, model.q_norm, false,
                           heads.query_inverses[h], grad_queries + h * c, grad_qkv + h * c);

  narrow_rows(grad_qkv, size.stacked_row, narrow_qkv, 2, size.stacked);
  packed_product(PackedSum{narrow_qkv, call.products.qkv.data(), grad_normed, nullptr, 2,
                           size.stacked, size.stacked, d});
  for (int vector = 0; vector < 2; ++vector) {
    // The norm read the vector as it was rounded.
    copy_scaled(vector == 0 ? text.m : text.e, narrow, d, 1.0f);
    const auto [mean, inverse] = saved.statistics[vector];
    const float* grad = grad_normed + vector * D;
    Floats along = {}, total = {};
    for (std::int64_t t = 0; t < d; t += kLanes) {
      const Floats g = load_some(grad + t, d - t) * load_some(model.input_norm + t, d - t);
      along += g * (load_some(narrow + t, d - t) - mean);
      total += g;
    }
    const float pull = lane_sum<kLanes>(along) / float(d) * inverse * inverse;
    const float shift = model.centred ? lane_sum<kLanes>(total) / float(d) : 0.0f;
    float* to = vector == 0 ? text.grad_m : text.grad_e;
    for (std::int64_t t = 0; t < d; t += kLanes) {
      const Floats g = load_some(grad + t, d - t) * load_some(model.input_norm + t, d - t);
      const Floats x = load_some(narrow + t, d - t) - mean;
      store_some(to + t, d - t,
                 (g - shift - x * pull) * inverse + load_some(grad_span + vector * D + t, d - t));
    }
  }
}

void first_layer_forward(const FirstLayerText& call) {
  const FirstLayerModel& model = call.model;
  const FirstLayerSizes size(model, call.length);
  const FirstLayerTexts& text = call.text;
  const FirstLayerSaved saved(size, text.saved);
  const std::int64_t N = size.length, S = size.span, d = size.hidden, W = size.wide;
  const std::int64_t I = model.activation.inner, H = size.heads, T = size.table_row;
  const std::int64_t C = size.coef_row, D = size.hidden_row, Z = size.wide_row;  // of the memory
  AttentionScratch scratch{call.scratch};
  float* table = scratch.take(N, T);
  float* logits[2] = {scratch.take(N, size.head_row), scratch.take(N, size.head_row)};
  float* features = scratch.take(H, T);
  float* centred = scratch.take(S, D);
  float* scaled = scratch.take(N, C);
  float* x = scratch.take(kTileRows, D);
  float* z = scratch.take(kTileRows, Z);
  bf16* normed = reinterpret_cast<bf16*>(scratch.take(S, D / 2));
  bf16* inner = reinterpret_cast<bf16*>(scratch.take(N, padded(I / 2)));

  span_of_pair(call, size, saved, scratch);
  distance_table(size, text, table);
  const PreparedHeads heads(size, model, text, saved.qkv, scratch);
  clear(features, H * T);
  clear(logits[0], 2 * N * size.head_row);
  for (int vector = 0; vector < 2; ++vector) {
    for (std::int64_t h = 0; h < H; ++h)
      head_feature(heads.queries + h * model.head_size,
                   heads.keys[vector] + h * model.kv_heads / H * model.head_size, model.head_size,
                   text.rotary / 2, model.scaling * 1.4426950408889634f, features + h * T);
    all_dots(N, table, T, H, features, T, logits[vector], size.head_row, T, false);
  }
  affine_scan(size, logits[0], logits[1], saved);
  copy_floats(saved.span, centred, S * D);
  if (model.centred) centre_rows(centred, D, S, d);
  for (std::int64_t s = 0; s < S; ++s)
    for (std::int64_t t = 0; t < d; t += kLanes)
      store_some(normed + s * d + t, d - t,
                 load(centred + s * D + t) * load_some(model.norm + t, d - t));
  packed_product(PackedSum{normed, call.products.up.data(), saved.projected, nullptr, S, d, d, W});
  for (std::int64_t i = 0; i < N; i += kTileRows) {
    const std::int64_t tile = tile_of(N, i);
    product(tile, padded(d), {saved.coef + i * C, C, 1}, saved.span, D, x, D, S, false);
    for (std::int64_t r = 0; r < tile; ++r) {
      const float inverse = inverse_rms(x + r * D, d, model.centred, model.eps);
      saved.rms_inverse[i + r] = inverse;
      copy_scaled(x + r * D, text.out + (i + r) * d, d, 1.0f);
      copy_scaled(saved.coef + (i + r) * C, scaled + (i + r) * C, C, inverse);
    }
    product(tile, padded(W), {scaled + i * C, C, 1}, saved.projected, Z, z, Z, S, false);
    for (std::int64_t r = 0; r < tile; ++r)
      activation_row(z + r * Z, model.up_bias, inner + (i + r) * I, model.activation);
  }
  packed_product(PackedProduct{inner, call.products.down.data(), model.down_bias, text.out, N, I, d,
                               true});
}

void first_layer_backward(const FirstLayerText& call) {
  const FirstLayerModel& model = call.model;
  const FirstLayerSizes size(model, call.length);
  const FirstLayerTexts& text = call.text;
  const FirstLayerSaved saved(size, text.saved);
  const std::int64_t N = size.length, S = size.span, d = size.hidden, W = size.wide;
  const std::int64_t I = model.activation.inner, T = size.table_row;
  const std::int64_t C = size.coef_row, D = size.hidden_row, Z = size.wide_row;  // of the memory
  AttentionScratch scratch{call.scratch};
  float* table = scratch.take(N, T);
  float* grad_logits[2] = {scratch.take(N, size.head_row), scratch.take(N, size.head_row)};
  float* centred = scratch.take(S, D);
  float* scaled = scratch.take(N, C);
  float* grad_coef = scratch.take(N, C);
  float* gram = scratch.take(S, C);
  float* z = scratch.take(kTileRows, Z);
  float* grad_projected = scratch.take(S, Z);
  float* grad_span = scratch.take(S, D);
  float* wide_grad = scratch.take(N, D);
  bf16* narrow = reinterpret_cast<bf16*>(scratch.take(S, Z / 2));
  bf16* inner = reinterpret_cast<bf16*>(scratch.take(N, padded(I / 2)));

  copy_floats(saved.span, centred, S * D);
  if (model.centred) centre_rows(centred, D, S, d);
  packed_product(
      PackedProduct{text.grad, call.products.down.data(), nullptr, inner, N, d, I, false});
  clear(grad_coef, N * C);
  clear(gram, S * C);
  clear(grad_projected, S * Z);
  for (std::int64_t i = 0; i < N; i += kTileRows) {
    const std::int64_t tile = tile_of(N, i);
    for (std::int64_t r = i; r < i + tile; ++r)
      copy_scaled(saved.coef + r * C, scaled + r * C, C, saved.rms_inverse[r]);
    product(tile, padded(W), {scaled + i * C, C, 1}, saved.projected, Z, z, Z, S, false);
    for (std::int64_t r = 0; r < tile; ++r) {
      float* row = z + r * Z;
      activation_backward_row(inner + (i + r) * I, row, model.up_bias, row, model.activation);
    }
    all_dots(tile, z, Z, S, saved.projected, Z, grad_coef + i * C, C, padded(W), false);
    all_products(S, padded(W), {scaled + i * C, 1, C}, z, Z, grad_projected, Z, tile, true);
  }
  narrow_rows(grad_projected, Z, narrow, S, W);
  packed_product(PackedSum{narrow, call.products.up.data(), grad_span, nullptr, S, W, W, d});
  for (std::int64_t s = 0; s < S; ++s)
    for (std::int64_t t = 0; t < d; t += kLanes)
      store(grad_span + s * D + t,
            load(grad_span + s * D + t) * load_some(model.norm + t, d - t));

  // The norm: <coef_i, ∂coef_i> is rms_inverse_i times its gradient, and |x_i|^2 is coef_i Gram
  // coef_i. From here on `scaled` holds what the norm takes off, of each position's coef.
  all_dots(S, centred, D, S, centred, D, gram, C, padded(d), false);
  for (std::int64_t i = 0; i < N; ++i) {
    const float inverse = saved.rms_inverse[i];
    const float* coef = saved.coef + i * C;
    float* grad = grad_coef + i * C;
    Floats along = {};
    for (std::int64_t s = 0; s < C; s += kLanes) {
      const Floats of_coef = load(grad + s) * inverse;
      store(grad + s, of_coef);
      along += of_coef * load(coef + s);
    }
    copy_scaled(coef, scaled + i * C, C, -lane_sum<kLanes>(along) * inverse * inverse / float(d));
  }
  all_products(N, padded(S), {scaled, C, 1}, gram, C, grad_coef, C, S, true);
  all_products(S, padded(S), {scaled, 1, C}, saved.coef, C, gram, C, N, false);
  all_products(S, padded(d), {gram, C, 1}, centred, D, grad_span, D, S, true);
  if (model.centred) centre_rows(grad_span, D, S, d);

  // The residual: x itself is the same combination.
  clear(wide_grad, N * D);
  for (std::int64_t i = 0; i < N; ++i)
    copy_scaled(text.grad + i * d, wide_grad + i * D, d, 1.0f);
  all_dots(N, wide_grad, D, S, saved.span, D, grad_coef, C, padded(d), true);
  all_products(S, padded(d), {saved.coef, 1, C}, wide_grad, D, grad_span, D, N, true);
  affine_scan_backward(size, saved, grad_coef, grad_logits[0], grad_logits[1]);
  distance_table(size, text, table);
  span_of_pair_backward(call, size, saved, grad_span, grad_logits[0], grad_logits[1], table,
                        scratch);
}
