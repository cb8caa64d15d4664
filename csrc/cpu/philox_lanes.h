// Philox4x32-10 of one counter a lane, for the instruction set at hand.
#pragma once
#include "../common/philox.h"
#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace vlmfast {
namespace {

// As many words as a vector of T has lanes.
template <class T>
struct PhiloxLanes {
  static constexpr int lanes = Simd<T>::lanes;
  typedef uint32_t Whole __attribute__((vector_size(VLMFAST_VECTOR_BYTES)));
  typedef uint32_t Half __attribute__((vector_size(VLMFAST_VECTOR_BYTES / 2)));
  typedef int32_t SignedWhole __attribute__((vector_size(VLMFAST_VECTOR_BYTES)));
  typedef int32_t SignedHalf __attribute__((vector_size(VLMFAST_VECTOR_BYTES / 2)));
  using Words = std::conditional_t<sizeof(T) == 4, Whole, Half>;
  using Signed = std::conditional_t<sizeof(T) == 4, SignedWhole, SignedHalf>;

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

  // Four counter words a lane become four random words a lane.
  static void draw(uint64_t seed, Words words[4]) {
    uint32_t key_0 = uint32_t(seed), key_1 = uint32_t(seed >> 32);
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
  }
};

// -log(1 - u) of u = (word + 1/2) / 2^32, with 1 - u itself counted from the other end beyond a half.
template <class T>
inline Vec<T> exponential(typename PhiloxLanes<T>::Words words) {
  using Signed = typename PhiloxLanes<T>::Signed;
  Signed upper = (Signed)words < 0, least = (Signed)words ^ upper;  // the complement of those beyond a half
  Vec<T> t = (__builtin_convertvector(least, Vec<T>) + T(0.5)) * T(0x1p-32);
  typename Simd<T>::I wide = __builtin_convertvector(upper, typename Simd<T>::I);
  Vec<T> near = T(1) - t, lost = (T(1) - near) - t;
  return -(log<T>(wide ? t : near) + (wide ? Vec<T>{} : lost));
}

}  // namespace
}  // namespace vlmfast
