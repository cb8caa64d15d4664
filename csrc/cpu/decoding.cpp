// A linear layer of few rows, as decoding one token at a time needs it: every weight is read from memory once, in
// order, and meets all rows while it is in a register. A matrix product packs its operands first, which here costs more
// than the product.
#include "decoding.h"

#include "simd.h"
#include "work.h"

namespace vlmfast::VLMFAST_ISA {
namespace {

constexpr int tile_rows = 8;       // rows of x that are summed at a time
constexpr int64_t block = 64;      // outputs that a thread takes at a time; their weights stay in its cache

// `outputs` neighbouring outputs of `rows` rows.
template <class T, int rows, int outputs>
inline void tile(const T* x, int64_t x_row, const T* weight, int64_t weight_row, int64_t inputs, const T* bias, T* out,
                 int64_t out_row) {
  constexpr int lanes = Simd<T>::lanes;
  Vec<T> total[rows][outputs] = {};
  int64_t k = 0;
  for (; k + lanes <= inputs; k += lanes) {
    Vec<T> w[outputs];
#pragma GCC unroll 8
    for (int n = 0; n < outputs; ++n) w[n] = load(weight + n * weight_row + k);
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) {
      Vec<T> value = load(x + m * x_row + k);
#pragma GCC unroll 8
      for (int n = 0; n < outputs; ++n) total[m][n] += value * w[n];
    }
  }
  // unrolled, because a sum that is indexed by a variable would live in memory all along
  T sums[rows][outputs];
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < outputs; ++n) sums[m][n] = sum_halves<T>(total[m][n]);
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < outputs; ++n) {
      T sum = sums[m][n];
      for (int64_t rest = k; rest < inputs; ++rest) sum += x[m * x_row + rest] * weight[n * weight_row + rest];
      out[m * out_row + n] = bias ? sum + bias[n] : sum;
    }
}

template <class T, int rows>
void outputs_of(const Linear& c, int64_t first_row, int64_t begin, int64_t end) {
  // rows times outputs sums fit the registers
  constexpr int most = VLMFAST_VECTOR_BYTES == 64 ? (rows <= 4 ? 4 : 3) : rows <= 4 ? 2 : 1;
  const T* x = static_cast<const T*>(c.x) + first_row * c.inputs;
  const T *weight = static_cast<const T*>(c.weight), *bias = static_cast<const T*>(c.bias);
  T* out = static_cast<T*>(c.out) + first_row * c.outputs;
  int64_t n = begin;
  for (; n + most <= end; n += most)
    tile<T, rows, most>(x, c.inputs, weight + n * c.weight_row, c.weight_row, c.inputs, bias ? bias + n : nullptr,
                        out + n, c.outputs);
  for (; most > 1 && n < end; ++n)
    tile<T, rows, 1>(x, c.inputs, weight + n * c.weight_row, c.weight_row, c.inputs, bias ? bias + n : nullptr, out + n,
                     c.outputs);
}

template <class T>
void visit(const Linear& c, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < c.rows; row += tile_rows) switch (std::min<int64_t>(c.rows - row, tile_rows)) {
      case 1: outputs_of<T, 1>(c, row, begin, end); break;
      case 2: outputs_of<T, 2>(c, row, begin, end); break;
      case 3: outputs_of<T, 3>(c, row, begin, end); break;
      case 4: outputs_of<T, 4>(c, row, begin, end); break;
      case 5: outputs_of<T, 5>(c, row, begin, end); break;
      case 6: outputs_of<T, 6>(c, row, begin, end); break;
      case 7: outputs_of<T, 7>(c, row, begin, end); break;
      default: outputs_of<T, 8>(c, row, begin, end);
    }
}

}  // namespace

void few_row_linear(const Linear& call) {
  int64_t pieces = ceil_div(call.outputs, block);
  Queue queue(pieces, 1);
  int threads = threads_for(double(call.rows) * call.outputs * call.inputs * 2, pieces, call.threads);
  parallel(threads, [&](const Team&) {
    queue.work([&](int64_t piece) {
      int64_t begin = piece * block, end = std::min(begin + block, call.outputs);
      if (call.wide)
        visit<double>(call, begin, end);
      else
        visit<float>(call, begin, end);
    });
  });
}

}  // namespace vlmfast::VLMFAST_ISA
