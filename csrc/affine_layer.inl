// One text of affine_layer.h in either direction. Included by row_kernels_avx512bf16.cpp, behind
// packed_product.inl.
//
// A position is a combination of S vectors by its row of `coef` (N, S): [0, 1, 0 …] at position 0,
// [1, 0, w_i1 … w_iH] behind it. What has S rows is small enough for fp32.

// What the way back needs of the way there.
struct AffineSaved {
  float* coef;         // (N, S)
  float* shares;       // (N, H): exp a_i of the sum up to it
  float* rms_inverse;  // (N,)
  float* projected;    // (S, W): the first product of the MLP, of the spanning vectors
  AffineSaved(const AffineSizes& size, float* memory) {
    coef = memory;
    shares = coef + size.length * size.coef_row;
    rms_inverse = shares + size.length * size.head_row;
    projected = rms_inverse + padded(size.length);
  }
};

// coef and shares from the logits. With P_i the sum of exp a_δ over δ < i, w_i = exp b_i / (exp b_i +
// P_i), and a_i has the share exp a_i / P_{i + 1} of the sum that it joins. The sum is kept relative
// to its largest term: logits may span hundreds of nats.
inline void affine_scan(const AffineSizes& size, const AffineTexts& text, const AffineSaved& saved) {
  const std::int64_t N = size.length, H = size.heads, C = size.coef_row, G = size.head_row;
  const float log2e = 1.4426950408889634f;
  for (std::int64_t i = 0; i < N; ++i) {
    float* coef = saved.coef + i * C;
    clear(coef, C);
    coef[i == 0 ? 1 : 0] = 1.0f;
  }
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i offsets = _mm512_mullo_epi32(lane, _mm512_set1_epi32(int(N)));
  for (std::int64_t h = 0; h < H; h += kLanes) {
    const std::int64_t left = H - h;
    const __mmask16 lanes = left >= kLanes ? __mmask16(0xffff) : first_lanes(left);
    Floats best = splat(-kInfinity), sum = {};
    for (std::int64_t i = 0; i < N; ++i) {
      const float* at = text.a + h * N + i;
      const Floats a = (Floats)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, offsets, at, 4);
      if (i > 0) {
        const float* to_e = text.b + h * N + i;
        const Floats b =
            (Floats)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, offsets, to_e, 4);
        const Floats top = larger(b, best);
        const Floats of_e = exp2_of((b - top) * log2e);
        const Floats of_m = sum * exp2_of((best - top) * log2e);
        store_some(saved.coef + i * C + 2 + h, left, of_e / (of_e + of_m));
      }
      const Floats top = larger(a, best);
      const Floats joins = exp2_of((a - top) * log2e);
      sum = sum * exp2_of((best - top) * log2e) + joins;
      best = top;
      store(saved.shares + i * G + h, joins / sum);
    }
  }
}

// U_i = z_{i+1} + (P_{i+1} / P_{i+2}) U_{i+1} with z = ∂w · w (1 - w) = ∂b; ∂a_i = -share_i U_i.
inline void affine_scan_backward(const AffineSizes& size, const AffineTexts& text,
                                 const AffineSaved& saved, const float* grad_coef) {
  const std::int64_t N = size.length, H = size.heads, C = size.coef_row, G = size.head_row;
  alignas(64) float lanes[2][kLanes];
  for (std::int64_t h = 0; h < H; h += kLanes) {
    const std::int64_t left = std::min<std::int64_t>(H - h, kLanes);
    Floats later = {};  // of position i: (P_{i+1} / P_{i+2}) U_{i+1} + z_{i+1}, which is U_i
    for (std::int64_t i = N - 1; i >= 0; --i) {
      const Floats share = load(saved.shares + i * G + h);
      Floats z = {};
      if (i > 0) {
        const std::int64_t at = i * C + 2 + h;
        const Floats w = load(saved.coef + at);
        z = load(grad_coef + at) * w * (1.0f - w);
      }
      store(lanes[0], share * later * -1.0f);
      store(lanes[1], z);
      for (std::int64_t l = 0; l < left; ++l) {
        text.grad_a[(h + l) * N + i] = lanes[0][l];
        text.grad_b[(h + l) * N + i] = lanes[1][l];
      }
      later = z + (1.0f - share) * later;
    }
  }
}

// (S, d) bf16 -> fp32, and without their means where a LayerNorm follows.
inline void affine_span(const AffineSizes& size, const bf16* span, bool centred, float* plain,
                        float* without_mean) {
  const std::int64_t S = size.span, d = size.hidden, D = size.hidden_row;
  clear(plain, S * D);
  clear(without_mean, S * D);
  for (std::int64_t s = 0; s < S; ++s) {
    Floats total = {};
    for (std::int64_t t = 0; t < d; t += kLanes)
      total += load_some(span + s * d + t, d - t);
    const float mean = centred ? lane_sum<kLanes>(total) / float(d) : 0.0f;
    for (std::int64_t t = 0; t < d; t += kLanes) {
      const Floats value = load_some(span + s * d + t, d - t);
      store_some(plain + s * D + t, d - t, value);
      store_some(without_mean + s * D + t, d - t, value - mean);
    }
  }
}

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

void affine_forward(const AffineText& call) {
  const AffineLayerModel& model = call.model;
  const AffineSizes size(model, call.length);
  const AffineTexts& text = call.text;
  const AffineSaved saved(size, text.saved);
  const std::int64_t N = size.length, S = size.span, d = size.hidden, W = size.wide;
  const std::int64_t I = model.activation.inner;
  const std::int64_t C = size.coef_row, D = size.hidden_row, Z = size.wide_row;  // of the memory
  AttentionScratch scratch{call.scratch};
  float* span = scratch.take(S, D);
  float* centred = scratch.take(S, D);
  float* scaled = scratch.take(N, C);
  float* x = scratch.take(kTileRows, D);
  float* z = scratch.take(kTileRows, Z);
  bf16* normed = reinterpret_cast<bf16*>(scratch.take(S, padded(d / 2)));
  bf16* inner = reinterpret_cast<bf16*>(scratch.take(N, padded(I / 2)));

  affine_scan(size, text, saved);
  affine_span(size, text.span, model.centred, span, centred);
  for (std::int64_t s = 0; s < S; ++s)
    for (std::int64_t t = 0; t < d; t += kLanes)
      store_some(normed + s * d + t, d - t,
                 load(centred + s * D + t) * load_some(model.norm + t, d - t));
  packed_product(PackedSum{normed, call.up, saved.projected, nullptr, S, d, d, W});
  for (std::int64_t i = 0; i < N; i += kTileRows) {
    const std::int64_t tile = tile_of(N, i);
    product(tile, padded(d), {saved.coef + i * C, C, 1}, span, D, x,
            D, S, false);
    for (std::int64_t r = 0; r < tile; ++r) {
      const float inverse = inverse_rms(x + r * D, d, model.centred, model.eps);
      saved.rms_inverse[i + r] = inverse;
      copy_scaled(x + r * D, text.out + (i + r) * d, d, 1.0f);
      copy_scaled(saved.coef + (i + r) * C, scaled + (i + r) * C, C,
                  inverse);
    }
    product(tile, padded(W), {scaled + i * C, C, 1}, saved.projected,
            Z, z, Z, S, false);
    for (std::int64_t r = 0; r < tile; ++r)
      activation_row(z + r * Z, text.bias, inner + (i + r) * I, model.activation);
  }
  packed_product(PackedProduct{inner, call.down, model.down_bias, text.out, N, I, d, true});
}

void affine_backward(const AffineText& call) {
  const AffineLayerModel& model = call.model;
  const AffineSizes size(model, call.length);
  const AffineTexts& text = call.text;
  const AffineSaved saved(size, text.saved);
  const std::int64_t N = size.length, S = size.span, d = size.hidden, W = size.wide;
  const std::int64_t I = model.activation.inner;
  const std::int64_t C = size.coef_row, D = size.hidden_row, Z = size.wide_row;  // of the memory
  AttentionScratch scratch{call.scratch};
  float* span = scratch.take(S, D);
  float* centred = scratch.take(S, D);
  float* scaled = scratch.take(N, C);
  float* grad_coef = scratch.take(N, C);
  float* pulled = scratch.take(N, C);
  float* gram = scratch.take(S, C);
  float* z = scratch.take(kTileRows, Z);
  float* grad_projected = scratch.take(S, Z);
  float* grad_span = scratch.take(S, D);
  float* wide_grad = scratch.take(N, D);
  bf16* narrow = reinterpret_cast<bf16*>(scratch.take(S, padded(W / 2)));
  bf16* inner = reinterpret_cast<bf16*>(scratch.take(N, padded(I / 2)));

  affine_span(size, text.span, model.centred, span, centred);
  packed_product(PackedProduct{text.grad, call.down, nullptr, inner, N, d, I, false});
  clear(grad_coef, N * C);
  clear(gram, S * C);
  clear(grad_projected, S * Z);
  for (std::int64_t i = 0; i < N; i += kTileRows) {
    const std::int64_t tile = tile_of(N, i);
    for (std::int64_t r = i; r < i + tile; ++r)
      copy_scaled(saved.coef + r * C, scaled + r * C, C,
                  saved.rms_inverse[r]);
    product(tile, padded(W), {scaled + i * C, C, 1}, saved.projected,
            Z, z, Z, S, false);
    for (std::int64_t r = 0; r < tile; ++r) {
      float* row = z + r * Z;
      activation_backward_row(inner + (i + r) * I, row, text.bias, row, model.activation);
    }
    all_dots(tile, z, Z, S, saved.projected, Z, grad_coef + i * C,
             C, padded(W), false);
    all_products(S, padded(W), {scaled + i * C, 1, C}, z, Z,
                 grad_projected, Z, tile, true);
  }
  for (std::int64_t s = 0; s < S; ++s)
    copy_scaled(grad_projected + s * Z, narrow + s * W, W, 1.0f);
  packed_product(PackedSum{narrow, call.up, grad_span, nullptr, S, W, W, d});
  for (std::int64_t s = 0; s < S; ++s)
    for (std::int64_t t = 0; t < d; t += kLanes)
      store(grad_span + s * D + t,
            load(grad_span + s * D + t) * load_some(model.norm + t, d - t));

  // The norm: <coef_i, ∂coef_i> is rms_inverse_i times its gradient, and |x_i|^2 = coef_i Gram coef_i.
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
    copy_scaled(coef, pulled + i * C, C,
                lane_sum<kLanes>(along) * inverse * inverse / float(d));
  }
  for (std::int64_t i = 0; i < N * C; i += kLanes)
    store(scaled + i, load(pulled + i) * -1.0f);
  all_products(N, padded(S), {scaled, C, 1}, gram, C, grad_coef, C, S,
               true);
  all_products(S, padded(S), {scaled, 1, C}, saved.coef, C, gram, C, N,
               false);
  all_products(S, padded(d), {gram, C, 1}, centred, D, grad_span, D, S,
               true);
  if (model.centred)
    for (std::int64_t s = 0; s < S; ++s) {
      float* row = grad_span + s * D;
      Floats total = {};
      for (std::int64_t t = 0; t < d; t += kLanes) total += load_some(row + t, d - t);
      const float mean = lane_sum<kLanes>(total) / float(d);
      for (std::int64_t t = 0; t < d; t += kLanes)
        store_some(row + t, d - t, load_some(row + t, d - t) - mean);
    }

  // The residual: x itself is the same combination.
  clear(wide_grad, N * D);
  for (std::int64_t i = 0; i < N; ++i)
    copy_scaled(text.grad + i * d, wide_grad + i * D, d, 1.0f);
  all_dots(N, wide_grad, D, S, span, D, grad_coef, C, padded(d), true);
  all_products(S, padded(d), {saved.coef, 1, C}, wide_grad, D, grad_span,
               D, N, true);
  for (std::int64_t s = 0; s < S; ++s)
    copy_scaled(grad_span + s * D, text.grad_span + s * d, d, 1.0f);
  affine_scan_backward(size, text, saved, grad_coef);
}
