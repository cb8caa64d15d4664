// Arguments of the alignment family's CPU kernel: addresses, sizes, and strides in elements. The definition is
// vlmfast/ops/reference/alignment.py.
#pragma once
#include <cstdint>

#include "../common/numbers.h"

namespace vlmfast::cpu {

struct Ipot {
  const void* cost;  // [B, N, M], contiguous along M
  DType dtype;
  int64_t batch, n, m, cost_batch, cost_row;
  const int64_t *lengths_x, *lengths_y;  // [B] rows and columns that exist, or null
  const uint8_t *mask_x, *mask_y;        // [B, N], [B, M] contiguous, nonzero keeps, or null
  double beta;
  int64_t iterations, k;
  void* plan;  // [B, N, M] contiguous: double for a double cost, else float
  int threads;
};

// 0, or 1 if a length lies outside the matrix.
#define VLMFAST_ALIGNMENT_KERNELS int ipot(const Ipot& call);

VLMFAST_ALIGNMENT_KERNELS

}  // namespace vlmfast::cpu

namespace vlmfast::scalar { using namespace cpu; VLMFAST_ALIGNMENT_KERNELS }
namespace vlmfast::avx2 { using namespace cpu; VLMFAST_ALIGNMENT_KERNELS }
namespace vlmfast::avx512 { using namespace cpu; VLMFAST_ALIGNMENT_KERNELS }
namespace vlmfast::avx512bf16 { using namespace cpu; VLMFAST_ALIGNMENT_KERNELS }
