// Dropout factors of a vector of queries at once. The word of probability (row, column) has the counter (unit,
// direction, row, column / 4) and number column % 4, so that neither tiling nor packing nor threads can change it.
#pragma once
#include "../common/philox.h"
#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace vlmfast {
namespace {

template <class T>
class Dropout {
  static constexpr int lanes = Simd<T>::lanes;
  typedef uint32_t Whole __attribute__((vector_size(VLMFAST_VECTOR_BYTES)));
  typedef uint32_t Half __attribute__((vector_size(VLMFAST_VECTOR_BYTES / 2)));
  using Words = std::conditional_t<sizeof(T) == 4, Whole, Half>;
  uint32_t unit_, direction_, key_0_, key_1_, least_;
  T gain_;

  // 64-bit products of 32-bit lanes, high and low halves apart.
  static void multiply(Words x, uint32_t by, Words& high, Words& low) {
#if defined(__AVX512F__)
    if constexpr (sizeof(Words) == 64) {
      typedef uint64_t Wide __attribute__((vector_size(64)));
      // the compiler takes the undefined operand of the plain multiplication's intrinsic for a mistake
      auto product = [&](Wide a) { return (Wide)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)(Words{} + by)); };
      Wide even = product((Wide)x), odd = product((Wide)x >> 32);
      low = (Words)((even & 0xffffffffu) | odd << 32);
      high = (Words)(even >> 32 | (odd & ~uint64_t(0xffffffffu)));
      return;
    }
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(Words) == 32) {
      typedef uint64_t Wide __attribute__((vector_size(32)));
      auto product = [&](Wide a) { return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)(Words{} + by)); };
      Wide even = product((Wide)x), odd = product((Wide)x >> 32);
      low = (Words)((even & 0xffffffffu) | odd << 32);
      high = (Words)(even >> 32 | (odd & ~uint64_t(0xffffffffu)));
      return;
    }
#endif
    for (int l = 0; l < lanes; ++l) {
      uint64_t product = uint64_t(x[l]) * by;
      high[l] = uint32_t(product >> 32), low[l] = uint32_t(product);
    }
  }

 public:
  Dropout(double rate, uint64_t seed, uint32_t unit, uint32_t direction)
      : unit_(unit),
        direction_(direction),
        key_0_(uint32_t(seed)),
        key_1_(uint32_t(seed >> 32)),
        least_(uint32_t(dropout_threshold(rate) > 0xffffffffu ? 0xffffffffu : dropout_threshold(rate))),
        gain_(rate < 1 ? T(1 / (1 - rate)) : T(0)) {}

  T one(uint32_t row, uint32_t column) const {
    uint32_t words[4] = {unit_, direction_, row, column >> 2};
    philox(uint64_t(key_1_) << 32 | key_0_, words);
    return words[column & 3] >= least_ ? gain_ : T(0);
  }

  // Factors of queries row, row + 1, .. for the keys 4 four, .. 4 four + 3.
  void draw(uint32_t row, uint32_t four, Vec<T>* factors) const {
    Words rows = Words{} + row;
    for (int l = 0; l < lanes; ++l) rows[l] += uint32_t(l);
    draw(rows, Words{} + four, factors);
  }

  // Factors of one query for the keys 4 four, .. 4 four + 4 lanes - 1, in order.
  void draw_row(uint32_t row, uint32_t four, T* to) const {
    Words fours = Words{} + four;
    for (int l = 0; l < lanes; ++l) fours[l] += uint32_t(l);
    Vec<T> factors[4];
    draw(Words{} + row, fours, factors);
    for (int l = 0; l < lanes; ++l)
      for (int w = 0; w < 4; ++w) to[4 * l + w] = factors[w][l];
  }

 private:
  void draw(Words rows, Words fours, Vec<T>* factors) const {
    Words words[4] = {Words{} + unit_, Words{} + direction_, rows, fours};
    uint32_t key_0 = key_0_, key_1 = key_1_;
#pragma GCC unroll 10
    for (int round = 0; round < philox_rounds; ++round) {
      Words high_0, low_0, high_1, low_1;
      multiply(words[0], philox_multiplier_0, high_0, low_0);
      multiply(words[2], philox_multiplier_1, high_1, low_1);
      words[0] = high_1 ^ words[1] ^ key_0;
      words[1] = low_1;
      words[2] = high_0 ^ words[3] ^ key_1;
      words[3] = low_0;
      key_0 += philox_step_0, key_1 += philox_step_1;
    }
    for (int w = 0; w < 4; ++w) {
      auto kept = words[w] >= (Words{} + least_);
      if constexpr (sizeof(T) == 4)
        factors[w] = kept ? broadcast(gain_) : Vec<T>{};
      else
        factors[w] = __builtin_convertvector(kept, typename Simd<T>::I) ? broadcast(gain_) : Vec<T>{};
    }
  }
};

}  // namespace
}  // namespace vlmfast
