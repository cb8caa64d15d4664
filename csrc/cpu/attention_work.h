// How the attention kernels share out their work and how much memory each thread needs for it.
#pragma once
#include "attention.h"
#include "tiles.h"
#include "work.h"

namespace vlmfast::VLMFAST_ISA {
namespace {

using namespace cpu;

// The longest sequence of a stream.
inline int64_t longest(const int64_t* cu, int64_t sequences, int64_t padded) {
  if (!cu) return padded;
  int64_t most = 0;
  for (int64_t i = 0; i < sequences; ++i) most = std::max(most, cu[i + 1] - cu[i]);
  return most;
}

// Queries that share one pass over the keys: the block of scores stays in the second-level cache.
constexpr int64_t block_bytes = 192 << 10, most_queries = 256;
template <class T>
int64_t block_queries(int64_t queries, int64_t keys) {
  constexpr int64_t unit = Panels<T>::wide;
  int64_t fits = block_bytes / (std::max<int64_t>(keys, 1) * int64_t(sizeof(T))) / unit * unit;
  return std::min(std::clamp<int64_t>(fits, unit, most_queries),
                  round_up(std::max<int64_t>(queries, 1), Simd<T>::lanes));
}

// Numbers that the buffers of a thread must hold, at most, over all sequences of all directions.
struct Room {
  int64_t queries = 0, keys = 0, block = 0, scores = 0, width_q = 0, width_v = 0;

  template <class T>
  void cover(const Attention& c) {
    int64_t sq = longest(c.cu_q, c.sequences, c.sq), sk = longest(c.cu_k, c.sequences, c.sk);
    int64_t most = std::min(most_queries, round_up(std::max<int64_t>(sq, 1), Simd<T>::lanes));
    queries = std::max(queries, sq);
    keys = std::max(keys, sk);
    block = std::max(block, most);
    scores = std::max(scores,
                      std::min(sk * most, std::max<int64_t>(block_bytes / int64_t(sizeof(T)), Panels<T>::wide * sk)));
    width_q = std::max(width_q, Panels<T>::padded(c.d));
    width_v = std::max(width_v, Panels<T>::padded(c.dv));
  }
  // A square of rows for transposing, a row of the widest kind.
  template <class T>
  int64_t rows() const {
    return Simd<T>::lanes * std::max({width_q, width_v, Panels<T>::padded(keys)});
  }
};

}  // namespace
}  // namespace vlmfast::VLMFAST_ISA
