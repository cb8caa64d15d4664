// Arguments of the group_norm family's CPU kernels: addresses, sizes, and strides in elements. The definition is
// vlmfast/ops/reference/group_norm.py. "T" is float, or double for float64 activations.
#pragma once
#include <cstdint>

#include "../common/numbers.h"

namespace vlmfast::cpu {

// [B, C, S], contiguous along S.
struct Activations {
  void* at = nullptr;
  int64_t batch = 0, channel = 0;
};

struct GroupNorm {
  DType dtype = DType::float32;  // of the activations
  int64_t batch = 0, channels = 0, spatial = 0, groups = 1;
  Activations x;
  const void *weight = nullptr, *bias = nullptr;  // T [C]
  const void *scale = nullptr, *shift = nullptr;  // T [B, C], contiguous along C, both or neither
  int64_t scale_batch = 0, shift_batch = 0;
  double eps = 1e-5;
  bool silu = true;
  int threads = 1;
  double *mean = nullptr, *rstd = nullptr;  // [B, G]: results of the forward, inputs of the backward
  Activations out;                          // forward: the result; backward: its gradient
};

// A null address leaves a gradient out.
struct GroupNormBackward {
  GroupNorm forward;
  Activations d_x;
  void *d_weight = nullptr, *d_bias = nullptr;  // T [C]
  void *d_scale = nullptr, *d_shift = nullptr;  // T [B, C] contiguous
};

#define VLMFAST_GROUP_NORM_KERNELS            \
  void group_norm_fwd(const GroupNorm& call); \
  void group_norm_bwd(const GroupNormBackward& call);

VLMFAST_GROUP_NORM_KERNELS

}  // namespace vlmfast::cpu

namespace vlmfast::scalar { using namespace cpu; VLMFAST_GROUP_NORM_KERNELS }
namespace vlmfast::avx2 { using namespace cpu; VLMFAST_GROUP_NORM_KERNELS }
namespace vlmfast::avx512 { using namespace cpu; VLMFAST_GROUP_NORM_KERNELS }
namespace vlmfast::avx512bf16 { using namespace cpu; VLMFAST_GROUP_NORM_KERNELS }
