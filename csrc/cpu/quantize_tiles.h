// What the quantize kernels share: Gumbel noise, and tiles [entries][positions] of the logits, positions along the
// vectors whatever the layout in memory.
#pragma once
#include "philox_lanes.h"
#include "quantize.h"
#include "tiles.h"
#include "work.h"

namespace vlmfast::VLMFAST_ISA {
namespace {

using namespace cpu;

// Draws of reference/quantize.py: entry v of row n is word v % 4 of the counter (n, v / 4, stream).
template <class T>
class Gumbel {
  using Words = typename PhiloxLanes<T>::Words;
  static constexpr int lanes = Simd<T>::lanes;
  static constexpr uint32_t stream = 0x67756D62u;
  uint64_t seed_;
  Words low_, high_;

 public:
  Gumbel(uint64_t seed, uint64_t row) : seed_(seed) {
    uint32_t low[lanes], high[lanes];
    for (int l = 0; l < lanes; ++l) low[l] = uint32_t(row + uint64_t(l)), high[l] = uint32_t((row + uint64_t(l)) >> 32);
    memcpy(&low_, low, sizeof low), memcpy(&high_, high, sizeof high);
  }
  // Entries 4 four, .. 4 four + 3 of the rows.
  void draw(uint32_t four, Vec<T>* noise) const {
    Words words[4] = {low_, high_, Words{} + four, Words{} + stream};
    PhiloxLanes<T>::draw(seed_, words);
    for (int w = 0; w < 4; ++w) noise[w] = -log<T>(exponential<T>(words[w]));
  }
};

// Entries [v0, v0 + entries) of `count` positions from p0 on, [entries][ld]; positions up to the next whole vector are
// 0. `rows`: a square of lanes.
template <class T>
void read_tile(const Grid& g, int64_t b, int64_t p0, int64_t count, int64_t v0, int64_t entries, T* to, int64_t ld,
               T* square) {
  constexpr int64_t lanes = Simd<T>::lanes;
  int64_t size = bytes_of(g.dtype), whole = round_up(count, lanes);
  const char* start = static_cast<const char*>(g.at) + (b * g.batch + p0 * g.position + v0 * g.entry) * size;
  if (g.position == 1) {
    for (int64_t v = 0; v < entries; ++v) {
      widen_row(start + v * g.entry * size, g.dtype, count, to + v * ld);
      for (int64_t i = count; i < whole; ++i) to[v * ld + i] = 0;
    }
    return;
  }
  for (int64_t i = 0; i < whole; i += lanes)
    for (int64_t v = 0; v < entries; v += lanes) {
      int64_t few = std::min(lanes, entries - v);
      Vec<T> rows[lanes];
      for (int64_t r = 0; r < lanes; ++r) {
        const char* from = start + ((i + r) * g.position + v) * size;
        if (i + r >= count) {
          rows[r] = Vec<T>{};
        } else if (few == lanes && g.dtype == Plain<T>::stored) {
          rows[r] = load(reinterpret_cast<const T*>(from));
        } else {
          widen_row(from, g.dtype, few, square);
          for (int64_t l = few; l < lanes; ++l) square[l] = 0;
          rows[r] = load(square);
        }
      }
      transpose<T>(rows);
      for (int64_t e = 0; e < few; ++e) store(to + (v + e) * ld + i, rows[e]);
    }
}

// The reverse.
template <class T>
void write_tile(const Grid& g, int64_t b, int64_t p0, int64_t count, int64_t v0, int64_t entries, const T* from,
                int64_t ld, T* square) {
  constexpr int64_t lanes = Simd<T>::lanes;
  int64_t size = bytes_of(g.dtype);
  char* start = static_cast<char*>(const_cast<void*>(g.at)) + (b * g.batch + p0 * g.position + v0 * g.entry) * size;
  if (g.position == 1) {
    for (int64_t v = 0; v < entries; ++v) narrow_row(from + v * ld, T(1), count, g.dtype, start + v * g.entry * size);
    return;
  }
  for (int64_t i = 0; i < count; i += lanes)
    for (int64_t v = 0; v < entries; v += lanes) {
      int64_t few = std::min(lanes, entries - v);
      Vec<T> rows[lanes];
      for (int64_t e = 0; e < lanes; ++e) rows[e] = e < few ? load(from + (v + e) * ld + i) : Vec<T>{};
      transpose<T>(rows);
      for (int64_t r = 0; r < std::min(lanes, count - i); ++r) {
        store(square, rows[r]);
        narrow_row(square, T(1), few, g.dtype, start + ((i + r) * g.position + v) * size);
      }
    }
}

// Positions and entries of one tile: what it takes fits the second-level cache. Neither depends on the threads.
constexpr int64_t tile_positions = 128, tile_entries = 128;

// s = (l + g) / tau over a tile that starts at a multiple of four entries; `scores` may be `logits`.
template <class T>
void add_noise(const Quantize& c, int64_t b, int64_t p0, int64_t count, int64_t v0, int64_t entries, const T* logits,
               T* scores, int64_t ld, T* given, T* square) {
  constexpr int64_t lanes = Simd<T>::lanes;
  T tau = T(c.tau);
  if (c.given.at) read_tile(c.given, b, p0, count, v0, entries, given, ld, square);
  for (int64_t i = 0; i < count; i += lanes) {
    Gumbel<T> gumbel(c.seed, c.offset + uint64_t(b * c.positions + p0 + i));
    Vec<T> noise[4] = {};
    for (int64_t v = 0; v < entries; v += 4) {
      if (c.draws) gumbel.draw(uint32_t((v0 + v) / 4), noise);
      for (int64_t w = 0; w < std::min<int64_t>(4, entries - v); ++w) {
        int64_t at = (v + w) * ld + i;
        Vec<T> x = load(logits + at) + (c.given.at ? load(given + at) : noise[w]);
        store(scores + at, Vec<T>(x / tau));
      }
    }
  }
}

}  // namespace
}  // namespace vlmfast::VLMFAST_ISA
