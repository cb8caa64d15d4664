// Arguments of the attention family's CPU kernels: addresses, sizes, and strides in elements. The definition of each
// is vlmfast/ops/reference/attention.py. A null address leaves an option or an output out.
#pragma once
#include <cstdint>

#include "../common/numbers.h"

namespace vlmfast::cpu {

// [B, S, H, D] with a contiguous last dimension; packed streams have no batch stride.
struct Stream {
  const void* at = nullptr;
  int64_t batch = 0, row = 0, head = 0;
};

// Broadcast dimensions of [sequences, H, Sq, Sk] have stride 0.
struct Plane {
  const void* at = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 0;
};

// One direction: its inputs and options.
struct Attention {
  DType dtype;
  int64_t sequences, heads, sq, sk, d, dv;
  int64_t batch_q, batch_k;    // samples that the streams hold; rows of packed streams
  int64_t length_q, length_k;  // rows of a sample, which are sq and sk unless rows are picked
  Stream query, key, value;
  double scale = 1;

  const int64_t *lengths_q = nullptr, *lengths_k = nullptr;  // [batch_q], [batch_k]
  const int64_t *pair_q = nullptr, *pair_k = nullptr;        // [sequences]
  const int64_t *cu_q = nullptr, *cu_k = nullptr;            // [sequences + 1]
  // sequence b groups + g consists of these rows of sample b: [groups, sq], [groups, sk], -1 for no key
  const int64_t *rows_q = nullptr, *rows_k = nullptr, *regions = nullptr;
  int64_t groups = 1;                 // as many keys as queries: the sequences share no row
  const uint8_t* key_mask = nullptr;  // [batch_k, sk]
  int64_t key_mask_batch = 0, key_mask_column = 0;
  Plane mask, bias;
  DType bias_dtype = DType::float32;
  const int64_t* prefix = nullptr;  // [sequences]
  bool causal = false;
  double dropout = 0;
  uint64_t seed = 0;
  uint32_t direction = 0;
  bool probs_dropout = false;

  // Outputs, contiguous: out like the query with width dv, probs [sequences, H, sq, sk], lse [sequences, H, sq] or
  // packed [sq, H], kept [sequences, H, sk, sq rounded up to 16] of the working type.
  void *out = nullptr, *probs = nullptr, *lse = nullptr, *kept = nullptr;

  // Gradients: of the outputs with any strides, of the inputs contiguous in `gradient_dtype`.
  Stream d_out;
  const void *d_probs = nullptr, *d_lse = nullptr;
  void *d_query = nullptr, *d_key = nullptr, *d_value = nullptr, *d_bias = nullptr;
  DType gradient_dtype = DType::float32;
  int64_t bias_shape[4] = {1, 1, 1, 1};
};

// Two softmaxes over one score matrix: b reads a along its rows, a reads b along its columns.
struct BiAttention {
  DType dtype = DType::float32;
  int64_t batch = 0, heads = 0, sa = 0, sb = 0, d = 0, dv_a = 0, dv_b = 0;
  Stream query_b, key_a, value_a, value_b;
  double scale = 1, dropout_a = 0, dropout_b = 0;
  uint64_t seed = 0;
  const uint8_t *mask_a = nullptr, *mask_b = nullptr;  // [batch, sa], [batch, sb]
  // Contiguous. out_a [batch, sa, H, dv_b] and out_b [batch, sb, H, dv_a]; the working type for the rest: lse [batch,
  // H, s], top and share [2, batch, H, s], with which p = exp(x - top) share.
  void *out_a = nullptr, *out_b = nullptr, *lse_a = nullptr, *lse_b = nullptr, *stats_a = nullptr, *stats_b = nullptr;
  Stream d_out_a, d_out_b;
  const void *d_lse_a = nullptr, *d_lse_b = nullptr;
  void *d_query_b = nullptr, *d_key_a = nullptr, *d_value_a = nullptr, *d_value_b = nullptr;
};

// 0, or 1 if a length, an offset or an index leaves its stream.
#define VLMFAST_ATTENTION_KERNELS                                           \
  int attention_fwd(const Attention* const* calls, int count, int threads); \
  int attention_bwd(const Attention* const* calls, int count, int threads); \
  int bi_attention_fwd(const BiAttention& call, int threads);               \
  int bi_attention_bwd(const BiAttention& call, int threads);

VLMFAST_ATTENTION_KERNELS

}  // namespace vlmfast::cpu

namespace vlmfast::scalar {
using namespace cpu;
VLMFAST_ATTENTION_KERNELS
}  // namespace vlmfast::scalar
namespace vlmfast::avx2 {
using namespace cpu;
VLMFAST_ATTENTION_KERNELS
}  // namespace vlmfast::avx2
namespace vlmfast::avx512 {
using namespace cpu;
VLMFAST_ATTENTION_KERNELS
}  // namespace vlmfast::avx512
namespace vlmfast::avx512bf16 {
using namespace cpu;
VLMFAST_ATTENTION_KERNELS
}  // namespace vlmfast::avx512bf16
