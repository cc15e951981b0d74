// The product of packed_product.h. Included by targets/avx512bf16.cpp, behind all_kernels.inl.
//
// A tile is kRows rows by one panel. Its sums stay in registers over all inputs, while a panel's
// weights come from the caches a cache line a vector: 24 sums, 4 vectors of weights and one of a
// row's pair are 29 of 32 registers.

constexpr int kProductRows = 6;
constexpr int kPanelVectors = int(kPanel) / kLanes;

inline __m512bh pair_everywhere(const bf16* from) {
  std::int32_t pair;
  __builtin_memcpy(&pair, from, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}

// sum += rows of `inputs`, `row` elements apart, times a panel.
template <int kRows>
inline void add_products(const bf16* inputs, std::int64_t row, const bf16* weight,
                         std::int64_t depth, __m512 (&sum)[kRows][kPanelVectors]) {
  for (std::int64_t i = 0; i < depth; i += 2) {
    __m512bh right[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v)
      right[v] = (__m512bh)_mm512_load_si512(weight + i * kPanel + v * 2 * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const __m512bh left = pair_everywhere(inputs + r * row + i);
      for (int v = 0; v < kPanelVectors; ++v)
        sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, right[v]);
    }
  }
}

template <int kRows>
inline void packed_tile(const PackedProduct& p, std::int64_t row, std::int64_t panel) {
  __m512 sum[kRows][kPanelVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kPanelVectors; ++v) sum[r][v] = _mm512_setzero_ps();
  add_products<kRows>(p.inputs + row * p.depth, p.depth, p.weight + panel * p.depth, p.depth, sum);
  if (p.bias == nullptr && !p.add && panel + kPanel <= p.outputs) {
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kPanelVectors; ++v)
        store(p.out + (row + r) * p.outputs + panel + v * kLanes, (Floats)sum[r][v]);
    return;
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kPanelVectors; ++v) {
      const std::int64_t at = panel + v * kLanes, left = p.outputs - at;
      if (left <= 0) break;
      bf16* to = p.out + (row + r) * p.outputs + at;
      Floats value = (Floats)sum[r][v];
      if (p.bias != nullptr) value += load_some(p.bias + at, left);
      if (p.add) value += load_some(to, left);
      store_some(to, left, value);
    }
}

template <int kRows>
inline void packed_tile(const PackedSum& p, std::int64_t row, std::int64_t panel) {
  const std::int64_t width = (p.outputs + kPanel - 1) / kPanel * kPanel;
  float* to = p.sum + row * width + panel;
  __m512 sum[kRows][kPanelVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kPanelVectors; ++v)
      sum[r][v] = p.scale == nullptr
                      ? _mm512_setzero_ps()
                      : _mm512_mul_ps(_mm512_loadu_ps(to + r * width + v * kLanes),
                                      _mm512_set1_ps(p.scale[row + r]));
  add_products<kRows>(p.inputs + row * p.part, p.part, p.weight + panel * p.depth, p.part, sum);
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kPanelVectors; ++v)
      _mm512_storeu_ps(to + r * width + v * kLanes, sum[r][v]);
}

template <class Product>
inline void packed_product(const Product& p) {
  for (std::int64_t panel = 0; panel < p.outputs; panel += kPanel) {
    std::int64_t row = 0;
    for (; row + kProductRows <= p.rows; row += kProductRows)
      packed_tile<kProductRows>(p, row, panel);
    switch (p.rows - row) {
      case 5: packed_tile<5>(p, row, panel); break;
      case 4: packed_tile<4>(p, row, panel); break;
      case 3: packed_tile<3>(p, row, panel); break;
      case 2: packed_tile<2>(p, row, panel); break;
      case 1: packed_tile<1>(p, row, panel); break;
    }
  }
}
