// Dropout factors of a vector of queries at once. The word of probability (row, column) has the counter (unit,
// direction, row, column / 4) and number column % 4, so that neither tiling nor packing nor threads can change it.
#pragma once
#include "philox_lanes.h"

namespace vlmfast {
namespace {

template <class T>
class Dropout {
  static constexpr int lanes = Simd<T>::lanes;
  using Words = typename PhiloxLanes<T>::Words;
  uint64_t seed_;
  uint32_t unit_, direction_, least_;
  T gain_;

 public:
  Dropout(double rate, uint64_t seed, uint32_t unit, uint32_t direction)
      : seed_(seed),
        unit_(unit),
        direction_(direction),
        least_(uint32_t(dropout_threshold(rate) > 0xffffffffu ? 0xffffffffu : dropout_threshold(rate))),
        gain_(rate < 1 ? T(1 / (1 - rate)) : T(0)) {}

  T one(uint32_t row, uint32_t column) const {
    uint32_t words[4] = {unit_, direction_, row, column >> 2};
    philox(seed_, words);
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
    PhiloxLanes<T>::draw(seed_, words);
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
