// Arguments of the quantize family's CPU kernels. The definition of each is vlmfast/ops/reference/quantize.py. A null
// address leaves an input or an output out.
#pragma once
#include <cstdint>

#include "../common/numbers.h"

namespace vlmfast::cpu {

// Logits or what has their shape: [batch, positions, V] by strides in elements, of which position's or entry's is 1.
struct Grid {
  const void* at = nullptr;
  DType dtype = DType::float32;
  int64_t batch = 0, position = 0, entry = 0;
};

// Relaxed quantization: rows n = batch positions + position. "T" is float, or double for float64 logits.
struct Quantize {
  int64_t batch = 0, positions = 0, vocabulary = 0, width = 0;
  Grid logits;
  Grid given;                      // T noise, instead of the drawn one
  bool draws = false;              // whether there is noise from `seed`
  uint64_t seed = 0, offset = 0;   // row n of the draws is n + offset
  const void* codebook = nullptr;  // T [V, D]
  double tau = 1;
  int threads = 1;

  // Forward: T [N, D], int64 [N] and T [N].
  void* z = nullptr;
  int64_t* indices = nullptr;
  void *lse = nullptr, *plain = nullptr, *expected = nullptr;
};

struct QuantizeBackward {
  Quantize call;                                // lse, plain and expected are inputs now, indices too
  const void *d_z = nullptr;                    // T [N, D]
  const void *mean_code = nullptr, *plain_code = nullptr;  // T [N, D], means of the codes
  double gain = 1, kl = 0, plain_gain = 0;
  Grid d_logits;                                // of the logits' type
  void* d_codebook = nullptr;                   // T [V, D]
};

// indices[n] = the entry of the largest of weight features[n] + bias.
struct Encode {
  int64_t batch = 0, positions = 0, vocabulary = 0, width = 0;
  Grid features;  // [batch, positions, C], of any type
  const void *weight = nullptr, *bias = nullptr;  // T [V, C], T [V]
  bool wide = false;  // T is double
  int64_t* indices = nullptr;
  int threads = 1;
};

#define VLMFAST_QUANTIZE_KERNELS                    \
  void quantize_fwd(const Quantize& call);          \
  void quantize_bwd(const QuantizeBackward& call);  \
  void encode_indices(const Encode& call);          \
  void gumbel_noise(int64_t rows, int64_t vocabulary, uint64_t seed, uint64_t offset, bool wide, void* to, int threads);

VLMFAST_QUANTIZE_KERNELS

}  // namespace vlmfast::cpu

namespace vlmfast::scalar {
using namespace cpu;
VLMFAST_QUANTIZE_KERNELS
}  // namespace vlmfast::scalar
namespace vlmfast::avx2 {
using namespace cpu;
VLMFAST_QUANTIZE_KERNELS
}  // namespace vlmfast::avx2
namespace vlmfast::avx512 {
using namespace cpu;
VLMFAST_QUANTIZE_KERNELS
}  // namespace vlmfast::avx512
namespace vlmfast::avx512bf16 {
using namespace cpu;
VLMFAST_QUANTIZE_KERNELS
}  // namespace vlmfast::avx512bf16
