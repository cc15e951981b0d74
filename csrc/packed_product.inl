// The product of packed_product.h. Included by row_kernels_avx512bf16.cpp, behind all_kernels.inl.
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

template <int kRows>
inline void packed_tile(const PackedProduct& p, std::int64_t row, std::int64_t panel) {
  const bf16* inputs = p.inputs + row * p.depth;
  const bf16* weight = p.weight + panel * p.depth;
  __m512 sum[kRows][kPanelVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kPanelVectors; ++v) sum[r][v] = _mm512_setzero_ps();
  for (std::int64_t i = 0; i < p.depth; i += 2) {
    __m512bh right[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v)
      right[v] = (__m512bh)_mm512_load_si512(weight + i * kPanel + v * 2 * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const __m512bh left = pair_everywhere(inputs + r * p.depth + i);
      for (int v = 0; v < kPanelVectors; ++v)
        sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, right[v]);
    }
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

inline void packed_product(const PackedProduct& p) {
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
