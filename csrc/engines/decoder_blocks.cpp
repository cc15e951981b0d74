#include "engines/decoder_blocks.h"

#include "ops/ops.h"
#include "simd/parallel.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace prototok {
namespace {

// Hands out pieces of one memory, each on a cache line of its own.
struct Area {
  std::uintptr_t next;
  template <class T>
  T* take(std::int64_t count) {
    T* taken = reinterpret_cast<T*>(next);
    next += (std::uintptr_t(count) * sizeof(T) + 63) / 64 * 64;
    return taken;
  }
};

const bf16* of(const void* weight) { return static_cast<const bf16*>(weight); }

}  // namespace

// Of one block and a tile of M positions. Behind the last block there is the stream alone.
struct DecoderBlocks::Saved {
  NormStatistics* statistics;  // (M,) in front of the attention
  bf16* stream;                // (M, d); not written for the first block, which has its input
  NormStatistics* middle_statistics;  // (M,) in front of the MLP
  bf16* middle;                       // (M, d), sequential residual only
  bf16* qkv;                          // (M, (H + 2 K) c)
  bf16* z;                            // (M, f), gated (M, 2 f)
  std::uintptr_t end_of_stream, end;
};

// What a thread needs for a tile of M positions beside it.
struct DecoderBlocks::Scratch {
  bf16* narrow[2];  // (M, d)
  bf16* heads;      // (M, H c)
  bf16* inner;      // (M, f)
  bf16* wide;       // (M, widest of qkv and z)
};

DecoderBlocks::DecoderBlocks(DecoderModel model)
    : model_(std::move(model)), kernels_(kernels_for("avx512bf16")) {
  const DecoderModel& m = model_;
  for (const DecoderBlock& block : m.blocks)
    if (block.q_norm != nullptr || block.k_norm != nullptr)
      throw std::invalid_argument("model: norms on q and k are not covered");
  if (!m.is_bf16 || m.hidden % 2 || mixed() % 2 || stacked() % 2 || m.inner % 2)
    throw std::invalid_argument("model: must be bfloat16 of even sizes");
  for (const DecoderBlock& block : m.blocks)
    forward_.push_back({packed(of(block.qkv), stacked(), m.hidden),
                        packed(of(block.out), m.hidden, mixed()), packed(of(block.up), up(), m.hidden),
                        packed(of(block.down), m.hidden, m.inner)});
}

// Where a block's part of a tile's memory lies; the stream comes first, for the norm behind the last.
DecoderBlocks::Saved DecoderBlocks::saved_at(std::int64_t M, std::uintptr_t memory) const {
  Area area{memory};
  Saved saved;
  saved.statistics = area.take<NormStatistics>(M);
  saved.stream = area.take<bf16>(M * model_.hidden);
  saved.end_of_stream = area.next;
  saved.middle_statistics = area.take<NormStatistics>(M);
  saved.middle = area.take<bf16>(model_.parallel ? 0 : M * model_.hidden);
  saved.qkv = area.take<bf16>(M * stacked());
  saved.z = area.take<bf16>(M * up());
  saved.end = area.next;
  return saved;
}

DecoderBlocks::Saved DecoderBlocks::saved_of(const BlocksInput& tile, std::int64_t block,
                                             unsigned char* memory) const {
  const std::int64_t M = tile.texts * tile.length;
  return saved_at(M, reinterpret_cast<std::uintptr_t>(memory) +
                         std::uintptr_t(block - tile.first) * saved_at(M, 0).end);
}

std::int64_t DecoderBlocks::tile_bytes(const BlocksInput& input) const {
  const std::int64_t M = input.tile * input.length;
  const std::int64_t blocks = std::int64_t(model_.blocks.size()) - input.first;
  return blocks * std::int64_t(saved_at(M, 0).end) + std::int64_t(saved_at(M, 0).end_of_stream);
}

std::int64_t DecoderBlocks::saved_bytes(const BlocksInput& input) const {
  return (input.texts + input.tile - 1) / input.tile * tile_bytes(input);
}

DecoderBlocks::Scratch DecoderBlocks::scratch_of(std::int64_t M) const {
  static thread_local std::vector<unsigned char> memory;
  const auto carved = [&](std::uintptr_t begin, Scratch& scratch) {
    Area area{begin};
    for (bf16*& narrow : scratch.narrow) narrow = area.take<bf16>(M * model_.hidden);
    scratch.heads = area.take<bf16>(M * mixed());
    scratch.inner = area.take<bf16>(M * model_.inner);
    scratch.wide = area.take<bf16>(M * std::max(stacked(), up()));
    return area.next;
  };
  Scratch scratch;
  const std::uintptr_t bytes = carved(0, scratch);
  carved(reinterpret_cast<std::uintptr_t>(at_least(memory, bytes)), scratch);
  return scratch;
}

void DecoderBlocks::norm(const bf16* x, const bf16* delta, bf16* sum, bf16* normed,
                         const void* weight, const void* bias, NormStatistics* statistics,
                         std::int64_t M) const {
  const std::int64_t d = model_.hidden;
  for (std::int64_t i = 0; i < M * d; i += d, ++statistics)
    *statistics = kernels_.residual_norm_bf16(
        x + i, delta == nullptr ? nullptr : delta + i, delta == nullptr ? nullptr : sum + i,
        normed + i, of(weight), of(bias), d, model_.eps);
}

// grad: of the sum where `along`, then of what was added.
void DecoderBlocks::norm_backward(const bf16* grad_normed, const bf16* sum, const void* weight,
                                  const void* bias, const NormStatistics* statistics, bf16* grad,
                                  bool along, std::int64_t M) const {
  const std::int64_t d = model_.hidden;
  for (std::int64_t i = 0; i < M * d; i += d, ++statistics)
    kernels_.residual_norm_backward_bf16(along ? grad + i : nullptr, grad_normed + i, sum + i,
                                         of(weight), grad + i, d, *statistics, bias != nullptr);
}

// Forward to (M, H c), or with `grad_mixed` backward to the gradient of qkv.
void DecoderBlocks::attend(const BlocksInput& tile, const DecoderBlock& block, const bf16* qkv,
                           const bf16* grad_mixed, bf16* out) const {
  static thread_local std::vector<unsigned char> memory;
  const DecoderModel& m = model_;
  const std::int64_t N = tile.length;
  const AttentionShape shape{N, m.heads, m.kv_heads, m.head_size, m.rotated,
                             block.window > 0 ? std::min(block.window, N) : N,
                             m.scaling, tile.cos, tile.sin, tile.table_row};
  float* scratch = reinterpret_cast<float*>(
      at_least(memory, std::uintptr_t(attention_memory(shape)) * sizeof(float)));
  for (std::int64_t text = 0; text < tile.texts; ++text)
    for (std::int64_t head = 0; head < m.kv_heads; ++head) {
      const bf16* of_text = qkv + text * N * stacked();
      if (grad_mixed == nullptr)
        kernels_.attention_bf16(shape, of_text, out + text * N * mixed(), head, scratch);
      else
        kernels_.attention_backward_bf16(shape, of_text, grad_mixed + text * N * mixed(),
                                         out + text * N * stacked(), head, scratch);
    }
}

void DecoderBlocks::forward_tile(const BlocksInput& tile, bf16* out, unsigned char* memory) const {
  const DecoderModel& m = model_;
  const std::int64_t M = tile.texts * tile.length;
  const ActivationShape activation{m.inner, m.activation, m.gated};
  const Scratch scratch = scratch_of(M);
  bf16* normed = scratch.narrow[0];
  const bf16* x = tile.of.x;
  bf16* delta = nullptr;  // what is still to be added to x
  const std::int64_t blocks = std::int64_t(m.blocks.size());
  for (std::int64_t b = tile.first; b < blocks; ++b) {
    const DecoderBlock& block = m.blocks[std::size_t(b)];
    const Products& products = forward_[std::size_t(b)];
    const Saved saved = saved_of(tile, b, memory);
    const bool given = b == tile.first && tile.of.qkv != nullptr;
    const bf16 *qkv = given ? tile.of.qkv : saved.qkv, *z = given ? tile.of.z : saved.z;
    if (!given) {
      norm(x, delta, saved.stream, normed, block.norm, block.norm_bias, saved.statistics, M);
      if (delta != nullptr) x = saved.stream;
      multiply(normed, products.qkv, of(block.qkv_bias), saved.qkv, M);
    }
    attend(tile, block, qkv, nullptr, scratch.heads);
    delta = scratch.narrow[1];
    multiply(scratch.heads, products.out, of(block.out_bias), delta, M);
    if (!given) {
      norm(x, m.parallel ? nullptr : delta, saved.middle, normed, block.mlp_norm,
           block.mlp_norm_bias, saved.middle_statistics, M);
      if (!m.parallel) x = saved.middle;
      multiply(normed, products.up, nullptr, saved.z, M);
    }
    for (std::int64_t row = 0; row < M; ++row)
      kernels_.activation_bf16(z + row * up(), of(block.up_bias),
                               scratch.inner + row * m.inner, activation);
    multiply(scratch.inner, products.down, of(block.down_bias), delta, M, m.parallel);
  }
  const Saved last = saved_of(tile, blocks, memory);
  norm(x, delta, last.stream, out, m.norm, m.norm_bias, last.statistics, M);
}

void DecoderBlocks::backward_tile(const BlocksInput& tile, const bf16* grad_out,
                                  const BlockInput<bf16>& grads, unsigned char* memory) const {
  const DecoderModel& m = model_;
  const std::int64_t M = tile.texts * tile.length;
  const ActivationShape activation{m.inner, m.activation, m.gated};
  const Scratch scratch = scratch_of(M);
  const std::int64_t blocks = std::int64_t(m.blocks.size());
  const auto stream = [&](std::int64_t b, const Saved& saved) {
    return b == tile.first ? tile.of.x : saved.stream;
  };
  bf16* grad = grads.x;
  const Saved last = saved_of(tile, blocks, memory);
  norm_backward(grad_out, stream(blocks, last), m.norm, m.norm_bias, last.statistics, grad, false,
                M);
  for (std::int64_t b = blocks - 1; b >= tile.first; --b) {
    // `grad` is that of the stream behind the block and of what the block adds to it.
    const DecoderBlock& block = m.blocks[std::size_t(b)];
    const Products& products = backward_[std::size_t(b)];
    const Saved saved = saved_of(tile, b, memory);
    const bf16* x = stream(b, saved);
    bf16 *of_mlp_norm = scratch.narrow[0], *of_norm = scratch.narrow[1];
    const bool given = b == tile.first && tile.of.qkv != nullptr;
    const bf16 *qkv = given ? tile.of.qkv : saved.qkv, *z = given ? tile.of.z : saved.z;
    bf16 *grad_qkv = given ? grads.qkv : scratch.wide, *grad_z = given ? grads.z : scratch.wide;
    multiply(grad, products.down, nullptr, scratch.inner, M);
    for (std::int64_t row = 0; row < M; ++row)
      kernels_.activation_backward_bf16(scratch.inner + row * m.inner, z + row * up(),
                                        of(block.up_bias), grad_z + row * up(), activation);
    if (!given) multiply(grad_z, products.up, nullptr, of_mlp_norm, M);
    if (!m.parallel)
      norm_backward(of_mlp_norm, saved.middle, block.mlp_norm, block.mlp_norm_bias,
                    saved.middle_statistics, grad, true, M);
    multiply(grad, products.out, nullptr, scratch.heads, M);
    attend(tile, block, qkv, scratch.heads, grad_qkv);
    if (given) break;  // the first block: `grad` is that of the stream alone
    multiply(grad_qkv, products.qkv, nullptr, of_norm, M);
    if (m.parallel)
      norm_backward(of_mlp_norm, x, block.mlp_norm, block.mlp_norm_bias, saved.middle_statistics,
                    grad, true, M);
    norm_backward(of_norm, x, block.norm, block.norm_bias, saved.statistics, grad, true, M);
  }
}

template <class T>
BlockInput<T> DecoderBlocks::from_position(const BlockInput<T>& all, std::int64_t position) const {
  const auto from = [&](T* stream, std::int64_t width) {
    return stream == nullptr ? nullptr : stream + position * width;
  };
  return {from(all.x, model_.hidden), from(all.qkv, stacked()), from(all.z, up())};
}

template <class Body>
void DecoderBlocks::tiles(const BlocksInput& input, unsigned char* saved, int threads,
                          const Body& body) const {
  const std::int64_t bytes = tile_bytes(input);
  const std::int64_t count = (input.texts + input.tile - 1) / input.tile;
  parallel_rows(count, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    static thread_local std::vector<unsigned char> unsaved;
    for (std::int64_t index = begin; index < end; ++index) {
      BlocksInput tile = input;
      const std::int64_t text = index * input.tile, position = text * input.length;
      tile.texts = std::min(input.tile, input.texts - text);
      tile.of = from_position(input.of, position);
      body(tile, position,
           saved == nullptr ? at_least(unsaved, std::uintptr_t(bytes)) : saved + index * bytes);
    }
  });
}

void DecoderBlocks::forward(const BlocksInput& input, bf16* out, unsigned char* saved,
                            int threads) const {
  tiles(input, saved, threads,
        [&](const BlocksInput& tile, std::int64_t position, unsigned char* memory) {
          forward_tile(tile, out + position * model_.hidden, memory);
        });
}

void DecoderBlocks::backward(const BlocksInput& input, const bf16* grad,
                             const BlockInput<bf16>& grads, unsigned char* saved, int threads) {
  std::call_once(packed_backward_, [&] {
    const DecoderModel& m = model_;
    for (const DecoderBlock& block : m.blocks)
      backward_.push_back({packed_transposed(of(block.qkv), stacked(), m.hidden),
                           packed_transposed(of(block.out), m.hidden, mixed()),
                           packed_transposed(of(block.up), up(), m.hidden),
                           packed_transposed(of(block.down), m.hidden, m.inner)});
  });
  tiles(input, saved, threads,
        [&](const BlocksInput& tile, std::int64_t position, unsigned char* memory) {
          backward_tile(tile, grad + position * model_.hidden, from_position(grads, position),
                        memory);
        });
}

}  // namespace prototok
