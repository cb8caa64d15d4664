// Arguments of the info_nce family's CPU kernels: addresses, sizes, and strides in elements. The definition of each
// is vlmfast/ops/reference/info_nce.py. Statistics are [6, lines] or [2, lines] in the order of `Statistic`, in double: the
// rounding of a float32 log-sum-exp would be the largest error of a converged batch.
#pragma once
#include <cstdint>

#include "../common/numbers.h"

namespace vlmfast::cpu {

enum Statistic { LSE, POSITIVE, POSITIVES, BEST, SUM, COUNT };

struct Pairs {
  const void *image, *text;  // [N, D], [M, D]
  DType dtype;
  int64_t n, m, d, image_row, text_row;
  const void *scale, *bias;       // [] of the working type; bias may be null
  const int64_t *labels, *text_labels;  // [N], [M], or null for diagonal targets
  const uint8_t* mask;            // [N, M], nonzero leaves the pair out, or null
  int64_t mask_row, mask_column;
  int64_t offset;  // the positive of row i is column i + offset
  int threads;
};

struct InfoNceForward {
  Pairs pairs;
  bool full;
  double *row_stats, *column_stats;  // [K, N], [K, M]
  void* tiles;                     // [N + 196, M + 64] to keep for the backward, or null
  void* loss;                      // [] mean of the lines' losses, or null
  bool rows, columns;              // which directions `loss` averages
  double smoothing;
};

struct InfoNceBackward {
  Pairs pairs;
  const double *row_stats, *column_stats;
  const void* tiles;
  const void *row_weight, *column_weight;  // [N] or [], null leaves the direction out
  int64_t row_weight_stride, column_weight_stride;
  double smoothing;
  void *d_image, *d_text;  // [N, D], [M, D] contiguous, null if not needed
  DType gradient_dtype;
  void* d_scale;  // [] or null; with tiles it needs d_image or d_text
};

struct SigLip {
  Pairs pairs;
  const void* row_weight;
  int64_t row_weight_stride;
  void* row_loss;  // [N]
  void *d_image, *d_text;
  DType gradient_dtype;
  void *d_scale, *d_bias;
};

// 0, or 1 if the scale or the bias is not a number.
#define VLMFAST_INFO_NCE_KERNELS                 \
  int info_nce_fwd(const InfoNceForward& call);  \
  int info_nce_bwd(const InfoNceBackward& call); \
  int siglip(const SigLip& call);

VLMFAST_INFO_NCE_KERNELS

}  // namespace vlmfast::cpu

namespace vlmfast::scalar { using namespace cpu; VLMFAST_INFO_NCE_KERNELS }
namespace vlmfast::avx2 { using namespace cpu; VLMFAST_INFO_NCE_KERNELS }
namespace vlmfast::avx512 { using namespace cpu; VLMFAST_INFO_NCE_KERNELS }
namespace vlmfast::avx512bf16 { using namespace cpu; VLMFAST_INFO_NCE_KERNELS }
