// Greedy decoding with a key-value cache: a block of positions through the whole model in one call.
// A DecoderModel is weights, which never change and which any number of threads read; a Decoder is
// what one owner decodes with, its cache and its activations.
// Letters: L blocks, R rows, T positions of the cache, P positions of a pass, d hidden size,
// H heads, K key-value heads, c head size, r rotated part of a head, f width of the MLP, V
// vocabulary. Every matrix lies as (out, in).
#pragma once

#include "engines/decoder_kernels.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace prototok {

struct DecoderBlock {
  const void *norm, *norm_bias;          // (d,); a null bias makes it an RMSNorm
  const void *qkv, *qkv_bias;            // ((H + 2 K) c, d)
  const void *q_norm, *k_norm;           // (c,); null = none
  const void *out, *out_bias;            // (d, H c)
  const void *mlp_norm, *mlp_norm_bias;  // (d,)
  const void *up, *up_bias;              // (f, d), or (2 f, d) where gated
  const void *down, *down_bias;          // (d, f)
  std::int64_t window;                   // positions a query sees, its own included; 0 = all
};

struct DecoderModel {
  std::vector<DecoderBlock> blocks;
  const void *norm, *norm_bias;  // (d,)
  const void* head;              // (V, d)
  const void* embedding;         // (V, d)
  std::int64_t hidden, heads, kv_heads, head_size, rotated, inner, vocabulary;
  float scaling, eps;
  Activation activation;
  bool gated, parallel, is_bf16;
};

// What a Decoder has room for.
struct DecoderRoom {
  std::int64_t rows, positions, longest_pass;
  RotaryTable table;  // of T positions at least
};

// Everything it needs is allocated by the constructor, but for scratch memory that each thread
// allocates at its first call. One thread calls it at a time.
class Decoder {
 public:
  // Throws std::invalid_argument where `positions` is not a multiple of kPositions, or for an
  // instruction set that this processor lacks ("" = the best).
  Decoder(std::shared_ptr<const DecoderModel> model, const DecoderRoom& room,
          const std::string& instruction_set);

  const DecoderModel& model() const { return model_; }
  std::int64_t rows() const { return rows_; }      // of the last pass; before it, all there is room for
  std::int64_t positions() const { return room_.positions; }
  std::int64_t length() const { return length_; }  // positions of the last pass

  // Inputs (R, P, d) fp32 of the first R rows, at positions start ... start + P - 1, through all
  // blocks; their keys and values enter the cache. A row's result does not depend on the others.
  void pass(const float* inputs, std::int64_t rows, std::int64_t length, std::int64_t start,
            int threads);
  // Logits fp32 (R, P, V) of the last pass.
  void logits(float* out, int threads);
  // The most likely id behind every position of the last pass, (R, P), or the last, (R,).
  void predict(std::int64_t* ids, bool every, int threads);
  // ids (.., R): rows begin ... end - 1, each from the one before; ids[begin - 1] stands at `start`.
  void generate(std::int64_t* ids, std::int64_t begin, std::int64_t end, std::int64_t start,
                int threads);

 private:
  void block(const DecoderBlock& block, std::int64_t layer, std::int64_t start, int threads);
  void attention(const DecoderBlock& block, std::int64_t layer, std::int64_t start, int threads);
  // Of the residual stream, into `out`.
  void norm(const void* weight, const void* bias, std::vector<unsigned char>& out, int threads);
  void linear(const void* weight, const void* bias, const std::vector<unsigned char>& inputs,
              float* out, const LinearShape& shape, int threads);
  std::int64_t tokens() const { return rows_ * length_; }

  const std::shared_ptr<const DecoderModel> shared_model_;
  const DecoderModel& model_;
  const DecoderKernels& kernels_;
  const DecoderRoom room_;
  const std::int64_t element_;
  std::int64_t rows_, length_ = 0;
  std::vector<unsigned char> keys_;    // (L, R, K, c, T)
  std::vector<unsigned char> values_;  // (L, R, K, T, c)
  // Of the tokens of a pass, at most R * longest_pass:
  std::vector<float> x_;               // (R P, d) the residual stream
  std::vector<float> wide_;            // (R P, (H + 2 K) c), (R P, f or 2 f)
  std::vector<unsigned char> narrow_;  // what a product reads, in the weights' type
  std::vector<unsigned char> second_;  // the same of the MLP beside the attention
  std::vector<float> logits_;          // (R P, V)
};

}  // namespace prototok
