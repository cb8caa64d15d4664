// Register-blocked matrix products on packed operands, for tiles that live in the second-level cache.
//
// C[M, N] (+)= A[M, K] B[K, N]. B is packed in panels [N / NR][K][NR], so that a step of K reads NV vectors; A is read
// element by element and broadcast, hence any two strides will do and most callers need not pack it.
#pragma once
#include "simd.h"

namespace vlmfast {
namespace {

template <class T>
struct Gemm {
#if VLMFAST_VECTOR_BYTES == 64
  static constexpr int MR = 14, NV = 2;  // 28 sums, 2 columns of B, 1 broadcast: 31 of 32 registers
#else
  static constexpr int MR = 6, NV = 2;  // 12 sums, 2 columns of B, 1 broadcast: 15 of 16 registers
#endif
  static constexpr int lanes = Simd<T>::lanes;
  static constexpr int NR = NV * lanes;
  using V = Vec<T>;

  // A stride that is known to be 1 is written as Fixed<1>, so that the addresses fold.
  template <int value>
  struct Fixed {
    constexpr operator int64_t() const { return value; }
  };

  template <int rows, class StrideI, class StrideK>
  static inline void micro(int64_t depth, const T* __restrict a, StrideI a_i, StrideK a_k, const T* __restrict b,
                           T* __restrict c, int64_t c_row, bool accumulate) {
    V sum[rows][NV] = {};
    for (int64_t k = 0; k < depth; ++k) {
      V column[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) column[v] = load(b + k * NR + v * lanes);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        V scalar = broadcast(a[i * int64_t(a_i) + k * int64_t(a_k)]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[i][v] += scalar * column[v];
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
  static void micro_rows(int64_t count, int64_t depth, const T* a, StrideI a_i, StrideK a_k, const T* b, T* c,
                         int64_t c_row, bool accumulate) {
    if constexpr (rows > 0) {
      if (count == rows)
        micro<rows>(depth, a, a_i, a_k, b, c, c_row, accumulate);
      else
        micro_rows<rows - 1>(count, depth, a, a_i, a_k, b, c, c_row, accumulate);
    }
  }

  // `b_panel` is the distance between panels. Writes exactly M rows; columns are N, or N rounded up to NR if `c` has
  // the room (`padded`), which saves the detour of the last panel.
  template <class StrideI, class StrideK>
  static void run(int64_t M, int64_t N, int64_t K, const T* a, StrideI a_i, StrideK a_k, const T* b, int64_t b_panel,
                  T* c, int64_t c_row, bool accumulate, bool padded = false) {
    for (int64_t n = 0; n < N; n += NR, b += b_panel) {
      bool whole = padded || n + NR <= N;
      for (int64_t m = 0; m < M; m += MR) {
        const T* rows = a + m * int64_t(a_i);
        int64_t count = M - m < MR ? M - m : MR;
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

  // Rows [count, depth] of a matrix with any element type into panels of its transpose, [count / NR][depth][NR]:
  // the B operand of X Y^T. Rows past `count` are zero.
  static void pack_transposed(const void* from, DType dtype, int64_t row_stride, int64_t count, int64_t depth, T* to,
                              T* row_buffer) {
    for (int64_t j = 0; j < count; j += NR, to += NR * depth)
      for (int64_t r = 0; r < NR; ++r) {
        if (j + r < count) {
          const char* row = static_cast<const char*>(from) + (j + r) * row_stride * bytes_of(dtype);
          widen_row(row, dtype, depth, row_buffer);
          for (int64_t k = 0; k < depth; ++k) to[k * NR + r] = row_buffer[k];
        } else {
          for (int64_t k = 0; k < depth; ++k) to[k * NR + r] = 0;
        }
      }
  }

  // Rows [count, width] into panels [width / NR][count][NR]: the B operand of G X. `panel` is the distance between
  // panels, so that one packed matrix can be filled row by row. Columns past `width` are zero.
  static void pack_rows(const void* from, DType dtype, int64_t row_stride, int64_t count, int64_t width, T* to,
                        int64_t panel, T* row_buffer) {
    int64_t padded = round_up(width, NR);
    for (int64_t k = 0; k < count; ++k) {
      const char* row = static_cast<const char*>(from) + k * row_stride * bytes_of(dtype);
      widen_row(row, dtype, width, row_buffer);
      for (int64_t j = width; j < padded; ++j) row_buffer[j] = 0;
      for (int64_t p = 0; p < padded / NR; ++p) memcpy(to + p * panel + k * NR, row_buffer + p * NR, NR * sizeof(T));
    }
  }
};

}  // namespace
}  // namespace vlmfast
