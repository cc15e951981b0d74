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

// Weights of a block from which reading them once for all threads is worth that these meet at each
// product: faster with 7 MB, slower with 0.8 MB (docs/dev/log.md).
constexpr std::int64_t kLargeBlock = 2 << 20;

constexpr std::int64_t kQueries = 32;  // that attention in tiles takes at a time

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

// What the first queries of a head cost. A query costs as many keys as the last of its kQueries queries
// sees; windows are not counted.
struct DecoderBlocks::HeadCost {
  std::int64_t front, length;

  explicit HeadCost(const BlocksInput& tile) : front(tile.front), length(tile.length) {}

  std::int64_t of(std::int64_t queries) const {
    const std::int64_t blocks = queries / kQueries, left = queries % kQueries;
    return queries * front + kQueries * (kQueries * blocks * (blocks + 1) / 2 +
                                         left * (blocks + 1));
  }
  // The first query in front of which the cost is at least this. A share goes from one to the next.
  std::int64_t query_at(std::int64_t cost) const {
    std::int64_t query = 0;
    while (query < length && of(query) < cost) ++query;
    return query;
  }
};

// What threads need for a tile of M positions beside it.
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
  const std::int64_t weights = m.hidden * (stacked() + mixed() + up() + m.inner);
  by_outputs_ =
      kernels_.pairs->by_outputs && weights * std::int64_t(sizeof(bf16)) >= kLargeBlock;
}

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

void DecoderBlocks::multiply(const Part& part, const bf16* inputs, const PackedMatrix& weight,
                             const PackedMatrix& next, const void* bias, bf16* out,
                             bool add) const {
  const std::int64_t first = by_outputs(part) ? 0 : part.first;
  const std::int64_t last = by_outputs(part) ? part.tile.texts * part.tile.length : part.last;
  PackedProduct product{inputs + first * weight.inputs(), weight.data(), of(bias),
                        out + first * weight.outputs(), last - first, weight.inputs(),
                        weight.outputs(), add, part.tile.length < kTilesFrom};
  product.next = next.data();
  if (!by_outputs(part)) return kernels_.pairs->product(product);
  product.next += first_output(part.member, next.outputs()) * next.inputs();
  part.member.meet();  // the inputs of all positions are there
  kernels_.pairs->product(product.of_member(part.member));
  part.member.meet();
}

bool DecoderBlocks::by_outputs(const Part& part) const {
  return by_outputs_ && !part.member.alone();
}

void DecoderBlocks::meet(const Part& part) const {
  if (!by_outputs(part)) part.member.meet();
}

void DecoderBlocks::norm(const Part& part, const bf16* x, const bf16* delta, bf16* sum,
                         bf16* normed, const void* weight, const void* bias,
                         NormStatistics* statistics) const {
  const std::int64_t d = model_.hidden;
  for (std::int64_t m = part.first, i = m * d; m < part.last; ++m, i += d)
    statistics[m] = kernels_.residual_norm_bf16(
        x + i, delta == nullptr ? nullptr : delta + i, delta == nullptr ? nullptr : sum + i,
        normed + i, of(weight), of(bias), d, model_.eps);
}

// grad: of the sum where `along`, then of what was added.
void DecoderBlocks::norm_backward(const Part& part, const bf16* grad_normed, const bf16* sum,
                                  const void* weight, const void* bias,
                                  const NormStatistics* statistics, bf16* grad,
                                  bool along) const {
  const std::int64_t d = model_.hidden;
  for (std::int64_t m = part.first, i = m * d; m < part.last; ++m, i += d)
    kernels_.residual_norm_backward_bf16(along ? grad + i : nullptr, grad_normed + i, sum + i,
                                         of(weight), grad + i, d, statistics[m], bias != nullptr);
}

AttentionShape DecoderBlocks::attention(const Part& part, std::int64_t block) const {
  const DecoderModel& m = model_;
  const BlocksInput& tile = part.tile;
  const std::int64_t keys = tile.front + tile.length, window = m.blocks[std::size_t(block)].window;
  return {tile.length, m.heads, m.kv_heads, m.head_size, m.rotated,
          window > 0 ? std::min(window, keys) : keys,
          m.scaling, tile.cos, tile.sin, tile.table_row, tile.front,
          tile.front_kv + block * 2 * m.kv_heads * tile.front * m.head_size};
}

// qkv (M, (H + 2 K) c) of all positions up to the part's last -> mixed (M, H c) of the part's
// positions. By outputs instead: of the member's share of all heads' queries.
void DecoderBlocks::attend(const Part& part, std::int64_t block, const bf16* qkv,
                           bf16* mixed) const {
  const std::int64_t K = model_.kv_heads, N = part.tile.length;
  AttentionShape shape = attention(part, block);
  const auto head = [&](std::int64_t text, std::int64_t kv_head, std::int64_t first,
                        std::int64_t last) {
    shape.first = first;
    shape.length = last;  // later keys are not seen
    kernels_.attention_bf16(shape, qkv + text * N * stacked(), mixed + text * N * this->mixed(),
                            kv_head);
  };
  if (!by_outputs(part)) {
    for (std::int64_t text = part.first / N; text * N < part.last; ++text)
      for (std::int64_t k = 0; k < K; ++k)
        head(text, k, std::max<std::int64_t>(0, part.first - text * N),
             std::min(N, part.last - text * N));
    return;
  }
  const HeadCost cost(part.tile);
  const std::int64_t all = part.tile.texts * K * cost.of(N);
  const std::int64_t from = part.member.first(all), to = part.member.last(all);
  for (std::int64_t i = from / cost.of(N), begin; (begin = i * cost.of(N)) < to; ++i) {
    const std::int64_t first = cost.query_at(from - begin), last = cost.query_at(to - begin);
    if (first < last) head(i / K, i % K, first, last);
  }
}

// A key's gradient is of all queries behind it, so heads are shared out, not positions.
void DecoderBlocks::attend_backward(const Part& part, std::int64_t block, const bf16* qkv,
                                    const bf16* grad_mixed, bf16* grad_qkv) const {
  const std::int64_t K = model_.kv_heads, N = part.tile.length;
  const AttentionShape shape = attention(part, block);
  const std::int64_t heads = part.tile.texts * K;
  for (std::int64_t i = part.member.first(heads); i < part.member.last(heads); ++i) {
    const std::int64_t position = i / K * N;
    kernels_.attention_backward_bf16(shape, qkv + position * stacked(),
                                     grad_mixed + position * mixed(),
                                     grad_qkv + position * stacked(), i % K);
  }
}

void DecoderBlocks::forward_part(const Part& part, bf16* out) const {
  const DecoderModel& m = model_;
  const BlocksInput& tile = part.tile;
  const TileScratch& scratch = part.scratch;
  unsigned char* memory = part.memory;
  const ActivationShape activation{m.inner, m.activation, m.gated};
  bf16* normed = scratch.narrow[0];
  const bf16* x = tile.of.x;
  bf16* delta = nullptr;  // what is still to be added to x
  const std::int64_t blocks = std::int64_t(m.blocks.size());
  for (std::int64_t b = tile.first; b < blocks; ++b) {
    const DecoderBlock& block = m.blocks[std::size_t(b)];
    const Products& products = forward_[std::size_t(b)];
    const Products& later = forward_[std::size_t(b + 1 < blocks ? b + 1 : b)];
    const Saved saved = saved_of(tile, b, memory);
    const bool given = b == tile.first && tile.of.qkv != nullptr;
    const bf16 *qkv = given ? tile.of.qkv : saved.qkv, *z = given ? tile.of.z : saved.z;
    if (!given) {
      norm(part, x, delta, saved.stream, normed, block.norm, block.norm_bias, saved.statistics);
      if (delta != nullptr) x = saved.stream;
      multiply(part, normed, products.qkv, products.out, block.qkv_bias, saved.qkv);
      meet(part);
    }
    attend(part, b, qkv, scratch.heads);
    delta = scratch.narrow[1];
    multiply(part, scratch.heads, products.out, products.up, block.out_bias, delta);
    if (!given) {
      norm(part, x, m.parallel ? nullptr : delta, saved.middle, normed, block.mlp_norm,
           block.mlp_norm_bias, saved.middle_statistics);
      if (!m.parallel) x = saved.middle;
      multiply(part, normed, products.up, products.down, nullptr, saved.z);
    }
    for (std::int64_t row = part.first; row < part.last; ++row)
      kernels_.activation_bf16(z + row * up(), of(block.up_bias),
                               scratch.inner + row * m.inner, activation);
    multiply(part, scratch.inner, products.down, later.qkv, block.down_bias, delta, m.parallel);
  }
  const Saved last = saved_of(tile, blocks, memory);
  norm(part, x, delta, last.stream, out, m.norm, m.norm_bias, last.statistics);
}

void DecoderBlocks::backward_part(const Part& part, const bf16* grad_out,
                                  const BlockInput<bf16>& grads) const {
  const DecoderModel& m = model_;
  const BlocksInput& tile = part.tile;
  const TileScratch& scratch = part.scratch;
  unsigned char* memory = part.memory;
  const ActivationShape activation{m.inner, m.activation, m.gated};
  const std::int64_t blocks = std::int64_t(m.blocks.size());
  const auto stream = [&](std::int64_t b, const Saved& saved) {
    return b == tile.first ? tile.of.x : saved.stream;
  };
  bf16* grad = grads.x;
  const Saved last = saved_of(tile, blocks, memory);
  norm_backward(part, grad_out, stream(blocks, last), m.norm, m.norm_bias, last.statistics, grad,
                false);
  for (std::int64_t b = blocks - 1; b >= tile.first; --b) {
    // `grad` is that of the stream behind the block and of what the block adds to it.
    const DecoderBlock& block = m.blocks[std::size_t(b)];
    const Products& products = backward_[std::size_t(b)];
    const Products& later = backward_[std::size_t(b > tile.first ? b - 1 : b)];
    const Saved saved = saved_of(tile, b, memory);
    const bf16* x = stream(b, saved);
    bf16 *of_mlp_norm = scratch.narrow[0], *of_norm = scratch.narrow[1];
    const bool given = b == tile.first && tile.of.qkv != nullptr;
    const bf16 *qkv = given ? tile.of.qkv : saved.qkv, *z = given ? tile.of.z : saved.z;
    bf16 *grad_qkv = given ? grads.qkv : scratch.wide, *grad_z = given ? grads.z : scratch.wide;
    multiply(part, grad, products.down, products.up, nullptr, scratch.inner);
    for (std::int64_t row = part.first; row < part.last; ++row)
      kernels_.activation_backward_bf16(scratch.inner + row * m.inner, z + row * up(),
                                        of(block.up_bias), grad_z + row * up(), activation);
    if (!given) multiply(part, grad_z, products.up, products.out, nullptr, of_mlp_norm);
    if (!m.parallel)
      norm_backward(part, of_mlp_norm, saved.middle, block.mlp_norm, block.mlp_norm_bias,
                    saved.middle_statistics, grad, true);
    multiply(part, grad, products.out, products.qkv, nullptr, scratch.heads);
    meet(part);  // the gradients of all positions are there, and grad_z has been read
    attend_backward(part, b, qkv, scratch.heads, grad_qkv);
    if (given) break;  // the first block: `grad` is that of the stream alone
    meet(part);
    multiply(part, grad_qkv, products.qkv, later.down, nullptr, of_norm);
    meet(part);  // grad_qkv has been read: the next grad_z may take its place
    if (m.parallel)
      norm_backward(part, of_mlp_norm, x, block.mlp_norm, block.mlp_norm_bias,
                    saved.middle_statistics, grad, true);
    norm_backward(part, of_norm, x, block.norm, block.norm_bias, saved.statistics, grad, true);
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
void DecoderBlocks::parts(const BlocksInput& input, unsigned char* saved, int threads,
                          const Body& body) const {
  const std::int64_t bytes = tile_bytes(input), M = input.tile * input.length;
  const std::size_t unsaved_bytes = saved == nullptr ? std::size_t(bytes) : 0;
  if (input.texts <= input.tile) {
    const ScratchFrame unsaved(unsaved_bytes);
    const Scratch<TileScratch> scratch(*this, M);
    const std::int64_t of_tile = by_outputs_ ? 1 : kernels_.pairs->tile_rows;
    const std::int64_t positions = input.texts * input.length;
    const std::int64_t units = (positions + of_tile - 1) / of_tile;
    parallel_team(int(std::min<std::int64_t>(threads, units)), [&](const Member& member) {
      body({input, 0, saved == nullptr ? unsaved.memory() : saved, *scratch, member,
            std::min(positions, member.first(units) * of_tile),
            std::min(positions, member.last(units) * of_tile)});
    });
    return;
  }
  const std::int64_t count = (input.texts + input.tile - 1) / input.tile;
  parallel_rows(count, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    const ScratchFrame unsaved(unsaved_bytes);
    const Scratch<TileScratch> scratch(*this, M);
    for (std::int64_t index = begin; index < end; ++index) {
      BlocksInput tile = input;
      const std::int64_t text = index * input.tile, position = text * input.length;
      tile.texts = std::min(input.tile, input.texts - text);
      tile.of = from_position(input.of, position);
      body({tile, position, saved == nullptr ? unsaved.memory() : saved + index * bytes, *scratch,
            Member(), 0, tile.texts * tile.length});
    }
  });
}

void DecoderBlocks::forward(const BlocksInput& input, bf16* out, unsigned char* saved,
                            int threads) const {
  parts(input, saved, threads, [&](const Part& part) {
    forward_part(part, out + part.position * model_.hidden);
  });
}

void DecoderBlocks::backward(const BlocksInput& input, const bf16* grad,
                             const BlockInput<bf16>& grads, unsigned char* saved, int threads) {
  std::call_once(packed_backward_, [&] {
    const DecoderModel& m = model_;
    std::vector<Products> all;  // where one cannot be had, the next call begins with none
    for (const DecoderBlock& block : m.blocks)
      all.push_back({packed_transposed(of(block.qkv), stacked(), m.hidden),
                     packed_transposed(of(block.out), m.hidden, mixed()),
                     packed_transposed(of(block.up), up(), m.hidden),
                     packed_transposed(of(block.down), m.hidden, m.inner)});
    backward_ = std::move(all);
  });
  parts(input, saved, threads, [&](const Part& part) {
    backward_part(part, grad + part.position * model_.hidden, from_position(grads, part.position));
  });
}

}  // namespace prototok
