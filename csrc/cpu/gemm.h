// Register-blocked matrix products on packed operands, for tiles that live in the second-level cache.
//
// C[M, N] (+)= A[M, K] B[K, N]. B is packed in panels [N / NR][K][NR], so that a step of K reads NV vectors; A is read
// element by element and broadcast, hence any two strides will do and most callers need not pack it. What an element
// is and how two of them multiply is the `Product`: plain numbers, or pairs of bfloat16 along K.
#pragma once
#include <algorithm>

#include "simd.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace vlmfast {
namespace {

// One number a step of K.
template <class Number>
struct Plain {
  using T = Number;
  using Operand = Number;
  static constexpr DType stored = sizeof(T) == 4 ? DType::float32 : DType::float64;
  static int64_t depth(int64_t count) { return count; }
  static Vec<T> broadcast(Operand a) { return vlmfast::broadcast(a); }
  static void multiply_add(Vec<T>& sum, Vec<T> a, Vec<T> b) { sum += a * b; }

  // One row as operands along K.
  static void row(const void* from, DType dtype, int64_t count, Operand* to) { widen_row(from, dtype, count, to); }
  // Step k of K across the rows of a matrix, as operands.
  template <class RowAt>
  static void step(RowAt row_at, int64_t k, int64_t, DType dtype, int64_t width, Operand* to) {
    widen_row(row_at(k), dtype, width, to);
  }
};

#ifdef __AVX512BF16__
// Two bfloat16 numbers a step of K, multiplied exactly and summed in float32: inputs lose nothing.
struct Bfloat16Pairs {
  using T = float;
  using Operand = uint32_t;
  static constexpr DType stored = DType::bfloat16;
  static int64_t depth(int64_t count) { return (count + 1) / 2; }
  static Vec<float> broadcast(Operand a) { return (Vec<float>)_mm512_set1_epi32(int(a)); }
  static void multiply_add(Vec<float>& sum, Vec<float> a, Vec<float> b) {
    sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }

  static void row(const void* from, DType, int64_t count, Operand* to) {
    if (count % 2) to[count / 2] = 0;
    if (count) memcpy(to, from, size_t(count) * 2);
  }
  template <class RowAt>
  static void step(RowAt row_at, int64_t k, int64_t count, DType, int64_t width, Operand* to) {
    auto even = static_cast<const uint16_t*>(static_cast<const void*>(row_at(2 * k)));
    if (2 * k + 1 < count) {
      auto odd = static_cast<const uint16_t*>(static_cast<const void*>(row_at(2 * k + 1)));
      for (int64_t c = 0; c < width; ++c) to[c] = uint32_t(even[c]) | uint32_t(odd[c]) << 16;
    } else {
      for (int64_t c = 0; c < width; ++c) to[c] = even[c];
    }
  }

  // Rows [rows, stride] of floats as pairs along the row, [rows, stride / 2]; stride is a multiple of 32.
  static void pair_columns(const float* from, int64_t rows, int64_t stride, Operand* to) {
    for (int64_t at = 0; at < rows * stride; at += 32) {
      __m512bh pairs = _mm512_cvtne2ps_pbh((__m512)load(from + at + 16), (__m512)load(from + at));
      memcpy(to + at / 2, &pairs, 64);
    }
  }
  // ... and as pairs of rows, [(rows + 1) / 2, stride].
  static void pair_rows(const float* from, int64_t rows, int64_t stride, Operand* to) {
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t j = 0; j < stride; j += 16) {
        auto half = [&](int64_t row) {
          return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)load(from + row * stride + j)));
        };
        __m512i pairs = half(i);
        if (i + 1 < rows) pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(half(i + 1), 16));
        memcpy(to + i / 2 * stride + j, &pairs, 64);
      }
  }
};
#endif

// A stride that is known to be 1 is written as Fixed<1>, so that the addresses fold.
template <int value>
struct Fixed {
  constexpr operator int64_t() const { return value; }
};

struct Nothing {
  void operator()() const {}
};

// `vectors` of B stand side by side in a panel; one is for a last panel that needs no more.
template <class Product, int vectors = 2>
struct Gemm {
  using T = typename Product::T;
  using Operand = typename Product::Operand;
#if VLMFAST_VECTOR_BYTES == 64
  static constexpr int MR = 14, NV = vectors;  // with two 28 sums, 2 columns of B, 1 broadcast: 31 of 32 registers
#else
  static constexpr int MR = 6, NV = vectors;  // with two 12 sums, 2 columns of B, 1 broadcast: 15 of 16 registers
#endif
  static constexpr int lanes = Simd<T>::lanes;
  static constexpr int NR = NV * lanes;
  using V = Vec<T>;

  template <int rows, class StrideI, class StrideK>
  static inline void micro(int64_t depth, const Operand* __restrict a, StrideI a_i, StrideK a_k, const Operand* __restrict b,
                           T* __restrict c, int64_t c_row, bool accumulate) {
    V sum[rows][NV] = {};
    for (int64_t k = 0; k < depth; ++k) {
      V column[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) memcpy(&column[v], b + k * NR + v * lanes, sizeof(V));
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        V scalar = Product::broadcast(a[i * int64_t(a_i) + k * int64_t(a_k)]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) Product::multiply_add(sum[i][v], scalar, column[v]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        T* to = c + i * c_row + v * lanes;
        store(to, accumulate ? V(load(to) + sum[i][v]) : sum[i][v]);
      }
  }

  // The last rows, fewer than MR: one instance a count, so that short batches pay for the rows they have.
  template <int rows, class StrideI, class StrideK>
  static void micro_rows(int64_t count, int64_t depth, const Operand* a, StrideI a_i, StrideK a_k, const Operand* b, T* c,
                         int64_t c_row, bool accumulate) {
    if constexpr (rows > 0) {
      if (count == rows)
        micro<rows>(depth, a, a_i, a_k, b, c, c_row, accumulate);
      else
        micro_rows<rows - 1>(count, depth, a, a_i, a_k, b, c, c_row, accumulate);
    }
  }

  // `b_panel` is the distance between panels. Writes exactly M rows; columns are N, or N rounded up to NR if `c` has
  // the room (`padded`), which saves the detour of the last panel. `between` is called before each tile.
  template <class StrideI, class StrideK, class Between = Nothing>
  static void run(int64_t M, int64_t N, int64_t K, const Operand* a, StrideI a_i, StrideK a_k, const Operand* b,
                  int64_t b_panel, T* c, int64_t c_row, bool accumulate, bool padded = false, Between between = {}) {
    for (int64_t n = 0; n < N; n += NR, b += b_panel) {
      bool whole = padded || n + NR <= N;
      for (int64_t m = 0; m < M; m += MR) {
        const Operand* rows = a + m * int64_t(a_i);
        int64_t count = M - m < MR ? M - m : MR;
        between();
        if (whole) {
          T* to = c + m * c_row + n;
          if (count == MR)
            micro<MR>(K, rows, a_i, a_k, b, to, c_row, accumulate);
          else
            micro_rows<MR - 1>(count, K, rows, a_i, a_k, b, to, c_row, accumulate);
        } else {
          alignas(64) T edge[MR * NR];
          if (count == MR)
            micro<MR>(K, rows, a_i, a_k, b, edge, NR, false);
          else
            micro_rows<MR - 1>(count, K, rows, a_i, a_k, b, edge, NR, false);
          for (int64_t i = 0; i < count; ++i)
            for (int64_t j = 0; j < N - n; ++j) {
              T& to = c[(m + i) * c_row + n + j];
              to = accumulate ? to + edge[i * NR + j] : edge[i * NR + j];
            }
        }
      }
    }
  }

  // Rows [count, width] of a matrix with any element type into panels of its transpose, [count / NR][K][NR]: the B
  // operand of X Y^T. Rows past `count` are zero.
  static void pack_transposed(const void* from, DType dtype, int64_t row_stride, int64_t count, int64_t width,
                              Operand* to, Operand* row_buffer) {
    int64_t depth = Product::depth(width);
    for (int64_t j = 0; j < count; j += NR, to += NR * depth)
      for (int64_t r = 0; r < NR; ++r) {
        if (j + r < count) {
          const char* row = static_cast<const char*>(from) + (j + r) * row_stride * bytes_of(dtype);
          Product::row(row, dtype, width, row_buffer);
          for (int64_t k = 0; k < depth; ++k) to[k * NR + r] = row_buffer[k];
        } else {
          for (int64_t k = 0; k < depth; ++k) to[k * NR + r] = 0;
        }
      }
  }

  // Rows [count, width] into panels [width / NR][K][NR], K along the rows: the B operand of G X. `panel` is the
  // distance between panels; only steps [first, last) of K are written. Columns past `width` are zero.
  static void pack_rows(const void* from, DType dtype, int64_t row_stride, int64_t count, int64_t width, int64_t first,
                        int64_t last, Operand* to, int64_t panel, Operand* row_buffer) {
    int64_t padded = round_up(width, NR);
    auto row_at = [&](int64_t i) { return static_cast<const char*>(from) + i * row_stride * bytes_of(dtype); };
    std::fill(row_buffer + width, row_buffer + padded, Operand(0));
    for (int64_t k = first; k < last; ++k) {
      Product::step(row_at, k, count, dtype, width, row_buffer);
      for (int64_t p = 0; p < padded / NR; ++p)
        memcpy(to + p * panel + k * NR, row_buffer + p * NR, NR * sizeof(Operand));
    }
  }
};

}  // namespace
}  // namespace vlmfast
