#include "engines/decoder_blocks.h"

#include "simd/arena.h"
#include "simd/parallel.h"
#include "targets/dispatch.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace prototok {
namespace {

const bf16* of(const void* weight) { return static_cast<const bf16*>(weight); }

}  // namespace

// Of one block and a tile of M positions, kept for the way back. The stream comes first: behind the
// last block there is nothing else.
struct DecoderBlocks::Saved {
  NormStatistics* statistics;  // (M,) in front of the attention
  bf16* stream;                // (M, d); not written for the first block, which has its input
  NormStatistics* middle_statistics = nullptr;  // (M,) in front of the MLP
  bf16* middle = nullptr;                       // (M, d), sequential residual only
  bf16* qkv = nullptr;                          // (M, (H + 2 K) c)
  bf16* z = nullptr;                            // (M, f), gated (M, 2 f)

  Saved(Arena& arena, const DecoderBlocks& of, std::int64_t M, bool behind_last)
      : statistics(arena.take<NormStatistics>(M)), stream(arena.take<bf16>(M * of.model_.hidden)) {
    if (behind_last) return;
    middle_statistics = arena.take<NormStatistics>(M);
    middle = arena.take<bf16>(of.model_.parallel ? 0 : M * of.model_.hidden);
    qkv = arena.take<bf16>(M * of.stacked());
    z = arena.take<bf16>(M * of.up());
  }
};

// What a thread needs for a tile of M positions beside it.
struct DecoderBlocks::TileScratch {
  bf16* narrow[2];  // (M, d)
  bf16* heads;      // (M, H c)
  bf16* inner;      // (M, f)
  bf16* wide;       // (M, widest of qkv and z)

  TileScratch(Arena& arena, const DecoderBlocks& of, std::int64_t M)
      : narrow{arena.take<bf16>(M * of.model_.hidden), arena.take<bf16>(M * of.model_.hidden)},
        heads(arena.take<bf16>(M * of.mixed())),
        inner(arena.take<bf16>(M * of.model_.inner)),
        wide(arena.take<bf16>(M * std::max(of.stacked(), of.up()))) {}
};

DecoderBlocks::DecoderBlocks(DecoderModel model)
    : model_(std::move(model)), kernels_(kernels_with_pairs()) {
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

std::int64_t DecoderBlocks::most_positions() const { return kernels_.pairs->block_rows; }

DecoderBlocks::Saved DecoderBlocks::saved_of(const BlocksInput& tile, std::int64_t block,
                                             unsigned char* memory) const {
  const std::int64_t M = tile.texts * tile.length;
  const bool behind_last = block == std::int64_t(model_.blocks.size());
  const std::size_t of_block = bytes_of<Saved>(*this, M, false);
  Arena arena(memory + std::size_t(block - tile.first) * of_block,
              behind_last ? bytes_of<Saved>(*this, M, true) : of_block);
  return {arena, *this, M, behind_last};
}

std::int64_t DecoderBlocks::tile_bytes(const BlocksInput& input) const {
  const std::int64_t M = input.tile * input.length;
  const std::int64_t blocks = std::int64_t(model_.blocks.size()) - input.first;
  return blocks * std::int64_t(bytes_of<Saved>(*this, M, false)) +
         std::int64_t(bytes_of<Saved>(*this, M, true));
}

std::int64_t DecoderBlocks::saved_bytes(const BlocksInput& input) const {
  return (input.texts + input.tile - 1) / input.tile * tile_bytes(input);
}

void DecoderBlocks::multiply(const bf16* inputs, const PackedMatrix& weight, const void* bias,
                             bf16* out, const BlocksInput& tile, bool add) const {
  const std::int64_t M = tile.texts * tile.length;
  kernels_.pairs->product({inputs, weight.data(), of(bias), out, M, weight.inputs(),
                           weight.outputs(), add, tile.length < kTilesFrom});
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
void DecoderBlocks::attend(const BlocksInput& tile, std::int64_t block, const bf16* qkv,
                           const bf16* grad_mixed, bf16* out) const {
  const DecoderModel& m = model_;
  const std::int64_t N = tile.length, keys = tile.front + N;
  const std::int64_t window = m.blocks[std::size_t(block)].window;
  const AttentionShape shape{N, m.heads, m.kv_heads, m.head_size, m.rotated,
                             window > 0 ? std::min(window, keys) : keys,
                             m.scaling, tile.cos, tile.sin, tile.table_row, tile.front,
                             tile.front_kv + block * 2 * m.kv_heads * tile.front * m.head_size};
  for (std::int64_t text = 0; text < tile.texts; ++text)
    for (std::int64_t head = 0; head < m.kv_heads; ++head) {
      const bf16* of_text = qkv + text * N * stacked();
      if (grad_mixed == nullptr)
        kernels_.attention_bf16(shape, of_text, out + text * N * mixed(), head);
      else
        kernels_.attention_backward_bf16(shape, of_text, grad_mixed + text * N * mixed(),
                                         out + text * N * stacked(), head);
    }
}

void DecoderBlocks::forward_tile(const BlocksInput& tile, bf16* out, unsigned char* memory) const {
  const DecoderModel& m = model_;
  const std::int64_t M = tile.texts * tile.length;
  const ActivationShape activation{m.inner, m.activation, m.gated};
  const Scratch<TileScratch> memory_of_tile(*this, M);
  const TileScratch& scratch = *memory_of_tile;
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
      multiply(normed, products.qkv, block.qkv_bias, saved.qkv, tile);
    }
    attend(tile, b, qkv, nullptr, scratch.heads);
    delta = scratch.narrow[1];
    multiply(scratch.heads, products.out, block.out_bias, delta, tile);
    if (!given) {
      norm(x, m.parallel ? nullptr : delta, saved.middle, normed, block.mlp_norm,
           block.mlp_norm_bias, saved.middle_statistics, M);
      if (!m.parallel) x = saved.middle;
      multiply(normed, products.up, nullptr, saved.z, tile);
    }
    for (std::int64_t row = 0; row < M; ++row)
      kernels_.activation_bf16(z + row * up(), of(block.up_bias),
                               scratch.inner + row * m.inner, activation);
    multiply(scratch.inner, products.down, block.down_bias, delta, tile, m.parallel);
  }
  const Saved last = saved_of(tile, blocks, memory);
  norm(x, delta, last.stream, out, m.norm, m.norm_bias, last.statistics, M);
}

void DecoderBlocks::backward_tile(const BlocksInput& tile, const bf16* grad_out,
                                  const BlockInput<bf16>& grads, unsigned char* memory) const {
  const DecoderModel& m = model_;
  const std::int64_t M = tile.texts * tile.length;
  const ActivationShape activation{m.inner, m.activation, m.gated};
  const Scratch<TileScratch> memory_of_tile(*this, M);
  const TileScratch& scratch = *memory_of_tile;
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
    multiply(grad, products.down, nullptr, scratch.inner, tile);
    for (std::int64_t row = 0; row < M; ++row)
      kernels_.activation_backward_bf16(scratch.inner + row * m.inner, z + row * up(),
                                        of(block.up_bias), grad_z + row * up(), activation);
    if (!given) multiply(grad_z, products.up, nullptr, of_mlp_norm, tile);
    if (!m.parallel)
      norm_backward(of_mlp_norm, saved.middle, block.mlp_norm, block.mlp_norm_bias,
                    saved.middle_statistics, grad, true, M);
    multiply(grad, products.out, nullptr, scratch.heads, tile);
    attend(tile, b, qkv, scratch.heads, grad_qkv);
    if (given) break;  // the first block: `grad` is that of the stream alone
    multiply(grad_qkv, products.qkv, nullptr, of_norm, tile);
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
    const ScratchFrame unsaved(saved == nullptr ? std::size_t(bytes) : 0);
    for (std::int64_t index = begin; index < end; ++index) {
      BlocksInput tile = input;
      const std::int64_t text = index * input.tile, position = text * input.length;
      tile.texts = std::min(input.tile, input.texts - text);
      tile.of = from_position(input.of, position);
      body(tile, position,
           saved == nullptr ? unsaved.memory() : saved + index * bytes);
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
