// Packing and transposing for kernels that keep scores with the queries along the vectors, [keys][queries]: the softmax
// of 16 queries then is straight vertical arithmetic whose order depends on the keys alone, so that padding, packing and
// tiling cannot change a bit of it, and the scores serve as the broadcast operand of every product as they stand.
#pragma once
#include <algorithm>
#include <utility>

#include "gemm.h"

namespace vlmfast {
namespace {

// memset wants an address even for nothing.
inline void zero_bytes(void* at, int64_t bytes) {
  if (bytes > 0) memset(at, 0, size_t(bytes));
}

template <int step, class V, int... lane>
inline void exchange(V& a, V& b, std::integer_sequence<int, lane...>) {
  constexpr int lanes = sizeof...(lane);
  V low = __builtin_shufflevector(a, b, (lane & step ? lanes + lane - step : lane)...);
  b = __builtin_shufflevector(a, b, (lane & step ? lanes + lane : lane + step)...);
  a = low;
}

// A square of `lanes` vectors, in place: stage by stage one bit of the row number changes places with one of the
// column.
template <class T, int step = 1>
inline void transpose(Vec<T>* rows) {
  constexpr int lanes = Simd<T>::lanes;
  if constexpr (step < lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      if (!(i & step)) exchange<step>(rows[i], rows[i + step], std::make_integer_sequence<int, lanes>{});
    transpose<T, step * 2>(rows);
  }
}

// What the next unit will read, fetched into the cache a few lines at a time while this one computes: packing is bursts
// of misses otherwise, with nothing to do beside them.
class Ahead {
  struct Part {
    const char* at;
    int64_t step, rows, bytes;
    bool write;
  };
  static constexpr int64_t line = 64;
  Part parts_[6];
  int count_ = 0, part_ = 0;
  int64_t row_ = 0, byte_ = 0, total_ = 0, share_ = 0;

 public:
  void add(const char* at, int64_t step, int64_t rows, int64_t bytes, bool write = false) {
    if (rows <= 0 || bytes <= 0) return;
    parts_[count_++] = {at, step, rows, bytes, write};
    total_ += rows * ceil_div(bytes, line);
  }
  // `tiles` calls of fetch() are to come.
  void spread(int64_t tiles) { share_ = ceil_div(total_, std::max<int64_t>(tiles, 1)); }
  void fetch() {
    for (int64_t n = 0; n < share_ && part_ < count_; ++n) {
      const Part& p = parts_[part_];
      const char* at = p.at + row_ * p.step + byte_;
      if (p.write)
        __builtin_prefetch(at, 1, 3);
      else
        __builtin_prefetch(at, 0, 3);
      byte_ += line;
      if (byte_ >= p.bytes) {
        byte_ = 0;
        if (++row_ == p.rows) row_ = 0, ++part_;
      }
    }
  }
};

// exp of numbers that are not large: simd.h's without what bounds it from above.
template <class T>
inline Vec<T> exp_of_difference(Vec<T> x) {
  constexpr bool single = sizeof(T) == 4;
  constexpr T low = single ? T(-87.33) : T(-708.39);
  constexpr T round = single ? T(0x1.8p23) : T(0x1.8p52);
  constexpr T ln2_high = single ? T(0x1.62e4p-1) : T(0x1.62e42fee00000p-1);
  constexpr T ln2_low = single ? T(0x1.7f7d1cp-20) : T(0x1.a39ef35793c76p-33);
  constexpr int mantissa = single ? 23 : 52, terms = single ? 7 : 13;
  Vec<T> shifted = x * T(1.4426950408889634) + round, n = shifted - round;
  Vec<T> r = x - n * ln2_high;
  r = r - n * ln2_low;
  T factorial[terms + 1] = {1};
  for (int k = 1; k <= terms; ++k) factorial[k] = factorial[k - 1] / k;
  Vec<T> value = broadcast(factorial[terms]);
#pragma GCC unroll 16
  for (int k = terms - 1; k >= 0; --k) value = value * r + factorial[k];
  typename Simd<T>::I bits, power;
  memcpy(&power, &shifted, sizeof power);
  memcpy(&bits, &value, sizeof bits);
  bits += power << mantissa;
  memcpy(&value, &bits, sizeof value);
  value = x < low ? Vec<T>{} : value;
  return x != x ? x : value;
}

// The B operand of a product, K steps of N columns: panels of two vectors, the last of one where that is enough.
template <class T>
struct Panels {
  static constexpr int64_t lanes = Simd<T>::lanes, wide = 2 * lanes;

  static int64_t padded(int64_t n) { return round_up(n, lanes); }
  static int64_t size(int64_t depth, int64_t n) { return depth * padded(n); }
  // Column n, a multiple of `lanes`, in step k.
  static T* place(T* panels, int64_t depth, int64_t n_padded, int64_t k, int64_t n) {
    int64_t first = n / wide * wide;
    return panels + first * depth + k * std::min(wide, n_padded - first) + (n - first);
  }

  // C[M, N] (+)= A[M, K] B[K, N] with the first K of the `depth` steps that were packed; with `room` the rows of C may
  // be written up to the padded width.
  template <class StrideI, class StrideK>
  static void multiply(int64_t M, int64_t N, int64_t K, const T* a, StrideI a_i, StrideK a_k, const T* b, int64_t depth,
                       T* c, int64_t c_row, bool accumulate, bool room, Ahead& ahead) {
    int64_t full = padded(N) / wide * wide;
    auto fetch = [&] { ahead.fetch(); };
    Gemm<Plain<T>>::run(M, std::min(N, full), K, a, a_i, a_k, b, wide * depth, c, c_row, accumulate, room, fetch);
    if (N > full)
      Gemm<Plain<T>, 1>::run(M, N - full, K, a, a_i, a_k, b + full * depth, 0, c + full, c_row, accumulate, room,
                             fetch);
  }
  static int64_t tiles(int64_t M, int64_t N) {
    return ceil_div(M, int64_t(Gemm<Plain<T>>::MR)) * ceil_div(padded(N), wide);
  }

  // Row k of the operand is row k of a matrix.
  template <class RowAt>
  static void pack_rows(RowAt row_at, DType dtype, int64_t depth, int64_t n, T* to, T* buffer) {
    constexpr DType plain = Plain<T>::stored;
    int64_t n_padded = padded(n);
    for (int64_t k = 0; k < depth; ++k) {
      const char* from = row_at(k);
      const T* row = reinterpret_cast<const T*>(from);
      if (dtype != plain) widen_row(from, dtype, n, buffer), row = buffer;
      for (int64_t first = 0; first < n_padded; first += wide) {
        int64_t width = std::min(wide, n_padded - first), count = std::min(width, n - first);
        T* at = to + first * depth + k * width;
        if (count == wide) {
          memcpy(at, row + first, wide * sizeof(T));
        } else {
          for (int64_t j = 0; j < count; ++j) at[j] = row[first + j];
          for (int64_t j = count; j < width; ++j) at[j] = 0;
        }
      }
    }
  }

  // Column n of the operand is row n of a matrix of width `depth`: the B operand of X Y^T. `buffer`: lanes rows.
  template <class RowAt>
  static void pack_columns(RowAt row_at, DType dtype, int64_t n, int64_t depth, T* to, T* buffer) {
    constexpr DType plain = Plain<T>::stored;
    int64_t n_padded = padded(n), stride = round_up(depth, lanes);
    for (int64_t n0 = 0; n0 < n_padded; n0 += lanes) {
      const T* rows[lanes];
      bool direct = dtype == plain && depth % lanes == 0;
      for (int64_t r = 0; r < lanes; ++r) {
        T* own = buffer + r * stride;
        if (n0 + r < n) {
          const char* from = row_at(n0 + r);
          if (direct) {
            rows[r] = reinterpret_cast<const T*>(from);
            continue;
          }
          widen_row(from, dtype, depth, own);
          std::fill(own + depth, own + stride, T(0));
        } else {
          std::fill(own, own + stride, T(0));
        }
        rows[r] = own;
      }
      for (int64_t k0 = 0; k0 < depth; k0 += lanes) {
        Vec<T> square[lanes];
        for (int64_t r = 0; r < lanes; ++r) square[r] = load(rows[r] + k0);
        transpose<T>(square);
        int64_t count = std::min(lanes, depth - k0);
        for (int64_t k = 0; k < count; ++k) store(place(to, depth, n_padded, k0 + k, n0), square[k]);
      }
    }
  }
};

// Rows one behind the other, widened: the A operand.
template <class T, class RowAt>
void copy_rows(RowAt row_at, DType dtype, int64_t count, int64_t width, T* to) {
  for (int64_t i = 0; i < count; ++i) {
    const char* from = row_at(i);
    if (dtype == Plain<T>::stored)
      std::copy_n(reinterpret_cast<const T*>(from), width, to + i * width);
    else
      widen_row(from, dtype, width, to + i * width);
  }
}

// P^T [n_keys][ld] -> rows of `lanes` queries, rows[r * stride + key]; keys are rounded up to whole vectors.
template <class T>
void rows_from_columns(const T* p, int64_t ld, int64_t keys, T* rows, int64_t stride) {
  constexpr int64_t lanes = Simd<T>::lanes;
  for (int64_t k0 = 0; k0 < keys; k0 += lanes) {
    Vec<T> square[lanes];
    for (int64_t k = 0; k < lanes; ++k) square[k] = k0 + k < keys ? load(p + (k0 + k) * ld) : Vec<T>{};
    transpose<T>(square);
    for (int64_t r = 0; r < lanes; ++r) store(rows + r * stride + k0, square[r]);
  }
}

}  // namespace
}  // namespace vlmfast
