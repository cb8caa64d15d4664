// One head of one sequence: where its rows are, which keys are live, and the softmax of a block of its queries.
#pragma once
#include <vector>

#include "attention_dropout.h"
#include "attention_work.h"

namespace vlmfast::VLMFAST_ISA {
namespace {

using namespace cpu;

// Rows of one head of one sample.
struct Rows {
  const char* at = nullptr;
  int64_t bytes = 0;  // from row to row
  const int64_t* index = nullptr;
  const char* operator[](int64_t i) const { return at + (index ? index[i] : i) * bytes; }
};

inline Rows rows_of(const Stream& stream, DType dtype, int64_t sample, int64_t first, int64_t head) {
  int64_t size = bytes_of(dtype);
  return {
      static_cast<const char*>(stream.at) + (sample * stream.batch + first * stream.row + head * stream.head) * size,
      stream.row * size};
}

template <class T>
T value_at(const void* at, DType dtype, int64_t index) {
  T value;
  widen_row(static_cast<const char*>(at) + index * bytes_of(dtype), dtype, 1, &value);
  return value;
}

// False if a length, an offset or an index leaves its stream.
inline bool within_bounds(const Attention& c) {
  auto all = [](const int64_t* values, int64_t count, int64_t low, int64_t high) {
    for (int64_t i = 0; values && i < count; ++i)
      if (values[i] < low || values[i] > high) return false;
    return true;
  };
  auto offsets = [&](const int64_t* cu, int64_t rows) {
    if (!cu) return true;
    for (int64_t i = 0; i < c.sequences; ++i)
      if (cu[i + 1] < cu[i]) return false;
    return cu[0] == 0 && cu[c.sequences] <= rows;
  };
  return all(c.lengths_q, c.batch_q, 0, c.sq) && all(c.lengths_k, c.batch_k, 0, c.sk) &&
         all(c.pair_q, c.sequences, 0, c.batch_q - 1) && all(c.pair_k, c.sequences, 0, c.batch_k - 1) &&
         offsets(c.cu_q, c.batch_q) && offsets(c.cu_k, c.batch_k);
}

// Whether the streams are too large for the caches.
inline bool memory_bound(const Attention& c) {
  int64_t rows = c.cu_q ? c.batch_q + 2 * c.batch_k : c.batch_q * c.sq + 2 * c.batch_k * c.sk;
  return rows * c.heads * (c.d + c.dv) / 2 * bytes_of(c.dtype) > int64_t(1) << 20;
}

template <class T>
struct Unit {
  using V = Vec<T>;
  using I = typename Simd<T>::I;
  static constexpr int64_t lanes = Simd<T>::lanes;
  static constexpr T minus_infinity = -std::numeric_limits<T>::infinity();

  const Attention& c;
  int64_t sequence, head, sample_q, sample_k, group;  // group: which of the masks
  int64_t first_q, first_k;                           // rows of packed streams before this sequence
  int64_t nq, nk;                                     // queries, live keys
  const int64_t* live;                                // positions of the keys, or null for 0, 1, ..
  Rows query, key, value;
  const T* bias_columns = nullptr;  // the bias of this head, [sk][sq rounded up], where all sequences share it
  int64_t offset, prefix;           // query i sees key j <= i + offset, and j < prefix

  // `positions` has room for sk numbers; without it all keys count as live.
  Unit(const Attention& call, int64_t s, int64_t h, int64_t* positions, const T* shared_bias = nullptr)
      : c(call), sequence(s), head(h) {
    if (shared_bias) bias_columns = shared_bias + (c.bias.head ? h : 0) * c.sk * round_up(c.sq, lanes);
    bool gathered = c.rows_q != nullptr;
    sample_q = c.pair_q ? c.pair_q[s] : gathered ? s / c.groups : s;
    sample_k = c.pair_k ? c.pair_k[s] : gathered ? s / c.groups : s;
    group = gathered ? s % c.groups : s;
    first_q = c.cu_q ? c.cu_q[s] : 0;
    first_k = c.cu_k ? c.cu_k[s] : 0;
    nq = c.cu_q ? c.cu_q[s + 1] - first_q : c.lengths_q ? c.lengths_q[sample_q] : c.sq;
    nk = c.cu_k ? c.cu_k[s + 1] - first_k : c.lengths_k ? c.lengths_k[sample_k] : c.sk;
    int64_t batch_q = c.cu_q ? 0 : sample_q, batch_k = c.cu_k ? 0 : sample_k;
    query = rows_of(c.query, c.dtype, batch_q, first_q, h);
    key = rows_of(c.key, c.dtype, batch_k, first_k, h);
    value = rows_of(c.value, c.dtype, batch_k, first_k, h);
    if (gathered) {
      query.index = c.rows_q + group * c.sq;
      key.index = value.index = c.rows_k + group * c.sk;
    }
    offset = nk - nq;
    prefix = c.prefix ? c.prefix[s] : 0;
    live = nullptr;
    if (positions) find_live(positions);
  }

  bool masked_by_query() const {
    return (c.mask.at && c.mask.row) || (c.bias.at && c.bias.row) || c.causal || c.regions;
  }
  int64_t position(int64_t k) const { return live ? live[k] : k; }
  const char* key_row(int64_t k) const { return key[position(k)]; }
  const char* value_row(int64_t k) const { return value[position(k)]; }
  // Keys that can be multiplied where they are: plain rows whose distance does not map them all to one set of the
  // cache.
  bool keys_in_place() const {
    return c.dtype == Plain<T>::stored && !live && !key.index && key.bytes % 4096 && key.bytes > 0;
  }

  // Fetches the rows of this unit while another computes.
  void announce(Ahead& ahead) const {
    if (query.index || !memory_bound(c)) return;
    int64_t size = bytes_of(c.dtype);
    ahead.add(key[0], key.bytes, nk, c.d * size);
    ahead.add(value[0], value.bytes, nk, c.dv * size);
    ahead.add(query[0], query.bytes, nq, c.d * size);
  }

  // Live keys that any of the queries [0, last) can see.
  int64_t limit(int64_t last) const {
    if (!c.causal) return nk;
    int64_t beyond = std::max(last + offset, prefix);
    return live ? std::lower_bound(live, live + nk, beyond) - live : std::clamp<int64_t>(beyond, 0, nk);
  }

 private:
  // Keys that no query of this head may read are left out altogether.
  void find_live(int64_t* positions) {
    bool by_mask = c.mask.at && !c.mask.row, by_bias = c.bias.at && !c.bias.row;
    if (!c.key_mask && !by_mask && !by_bias && !(c.rows_k)) return;
    const uint8_t* own =
        c.key_mask ? c.key_mask + (c.cu_k ? first_k * c.key_mask_column : sample_k * c.key_mask_batch) : nullptr;
    const uint8_t* shared =
        by_mask ? static_cast<const uint8_t*>(c.mask.at) + group * c.mask.batch + head * c.mask.head : nullptr;
    int64_t found = 0;
    for (int64_t j = 0; j < nk; ++j) {
      bool seen = (!own || own[j * c.key_mask_column]) && (!shared || shared[j * c.mask.column]) &&
                  (!c.rows_k || key.index[j] >= 0);
      if (seen && by_bias)
        seen = value_at<T>(c.bias.at, c.bias_dtype, bias_start() + j * c.bias.column) != minus_infinity;
      positions[found] = j;
      found += seen;
    }
    if (found < nk) live = positions;
    nk = found;
  }

 public:
  int64_t bias_start() const { return group * c.bias.batch + head * c.bias.head; }

  // Calls visit(key, strip, vector) with the values of a [queries, keys] plane, queries along the vector. fill(to, i,
  // k, count) writes row i of the block from live key k on.
  template <class Fill, class Visit>
  void visit_plane(int64_t queries, int64_t keys, Fill fill, Visit visit) const {
    for (int64_t i0 = 0; i0 < queries; i0 += lanes)
      for (int64_t k0 = 0; k0 < keys; k0 += lanes) {
        alignas(64) T square[lanes * lanes];
        int64_t count = std::min(lanes, keys - k0);
        if (count < lanes || i0 + lanes > queries) std::fill(square, square + lanes * lanes, T(0));
        for (int64_t r = 0; r < std::min(lanes, queries - i0); ++r) fill(square + r * lanes, i0 + r, k0, count);
        V rows[lanes];
        for (int64_t r = 0; r < lanes; ++r) rows[r] = load(square + r * lanes);
        transpose<T>(rows);
        for (int64_t k = 0; k < count; ++k) visit(k0 + k, i0, rows[k]);
      }
  }

  // A row of any element type from live key k on.
  void read_row(const void* at, DType dtype, int64_t start, int64_t column, int64_t k, int64_t count, T* to) const {
    if (!live && column == 1) {
      widen_row(static_cast<const char*>(at) + (start + k) * bytes_of(dtype), dtype, count, to);
    } else {
      for (int64_t j = 0; j < count; ++j) to[j] = value_at<T>(at, dtype, start + position(k + j) * column);
    }
  }

  bool adjusts() const { return c.bias.at || masked_by_query(); }

  // Dot products of queries [i0, i0 + queries) become scores: scale, then bias, then -inf where a pair is not live.
  void adjust(T* x, int64_t ld, int64_t i0, int64_t queries, int64_t keys) const {
    T scale = T(c.scale);
    for (int64_t k = 0; k < keys && !bias_columns; ++k)
      for (int64_t i = 0; i < queries; i += lanes) store(x + k * ld + i, V(load(x + k * ld + i) * scale));
    if (bias_columns) {
      for (int64_t k = 0; k < keys; ++k) {
        const T* from = bias_columns + position(k) * round_up(c.sq, lanes) + i0;
        for (int64_t i = 0; i < queries; i += lanes) {
          V bias = load(from + i), score = load(x + k * ld + i) * scale + bias;
          // a key that is not live may hold NaN
          store(x + k * ld + i, V(bias == minus_infinity ? bias : score));
        }
      }
    } else if (c.bias.at && !c.bias.row) {
      for (int64_t k = 0; k < keys; ++k) {
        T bias = value_at<T>(c.bias.at, c.bias_dtype, bias_start() + position(k) * c.bias.column);
        for (int64_t i = 0; i < queries; i += lanes) store(x + k * ld + i, V(load(x + k * ld + i) + bias));
      }
    } else if (c.bias.at) {
      visit_plane(
          queries, keys,
          [&](T* to, int64_t i, int64_t k, int64_t count) {
            read_row(c.bias.at, c.bias_dtype, bias_start() + (i0 + i) * c.bias.row, c.bias.column, k, count, to);
          },
          [&](int64_t k, int64_t i, V bias) {
            V score = load(x + k * ld + i) + bias;
            store(x + k * ld + i, V(bias == minus_infinity ? bias : score));
          });
    }
    if (c.mask.at && c.mask.row) {
      const uint8_t* start = static_cast<const uint8_t*>(c.mask.at) + group * c.mask.batch + head * c.mask.head;
      for (int64_t i = 0; i < queries; i += lanes)
        for (int64_t k = 0; k < keys; k += lanes)
          exclude(x + k * ld + i, ld, start + (i0 + i) * c.mask.row, std::min(lanes, queries - i), k,
                  std::min(lanes, keys - k));
    }
    if (c.causal) {
      for (int64_t k = limit_of_all(i0, keys); k < keys; ++k) {
        int64_t j = position(k);
        if (j < prefix) continue;
        I count;
        for (int l = 0; l < lanes; ++l) count[l] = l;
        for (int64_t i = 0; i < queries; i += lanes) {
          // query i0 + i + lane sees key j if lane >= first
          auto first = typename Simd<T>::Int(std::clamp<int64_t>(j - offset - i0 - i, 0, lanes));
          store(x + k * ld + i, V(count >= first ? load(x + k * ld + i) : broadcast(minus_infinity)));
        }
      }
    }
    const int64_t* region = c.regions ? c.regions + group * c.sq : nullptr;
    if (region && std::count(region, region + c.sq, region[0]) < c.sq) {
      for (int64_t i = 0; i < queries; i += lanes) {
        I own{};
        for (int64_t l = 0; l < std::min(lanes, queries - i); ++l) own[l] = region[i0 + i + l];
        for (int64_t k = 0; k < keys; ++k) {
          auto other = typename Simd<T>::Int(region[position(k)]);
          store(x + k * ld + i, V(own == other ? load(x + k * ld + i) : broadcast(minus_infinity)));
        }
      }
    }
  }

  // -inf where the mask, read from live key k on, is 0; most squares of a mask are all ones.
  void exclude(T* x, int64_t ld, const uint8_t* mask, int64_t queries, int64_t k, int64_t keys) const {
    uint8_t seen[lanes * lanes];
    memset(seen, 1, sizeof seen);
    for (int64_t r = 0; r < queries; ++r) {
      const uint8_t* row = mask + r * c.mask.row;
      if (!live && c.mask.column == 1)
        memcpy(seen + r * lanes, row + k, size_t(keys));
      else
        for (int64_t j = 0; j < keys; ++j) seen[r * lanes + j] = row[position(k + j) * c.mask.column];
    }
    uint8_t all = 1;
    for (int64_t e = 0; e < lanes * lanes; ++e) all &= seen[e];
    if (all) return;
    for (int64_t j = 0; j < keys; ++j) {
      T* to = x + j * ld;
      for (int64_t r = 0; r < lanes; ++r) to[r] = seen[r * lanes + j] ? to[r] : minus_infinity;
    }
  }

  // Keys that query i0 and all behind it see.
  int64_t limit_of_all(int64_t i0, int64_t keys) const {
    int64_t beyond = i0 + 1 + offset;
    return live ? std::min<int64_t>(keys, std::lower_bound(live, live + nk, beyond) - live)
                : std::clamp<int64_t>(beyond, 0, keys);
  }

  // Dot products [keys][ld] -> probabilities in place; lse (may be null) [queries].
  void softmax(T* x, int64_t ld, int64_t i0, int64_t queries, int64_t keys, T* lse) const {
    T scale = T(c.scale);
    if (adjusts() || scale < 0) {
      adjust(x, ld, i0, queries, keys);
      scale = 1;
    }
    for (int64_t i = 0; i < queries; i += lanes) {
      T* column = x + i;
      V tops[4] = {broadcast(minus_infinity), broadcast(minus_infinity), broadcast(minus_infinity),
                   broadcast(minus_infinity)};
      int64_t k = 0;
      for (; k + 4 <= keys; k += 4)
        for (int64_t u = 0; u < 4; ++u) tops[u] = larger(load(column + (k + u) * ld), tops[u]);
      for (; k < keys; ++k) tops[0] = larger(load(column + k * ld), tops[0]);
      V top = larger(larger(tops[0], tops[1]), larger(tops[2], tops[3]));
      top = top * scale;
      V base = top == minus_infinity ? V{} : top;
      if (scale == 0) top = base = V{};
      V sum{};
      for (k = 0; k < keys; ++k) {
        V e = exp_of_difference<T>(load(column + k * ld) * scale - base);
        store(column + k * ld, e);
        sum += e;
      }
      if (scale == 0 && keys == 0) top = broadcast(minus_infinity);
      V share = sum == T(0) ? V{} : T(1) / sum;
      for (k = 0; k < keys; ++k) store(column + k * ld, V(load(column + k * ld) * share));
      if (lse)
        for (int64_t l = 0; l < std::min(lanes, queries - i); ++l)
          lse[i + l] = sum[l] == 0 ? minus_infinity : top[l] + std::log(sum[l]);
    }
  }

  // The factor of each probability, 0 if it is dropped and 1 / (1 - rate) if it is kept. Positions along the keys count
  // in fours: one Philox call each.
  void dropout_factors(T* to, int64_t ld, int64_t i0, int64_t queries, int64_t keys) const {
    Dropout<T> dropout(c.dropout, c.seed, uint32_t(sequence * c.heads + head), c.direction);
    for (int64_t i = 0; i < queries; i += lanes) {
      V factors[4];
      int64_t ready = -1;
      for (int64_t k = 0; k < keys; ++k) {
        int64_t j = position(k);
        if (j >> 2 != ready) ready = j >> 2, dropout.draw(uint32_t(i0 + i), uint32_t(ready), factors);
        store(to + k * ld + i, factors[j & 3]);
      }
    }
  }
};

// Numbers of the bias as `Unit` wants it, 0 if sequences have their own or are too few to gain from it.
template <class T>
int64_t shared_bias_count(const Attention& c) {
  int64_t count = (c.bias.head ? c.heads : 1) * c.sk * round_up(c.sq, Simd<T>::lanes);
  bool shared = c.bias.at && c.bias.row && !c.bias.batch && c.sequences >= 4;
  return shared && count * int64_t(sizeof(T)) <= int64_t(4) << 20 ? count : 0;
}

template <class T>
void transpose_bias(const Attention& c, T* to) {
  int64_t ld = round_up(c.sq, Simd<T>::lanes);
  for (int64_t h = 0; h < (c.bias.head ? c.heads : 1); ++h, to += c.sk * ld)
    for (int64_t j = 0; j < c.sk; ++j) {
      for (int64_t i = 0; i < c.sq; ++i)
        to[j * ld + i] = value_at<T>(c.bias.at, c.bias_dtype, h * c.bias.head + i * c.bias.row + j * c.bias.column);
      std::fill(to + j * ld + c.sq, to + (j + 1) * ld, T(0));
    }
}

// What is not finite in a packed operand, kept apart so that 0 never multiplies it: a pair that is not live has weight
// 0.
template <class T>
struct Apart {
  struct Entry {
    int64_t step, column;
    T value;
  };
  std::vector<Entry> entries;

  void find(T* panels, int64_t depth, int64_t n) {
    entries.clear();
    int64_t count = Panels<T>::size(depth, n);
    Vec<T> check{};
    for (int64_t at = 0; at < count; at += Simd<T>::lanes) check += load(panels + at) * T(0);
    if (sum_lanes<T>(check) == T(0)) return;
    int64_t padded = Panels<T>::padded(n);
    for (int64_t first = 0; first < padded; first += Panels<T>::wide) {
      int64_t width = std::min(Panels<T>::wide, padded - first);
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t j = 0; j < width; ++j) {
          T& value = panels[first * depth + k * width + j];
          if (!std::isfinite(value)) entries.push_back({k, first + j, value}), value = 0;
        }
    }
  }

  // The rest of the product: c[i][column] += a[i][step] * value for weights that are not 0, steps below `depth`.
  void add(int64_t M, const T* a, int64_t a_i, int64_t a_k, int64_t depth, T* c, int64_t c_row) const {
    for (const Entry& e : entries)
      for (int64_t i = 0; e.step < depth && i < M; ++i) {
        T weight = a[i * a_i + e.step * a_k];
        if (weight != T(0)) c[i * c_row + e.column] += weight * e.value;
      }
  }
};

// to = a * b, both [keys][..]
template <class T>
void multiply_each(const T* a, int64_t a_ld, const T* b, int64_t b_ld, T* to, int64_t ld, int64_t queries,
                   int64_t keys) {
  for (int64_t k = 0; k < keys; ++k)
    for (int64_t i = 0; i < queries; i += Simd<T>::lanes)
      store(to + k * ld + i, Vec<T>(load(a + k * a_ld + i) * load(b + k * b_ld + i)));
}

}  // namespace
}  // namespace vlmfast::VLMFAST_ISA
