// Arguments of the decoding family's CPU kernel. Its definition is vlmfast/ops/reference/decoding.py.
#pragma once
#include <cstdint>

namespace vlmfast::cpu {

// out[m, n] = sum_k x[m, k] weight[n, k] + bias[n], for so few rows m that reading the weights is the work. "T" is
// float, or double if wide; rows of x and out are contiguous, those of weight weight_row elements apart.
struct Linear {
  const void *x = nullptr, *weight = nullptr, *bias = nullptr;  // T [M, K], [N, K], [N] or null
  void* out = nullptr;                                          // T [M, N]
  int64_t rows = 0, outputs = 0, inputs = 0, weight_row = 0;
  bool wide = false;
  int threads = 1;
};

#define VLMFAST_DECODING_KERNELS void few_row_linear(const Linear& call);

VLMFAST_DECODING_KERNELS

}  // namespace vlmfast::cpu

namespace vlmfast::scalar {
using namespace cpu;
VLMFAST_DECODING_KERNELS
}  // namespace vlmfast::scalar
namespace vlmfast::avx2 {
using namespace cpu;
VLMFAST_DECODING_KERNELS
}  // namespace vlmfast::avx2
namespace vlmfast::avx512 {
using namespace cpu;
VLMFAST_DECODING_KERNELS
}  // namespace vlmfast::avx512
namespace vlmfast::avx512bf16 {
using namespace cpu;
VLMFAST_DECODING_KERNELS
}  // namespace vlmfast::avx512bf16
