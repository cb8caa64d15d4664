// Bidirectional attention from one score matrix (GLIP, Li et al. 2022, eq. 4-6): what its forward and backward share.
// Scores are S^T, [a][b], blocks of b along the vectors: the rows' softmax runs down the vectors, the columns' along
// them.
#pragma once
#include "attention_unit.h"

namespace vlmfast::VLMFAST_ISA {
namespace {

constexpr int64_t bi_block = 64;  // b positions that share one pass over a

// The b positions of a head are cut into at most eight parts, by their number alone: each has its own sums over b, and
// the parts' sums are added in order.
inline int64_t bi_parts(int64_t count) { return std::clamp<int64_t>(ceil_div(count, 2048), 1, 8); }

inline int64_t find_live(const uint8_t* mask, int64_t count, int64_t* positions) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    positions[found] = i;
    found += mask ? mask[i] != 0 : 1;
  }
  return found;
}

// One head of one sample.
template <class T>
struct BiUnit {
  using V = Vec<T>;
  static constexpr int64_t lanes = Simd<T>::lanes;
  static constexpr T minus_infinity = -std::numeric_limits<T>::infinity();

  const BiAttention& c;
  int64_t sample, head, na, nb;
  const int64_t *at_a, *at_b;  // positions of the live ones

  BiUnit(const BiAttention& call, int64_t index, int64_t* a, int64_t* b)
      : c(call),
        sample(index / call.heads),
        head(index % call.heads),
        na(find_live(call.mask_a ? call.mask_a + sample * call.sa : nullptr, call.sa, a)),
        nb(find_live(call.mask_b ? call.mask_b + sample * call.sb : nullptr, call.sb, b)),
        at_a(a),
        at_b(b) {}

  Rows rows(const Stream& stream) const { return rows_of(stream, c.dtype, sample, 0, head); }
  int64_t first(int64_t part) const { return std::min(nb, round_up(ceil_div(nb * part, bi_parts(nb)), bi_block)); }

  // Element (position) of a [batch, H, s] array, and row of a contiguous [batch, s, H, width] one.
  T& of(void* array, int64_t s, int64_t position) const {
    return static_cast<T*>(array)[(sample * c.heads + head) * s + position];
  }
  T& of_stats(void* array, int which, int64_t s, int64_t position) const {
    return static_cast<T*>(array)[((which * c.batch + sample) * c.heads + head) * s + position];
  }
  char* row(void* array, int64_t s, int64_t width, int64_t position) const {
    return static_cast<char*>(array) + ((sample * s + position) * c.heads + head) * width * bytes_of(c.dtype);
  }

  // Zeros in the rows [from, to) that are not live; `live` are the live ones in order.
  template <class Clear>
  static void others(const int64_t* live, int64_t count, int64_t total, Clear clear) {
    for (int64_t i = 0, next = 0; i < total; ++i)
      if (next < count && live[next] == i)
        ++next;
      else
        clear(i);
  }

  // Dropout factors [a][ld] of the live b positions [b0, b0 + count): of b reading a, and of a reading b.
  void factors_b(T* to, int64_t ld, int64_t b0, int64_t count) const {
    Dropout<T> dropout(c.dropout_b, c.seed, uint32_t(sample * c.heads + head), 1);
    bool plain = nb == c.sb;
    for (int64_t i = 0; i < count; i += lanes) {
      V factors[4];
      int64_t ready = -1;
      for (int64_t k = 0; k < na; ++k) {
        int64_t j = at_a[k];
        if (plain) {
          if (j >> 2 != ready) ready = j >> 2, dropout.draw(uint32_t(b0 + i), uint32_t(ready), factors);
          store(to + k * ld + i, factors[j & 3]);
        } else {
          for (int64_t l = 0; l < lanes; ++l)
            to[k * ld + i + l] = i + l < count ? dropout.one(uint32_t(at_b[b0 + i + l]), uint32_t(j)) : T(0);
        }
      }
    }
  }
  void factors_a(T* to, int64_t ld, int64_t b0, int64_t count) const {
    Dropout<T> dropout(c.dropout_a, c.seed, uint32_t(sample * c.heads + head), 0);
    bool plain = nb == c.sb;
    for (int64_t k = 0; k < na; ++k) {
      uint32_t row = uint32_t(at_a[k]);
      if (plain)
        for (int64_t i = 0; i < count; i += 4 * lanes) dropout.draw_row(row, uint32_t((b0 + i) / 4), to + k * ld + i);
      else
        for (int64_t i = 0; i < ld; ++i) to[k * ld + i] = i < count ? dropout.one(row, uint32_t(at_b[b0 + i])) : T(0);
    }
  }
};

}  // namespace
}  // namespace vlmfast::VLMFAST_ISA
