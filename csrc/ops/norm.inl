// Residual addition and the norm of the sum, a row at a time; a row stays in the L1 cache between
// the passes. Included by all_kernels.inl.

template <class T>
NormStatistics residual_norm_row(const T* x, const T* delta, T* sum, T* normed, const T* weight,
                                 const T* bias, std::int64_t count, float eps) {
  const float share = 1.0f / float(count);
  // The statistics are those of the sum as it is stored, so that a norm of the stored stream
  // (another one over the same stream, or a check) sees the same numbers.
  const T* stream = x;
  if (delta != nullptr) {
    stream = sum;
    for (std::int64_t i = 0; i < count; i += kLanes) {
      const std::int64_t left = count - i;
      store_some(sum + i, left, load_some(x + i, left) + load_some(delta + i, left));
    }
  }
  float mean = 0.0f;
  if (bias != nullptr) {
    Floats total = {};
    for (std::int64_t i = 0; i < count; i += kLanes) total += load_some(stream + i, count - i);
    mean = lane_sum<kLanes>(total) * share;
  }
  Floats squares = {};
  for (std::int64_t i = 0; i < count; i += kLanes) {
    // The missing lanes at the mean, where they add nothing.
    const Floats centred = load_some(stream + i, count - i, mean) - mean;
    squares += centred * centred;
  }
  const float inverse = 1.0f / std::sqrt(lane_sum<kLanes>(squares) * share + eps);
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const std::int64_t left = count - i;
    Floats value = (load_some(stream + i, left) - mean) * inverse * load_some(weight + i, left);
    if (bias != nullptr) value += load_some(bias + i, left);
    store_some(normed + i, left, value);
  }
  return {mean, inverse};
}

// d loss / d sum = what arrives along the residual + what arrives through the norm.
template <class T>
void residual_norm_backward_row(const T* grad_sum, const T* grad_normed, const T* sum,
                                const T* weight, T* grad, std::int64_t count,
                                NormStatistics statistics, bool centred) {
  const float mean = statistics.mean, inverse = statistics.inverse;
  Floats along = {}, total = {};
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const std::int64_t left = count - i;
    const Floats g = load_some(grad_normed + i, left) * load_some(weight + i, left);
    along += g * (load_some(sum + i, left) - mean);
    total += g;
  }
  const float share = 1.0f / float(count);
  const float pull = lane_sum<kLanes>(along) * share * inverse * inverse;
  const float shift = centred ? lane_sum<kLanes>(total) * share : 0.0f;
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const std::int64_t left = count - i;
    const Floats g = load_some(grad_normed + i, left) * load_some(weight + i, left);
    Floats value = (g - shift - (load_some(sum + i, left) - mean) * pull) * inverse;
    if (grad_sum != nullptr) value += load_some(grad_sum + i, left);
    store_some(grad + i, left, value);
  }
}
