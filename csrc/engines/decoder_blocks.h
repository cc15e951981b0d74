// A tile of texts through many frozen blocks and the norm behind them, and the gradient of that
// back to the blocks' input; bf16, for processors with products of its pairs.
//
// A thread takes a tile (some texts) through all blocks before the next one: each weight is read
// once a tile, and threads never wait for each other. Where there is one tile alone they share it
// out by its positions, and meet where a position needs others': at attention. Large weights that
// products would wait for are shared out by outputs instead, and attention in shares that cost alike;
// threads meet around each product.
// Kept for the way back is what is cheap to read and costly to make: the stream in front of each norm
// with its statistics, the stacked product of q, k, v and what the activation reads. Norms and
// activations are made again.
// Letters: R texts, N positions, d hidden size, H heads, K key-value heads, c head size, f width of
// the MLP; M positions of a tile.
#pragma once

#include "engines/decoder.h"
#include "products/packed_matrix.h"
#include "simd/parallel.h"

#include <cstdint>
#include <mutex>
#include <vector>

namespace prototok {

struct Kernels;

// Positions that a tile does best to hold: weights that no cache keeps are read once a tile.
constexpr std::int64_t kBlockPositions = 512;

// What enters a block: the stream, and for a parallel block its products with qkv and up where they
// are given instead of made; or the gradients of these.
template <class T>
struct BlockInput {
  T* x;    // (R, N, d)
  T* qkv;  // (R, N, (H + 2 K) c), or null
  T* z;    // (R, N, f), or null
};

struct BlocksInput {
  std::int64_t first;          // the block that the input enters
  std::int64_t texts, length;  // R, N
  std::int64_t tile;           // texts a tile; the same in both directions. All: threads share it
  const float* cos;            // (>= N, >= r / 2), rows `table_row` apart
  const float* sin;
  std::int64_t table_row;
  BlockInput<const bf16> of;
  std::int64_t front = 0;      // F constant positions before the first, in front of every text
  const bf16* front_kv = nullptr;  // (L, 2, K, F, c): keys, rotated, and values in every block
};

class DecoderBlocks {
 public:
  // Of `model` it needs the blocks, the norm behind them and the sizes. Weights are packed here,
  // those of the way back when they are first needed: from then on no call allocates.
  // Throws std::invalid_argument for a model or a processor that it is not for.
  explicit DecoderBlocks(DecoderModel model);

  const DecoderModel& model() const { return model_; }
  std::int64_t saved_bytes(const BlocksInput& input) const;
  // out (R, N, d): the normed stream. `saved` may be null where no gradient is wanted.
  void forward(const BlocksInput& input, bf16* out, unsigned char* saved, int threads) const;
  // grad (R, N, d) of `out` -> those of what entered.
  void backward(const BlocksInput& input, const bf16* grad, const BlockInput<bf16>& grads,
                unsigned char* saved, int threads);

 private:
  struct Saved;
  struct TileScratch;
  struct HeadCost;
  struct Products {
    PackedMatrix qkv, out, up, down;
  };

  // What one thread does of a tile.
  struct Part {
    BlocksInput tile;
    std::int64_t position;  // the first of the tile, of those of all texts
    unsigned char* memory;  // what the tile saves
    const TileScratch& scratch;
    Member member;
    std::int64_t first, last;  // positions of the tile
  };

  // body(part) of all tiles.
  template <class Body>
  void parts(const BlocksInput& input, unsigned char* saved, int threads, const Body& body) const;
  void forward_part(const Part& part, bf16* out) const;
  void backward_part(const Part& part, const bf16* grad_out, const BlockInput<bf16>& grads) const;
  template <class T>
  BlockInput<T> from_position(const BlockInput<T>& all, std::int64_t position) const;
  // The positions of a part, of tensors of the whole tile.
  void norm(const Part& part, const bf16* x, const bf16* delta, bf16* sum, bf16* normed,
            const void* weight, const void* bias, NormStatistics* statistics) const;
  void norm_backward(const Part& part, const bf16* grad_normed, const bf16* sum, const void* weight,
                     const void* bias, const NormStatistics* statistics, bf16* grad,
                     bool along) const;
  AttentionShape attention(const Part& part, std::int64_t block) const;
  void attend(const Part& part, std::int64_t block, const bf16* qkv, bf16* mixed) const;
  void attend_backward(const Part& part, std::int64_t block, const bf16* qkv,
                       const bf16* grad_mixed, bf16* grad_qkv) const;
  // Whether those that share this tile share the outputs of a product, not its positions: weights that
  // they would wait for are then read once.
  bool by_outputs(const Part& part) const;
  // `next`: the weight of the product behind this one.
  void multiply(const Part& part, const bf16* inputs, const PackedMatrix& weight,
                const PackedMatrix& next, const void* bias, bf16* out, bool add = false) const;
  // Where positions need those of others. Around products by outputs all have met already.
  void meet(const Part& part) const;
  Saved saved_of(const BlocksInput& tile, std::int64_t block, unsigned char* memory) const;
  std::int64_t tile_bytes(const BlocksInput& input) const;
  std::int64_t stacked() const {  // (H + 2 K) c
    return (model_.heads + 2 * model_.kv_heads) * model_.head_size;
  }
  std::int64_t mixed() const { return model_.heads * model_.head_size; }
  std::int64_t up() const { return model_.gated ? 2 * model_.inner : model_.inner; }

  DecoderModel model_;
  const Kernels& kernels_;
  bool by_outputs_;  // of those that share a tile
  std::vector<Products> forward_, backward_;
  std::once_flag packed_backward_;
};

}  // namespace prototok
