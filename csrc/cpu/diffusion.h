// Arguments of the diffusion family's CPU kernels. The definition of each is vlmfast/ops/reference/diffusion.py, that of
// the tables' columns vlmfast/ops/diffusion_schedule.py. A null address leaves an input or an output out.
#pragma once
#include <cstdint>

#include "../common/numbers.h"

namespace vlmfast::cpu {

// Samples [batch, channels, inner] of any type, the elements of a sample side by side.
struct Samples {
  const void* at = nullptr;
  DType dtype = DType::float32;
  int64_t batch = 0;  // stride in elements
};

// "T" is float, or double where x is. Auxiliary tensors are T and dense.
struct Denoise {
  int64_t batch = 0, channels = 0, inner = 0;
  Samples x, out;
  bool guided = false, learned = false;  // more rows, or more channels, in out
  double guidance_scale = 1, clamp = 0;  // infinity: no clamping
  const void *threshold = nullptr, *image = nullptr, *shift = nullptr, *noise = nullptr;
  const void* mask = nullptr;
  int64_t mask_batch = 0, mask_channel = 0;  // strides
  const void* history[3] = {};
  double weights[4] = {};        // all 0: the output is used as it is
  const int64_t* t = nullptr;    // [batch], or null: `step`
  int64_t step = 0;
  const double* table = nullptr;  // [steps, 12]
  bool draws = false;
  uint64_t seed = 0, offset = 0;
  void* found[3] = {};  // x', x0, e, of the type of x
  int threads = 1;
};

struct DiffusionLoss {
  int64_t batch = 0, channels = 0, inner = 0;
  Samples out, noise, x0;
  const int64_t* t = nullptr;
  int64_t step = 0;
  const double* table = nullptr;  // [steps, 8]
  bool learned = false;
  // T [batch], results of the forward; in the backward their gradients, and that of out, dense and of its type.
  void *squared = nullptr, *bound = nullptr, *d_out = nullptr;
  int threads = 1;
};

#define VLMFAST_DIFFUSION_KERNELS                     \
  void denoise_step(const Denoise& call);             \
  void diffusion_loss(const DiffusionLoss& call);     \
  void diffusion_loss_bwd(const DiffusionLoss& call);

VLMFAST_DIFFUSION_KERNELS

}  // namespace vlmfast::cpu

namespace vlmfast::scalar {
using namespace cpu;
VLMFAST_DIFFUSION_KERNELS
}  // namespace vlmfast::scalar
namespace vlmfast::avx2 {
using namespace cpu;
VLMFAST_DIFFUSION_KERNELS
}  // namespace vlmfast::avx2
namespace vlmfast::avx512 {
using namespace cpu;
VLMFAST_DIFFUSION_KERNELS
}  // namespace vlmfast::avx512
namespace vlmfast::avx512bf16 {
using namespace cpu;
VLMFAST_DIFFUSION_KERNELS
}  // namespace vlmfast::avx512bf16
