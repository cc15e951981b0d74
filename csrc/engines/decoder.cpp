#include "engines/decoder.h"

#include "simd/arena.h"
#include "simd/parallel.h"
#include "targets/dispatch.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace prototok {
namespace {

// Products of a weight and an input that are worth a thread's waking, some microseconds.
constexpr std::int64_t kWorthAThread = 16384;

// Rows a range, so that ranges are worth their hand-over and shared evenly.
std::int64_t even_grain(std::int64_t rows, std::int64_t work_a_row, int threads, int multiple) {
  const std::int64_t work = rows * work_a_row;
  if (threads <= 1 || work < 2 * kWorthAThread) return rows;
  const std::int64_t team = threads;
  const std::int64_t ranges = team * std::max<std::int64_t>(1, work / (team << 18));
  const std::int64_t grain = (rows + ranges - 1) / ranges;
  return (grain + multiple - 1) / multiple * multiple;
}

}  // namespace

Decoder::Decoder(std::shared_ptr<const DecoderModel> model, const DecoderRoom& room,
                 const std::string& instruction_set)
    : shared_model_(std::move(model)),
      model_(*shared_model_),
      kernels_(model_.is_bf16 ? kernels_for(instruction_set).decoder_bf16
                              : kernels_for(instruction_set).decoder_f32),
      room_(room),
      element_(model_.is_bf16 ? 2 : 4),
      rows_(room.rows) {
  const std::int64_t rows = room.rows, positions = room.positions;
  if (positions <= 0 || positions % kPositions != 0)
    throw std::invalid_argument("positions: " + std::to_string(positions) +
                                " is not a multiple of " + std::to_string(kPositions));
  const DecoderModel& m = model_;
  const std::int64_t tokens = rows * room.longest_pass, mixed = m.heads * m.head_size;
  const std::int64_t qkv = mixed + 2 * m.kv_heads * m.head_size;
  const std::int64_t up = m.gated ? 2 * m.inner : m.inner;
  const std::int64_t cache = std::int64_t(m.blocks.size()) * rows * m.kv_heads * m.head_size;
  keys_.resize(std::size_t(cache * positions * element_));
  values_.resize(keys_.size());
  x_.resize(std::size_t(tokens * m.hidden));
  wide_.resize(std::size_t(tokens * std::max(qkv, up)));
  narrow_.resize(std::size_t(tokens * std::max({m.hidden, mixed, m.inner}) * element_));
  second_.resize(m.parallel ? std::size_t(tokens * m.hidden * element_) : 0);
  logits_.resize(std::size_t(tokens * m.vocabulary));
}

void Decoder::pass(const float* inputs, std::int64_t rows, std::int64_t length, std::int64_t start,
                   int threads) {
  if (rows > room_.rows)
    throw std::out_of_range("rows: there is room for " + std::to_string(room_.rows) + ", not for " +
                            std::to_string(rows));
  if (length > room_.longest_pass || start > room_.positions - length)
    throw std::out_of_range("length: " + std::to_string(length) + " positions from " +
                            std::to_string(start) + " on do not fit");
  rows_ = rows;
  length_ = length;
  std::copy(inputs, inputs + tokens() * model_.hidden, x_.begin());
  for (std::size_t layer = 0; layer < model_.blocks.size(); ++layer)
    block(model_.blocks[layer], std::int64_t(layer), start, threads);
}

void Decoder::block(const DecoderBlock& block, std::int64_t layer, std::int64_t start,
                    int threads) {
  const DecoderModel& m = model_;
  const std::int64_t mixed = m.heads * m.head_size;
  const std::int64_t up = m.gated ? 2 * m.inner : m.inner;
  norm(block.norm, block.norm_bias, narrow_, threads);
  if (m.parallel) norm(block.mlp_norm, block.mlp_norm_bias, second_, threads);
  linear(block.qkv, block.qkv_bias, narrow_, wide_.data(),
         {tokens(), m.hidden, mixed + 2 * m.kv_heads * m.head_size, false}, threads);
  attention(block, layer, start, threads);
  linear(block.out, block.out_bias, narrow_, x_.data(), {tokens(), mixed, m.hidden, true}, threads);
  if (!m.parallel) norm(block.mlp_norm, block.mlp_norm_bias, narrow_, threads);
  linear(block.up, block.up_bias, m.parallel ? second_ : narrow_, wide_.data(),
         {tokens(), m.hidden, up, false}, threads);
  parallel_rows(tokens(), even_grain(tokens(), 4 * up, threads, 1), threads,
                [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; ++token)
      kernels_.activate(wide_.data() + token * up, {m.inner, m.activation, m.gated},
                        narrow_.data() + token * m.inner * element_);
  });
  linear(block.down, block.down_bias, narrow_, x_.data(), {tokens(), m.inner, m.hidden, true},
         threads);
}

// From qkv in `wide_` to the mixed values in `narrow_`: all keys of the pass first.
void Decoder::attention(const DecoderBlock& block, std::int64_t layer, std::int64_t start,
                        int threads) {
  const DecoderModel& m = model_;
  const std::int64_t c = m.head_size, heads = m.heads + 2 * m.kv_heads;
  const auto cached = [&](std::vector<unsigned char>& cache, std::int64_t row, std::int64_t head) {
    return cache.data() + ((layer * room_.rows + row) * m.kv_heads + head) * c * room_.positions *
           element_;
  };
  for (std::int64_t token = 0; token < tokens(); ++token) {
    const std::int64_t row = token / length_, position = start + token % length_;
    float* q = wide_.data() + token * heads * c;
    float* k = q + m.heads * c;
    const float* v = k + m.kv_heads * c;
    for (std::int64_t head = 0; head < m.heads; ++head)
      kernels_.turn(q + head * c, block.q_norm, m.eps, c, room_.table, position);
    for (std::int64_t head = 0; head < m.kv_heads; ++head) {
      kernels_.turn(k + head * c, block.k_norm, m.eps, c, room_.table, position);
      kernels_.keep(k + head * c, v + head * c, cached(keys_, row, head), cached(values_, row, head),
                    c, room_.positions, position);
    }
  }
  const std::int64_t units = tokens() * m.heads;
  parallel_rows(units, even_grain(units, 2 * c * (start + length_), threads, 1), threads,
                [&](std::int64_t begin, std::int64_t end) {
    const ScratchFrame frame(std::size_t(room_.positions) * sizeof(float));
    float* scores = frame.arena().take<float>(room_.positions);
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t token = unit / m.heads, head = unit % m.heads;
      const std::int64_t row = token / length_, kv_head = head / (m.heads / m.kv_heads);
      const std::int64_t seen = start + token % length_ + 1;
      const std::int64_t first = block.window > 0 ? std::max<std::int64_t>(0, seen - block.window) : 0;
      kernels_.attend(wide_.data() + (token * heads + head) * c, cached(keys_, row, kv_head),
                      cached(values_, row, kv_head), m.scaling, c, room_.positions, first, seen,
                      scores, narrow_.data() + unit * c * element_);
    }
  });
}

void Decoder::norm(const void* weight, const void* bias, std::vector<unsigned char>& out,
                   int threads) {
  const std::int64_t size = model_.hidden;
  parallel_rows(tokens(), even_grain(tokens(), 2 * size, threads, 1), threads,
                [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; ++token)
      kernels_.norm(x_.data() + token * size, weight, bias, model_.eps, size,
                    out.data() + token * size * element_);
  });
}

void Decoder::linear(const void* weight, const void* bias, const std::vector<unsigned char>& inputs,
                     float* out, const LinearShape& shape, int threads) {
  const std::int64_t grain = even_grain(shape.outputs, shape.inputs * shape.tokens, threads, 8);
  parallel_rows(shape.outputs, grain, threads, [&](std::int64_t begin, std::int64_t end) {
    kernels_.linear(weight, bias, inputs.data(), out, shape, begin, end);
  });
}

void Decoder::logits(float* out, int threads) {
  norm(model_.norm, model_.norm_bias, narrow_, threads);
  linear(model_.head, nullptr, narrow_, out,
         {tokens(), model_.hidden, model_.vocabulary, false}, threads);
}

void Decoder::predict(std::int64_t* ids, bool every, int threads) {
  const std::int64_t d = model_.hidden, vocabulary = model_.vocabulary;
  const std::int64_t read = every ? tokens() : rows_;
  if (every) {
    norm(model_.norm, model_.norm_bias, narrow_, threads);
  } else {
    for (std::int64_t row = 0; row < rows_; ++row)
      kernels_.norm(x_.data() + ((row + 1) * length_ - 1) * d, model_.norm, model_.norm_bias,
                    model_.eps, d, narrow_.data() + row * d * element_);
  }
  linear(model_.head, nullptr, narrow_, logits_.data(), {read, d, vocabulary, false}, threads);
  parallel_rows(read, even_grain(read, vocabulary, threads, 1), threads,
                [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row)
      ids[row] = kernels_.argmax(logits_.data() + row * vocabulary, vocabulary);
  });
}

void Decoder::generate(std::int64_t* ids, std::int64_t begin, std::int64_t end, std::int64_t start,
                       int threads) {
  if (begin == end) return;
  length_ = 1;
  const std::int64_t d = model_.hidden;
  for (std::int64_t i = begin; i < end; ++i, ++start) {
    if (start >= room_.positions) throw std::out_of_range("end: the cache is full");
    for (std::int64_t row = 0; row < rows_; ++row)
      kernels_.widen(static_cast<const unsigned char*>(model_.embedding) +
                         ids[(i - 1) * rows_ + row] * d * element_,
                     x_.data() + row * d, d);
    for (std::size_t layer = 0; layer < model_.blocks.size(); ++layer)
      block(model_.blocks[layer], std::int64_t(layer), start, threads);
    predict(ids + i * rows_, false, threads);
  }
}

}  // namespace prototok
