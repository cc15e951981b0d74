// The tile registers of AMX: on the processor, or emulated to the letter of Intel's manual where the
// target has no such instructions. Both have the same functions, so that what is written with them
// is one text.
//
// An object configures the registers of its thread and gives them back at its end: while they hold
// something, the system saves their 8 KiB at each switch of threads.
#pragma once

#include "simd/target.h"
#include "simd/tile_config.h"

#include <cstdint>

#ifndef PROTOTOK_AMX
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#endif

PROTOTOK_TARGET_BEGIN

#ifdef PROTOTOK_AMX

// Not the compiler's intrinsics: GCC 12 takes a tile's number as a token, which no template can give,
// and knows of no memory that a load reads, so that it may drop or move the stores in front of it.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() {
    if (config_ != nullptr) asm volatile("tilerelease");
  }

  // Clears all tiles where it is another shape than before. `config` must last.
  void shape(const TileConfig& config) {
    if (config_ == &config) return;
    config_ = &config;
    asm volatile("ldtilecfg %0" : : "m"(config));
  }

  template <int kTile>
  void zero() const {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }

  // Rows lie `stride` bytes apart.
  template <int kTile>
  void load(const void* from, std::int64_t stride) const {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(kTile), "r"(from), "r"(stride) : "memory");
  }

  template <int kTile>
  void store(void* to, std::int64_t stride) const {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(kTile), "r"(to), "r"(stride) : "memory");
  }

  // sums[m][n] += inputs[m][2 k] weights[k][2 n] + inputs[m][2 k + 1] weights[k][2 n + 1], all k.
  template <int kSums, int kInputs, int kWeights>
  void dot() const {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0"
                 :
                 : "i"(kSums), "i"(kInputs), "i"(kWeights));
  }

 private:
  const TileConfig* config_ = nullptr;
};

#else

// Denormal numbers count as zero wherever the instruction meets one.
inline float flushed(float x) {
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

// Throws std::logic_error where the processor would refuse the instruction.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  void shape(const TileConfig& config) {
    if (config_ == &config) return;
    config_ = &config;
    require(config.palette == 1 && config.start_row == 0, "a configuration of palette 1");
    for (int tile = 0; tile < kAmxTiles; ++tile)
      require(rows(tile) <= kAmxRows && row_bytes(tile) <= kAmxRowBytes, "rows that fit in a tile");
    std::memset(tiles_, 0, sizeof tiles_);
  }

  template <int kTile>
  void zero() {
    require(configured(kTile), "a tile with rows");
    std::memset(tiles_[kTile], 0, sizeof tiles_[kTile]);
  }

  template <int kTile>
  void load(const void* from, std::int64_t stride) {
    zero<kTile>();
    for (int r = 0; r < rows(kTile); ++r)
      std::memcpy(tiles_[kTile][r], static_cast<const unsigned char*>(from) + r * stride,
                  std::size_t(row_bytes(kTile)));
  }

  template <int kTile>
  void store(void* to, std::int64_t stride) const {
    require(configured(kTile), "a tile with rows");
    for (int r = 0; r < rows(kTile); ++r)
      std::memcpy(static_cast<unsigned char*>(to) + r * stride, tiles_[kTile][r],
                  std::size_t(row_bytes(kTile)));
  }

  // Of the pairs of one instruction firsts and seconds are summed apart, from zero.
  template <int kSums, int kInputs, int kWeights>
  void dot() {
    const int depth = row_bytes(kInputs) / 4, columns = row_bytes(kSums) / 4;
    require(configured(kSums) && rows(kSums) == rows(kInputs) && rows(kWeights) == depth &&
                row_bytes(kWeights) == row_bytes(kSums),
            "tiles that match");
    Widened inputs, weights;
    widen(kInputs, inputs);
    widen(kWeights, weights);
    for (int m = 0; m < rows(kSums); ++m)
      for (int n = 0; n < columns; ++n) {
        float firsts = 0.0f, seconds = 0.0f;
        for (int k = 0; k < depth; ++k) {
          firsts = flushed(std::fma(inputs[m][2 * k], weights[k][2 * n], firsts));
          seconds = flushed(std::fma(inputs[m][2 * k + 1], weights[k][2 * n + 1], seconds));
        }
        float sum;
        std::memcpy(&sum, tiles_[kSums][m] + 4 * n, sizeof sum);
        sum = flushed(flushed(sum) + flushed(firsts + seconds));
        std::memcpy(tiles_[kSums][m] + 4 * n, &sum, sizeof sum);
      }
  }

 private:
  static void require(bool met, const char* needed) {
    if (!met) throw std::logic_error(std::string("tiles: needs ") + needed);
  }
  int rows(int tile) const { return config_->rows[tile]; }
  int row_bytes(int tile) const { return config_->row_bytes[tile]; }
  bool configured(int tile) const {
    return config_ != nullptr && rows(tile) > 0 && row_bytes(tile) > 0;
  }
  typedef float Widened[kAmxRows][kAmxRowBytes / 2];
  // A tile of bf16.
  void widen(int tile, Widened& to) const {
    for (int r = 0; r < rows(tile); ++r)
      for (int c = 0; c < row_bytes(tile) / 2; ++c) {
        std::uint16_t bits;
        std::memcpy(&bits, tiles_[tile][r] + 2 * c, sizeof bits);
        const std::uint32_t word = std::uint32_t{bits} << 16;
        std::memcpy(&to[r][c], &word, sizeof word);
        to[r][c] = flushed(to[r][c]);
      }
  }

  const TileConfig* config_ = nullptr;
  unsigned char tiles_[kAmxTiles][kAmxRows][kAmxRowBytes];
};

#endif

PROTOTOK_TARGET_END
