#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "alignment.h"
#include "attention.h"
#include "decoding.h"
#include "diffusion.h"
#include "group_norm.h"
#include "info_nce.h"
#include "quantize.h"

namespace vlmfast::cpu {
namespace {

#ifdef VLMFAST_X86
constexpr Isa widest_built = Isa::avx512bf16;
#else
constexpr Isa widest_built = Isa::scalar;
#endif

constexpr const char* names[] = {"scalar", "avx2", "avx512", "avx512bf16"};

Isa widest_supported() {
#ifdef VLMFAST_X86
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512cd");
  bool bf16 = __builtin_cpu_supports("avx512bf16");
  return avx2 && avx512 ? (bf16 ? Isa::avx512bf16 : Isa::avx512) : avx2 ? Isa::avx2 : Isa::scalar;
#else
  return widest_built;
#endif
}

Isa choose() {
  Isa supported = widest_supported();
  const char* wanted = std::getenv("VLMFAST_ISA");
  if (!wanted || !*wanted) return supported;
  for (int i = 0; i < 4; ++i)
    if (!std::strcmp(wanted, names[i])) {
      if (i > int(supported))
        throw std::runtime_error("VLMFAST_ISA is " + std::string(wanted) + ", the widest available here is " +
                                 names[int(supported)]);
      return Isa(i);
    }
  throw std::runtime_error("VLMFAST_ISA is '" + std::string(wanted) + "', it must be scalar, avx2, avx512 or avx512bf16");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() { return names[int(isa())]; }
const char* isas_built() { return widest_built == Isa::scalar ? "scalar" : "scalar avx2 avx512 avx512bf16"; }

#ifdef VLMFAST_X86
#define VLMFAST_DISPATCH(call)                     \
  switch (isa()) {                                 \
    case Isa::avx512bf16: return avx512bf16::call; \
    case Isa::avx512: return avx512::call;         \
    case Isa::avx2: return avx2::call;             \
    default: return scalar::call;                  \
  }
#else
#define VLMFAST_DISPATCH(call) return scalar::call;
#endif

int info_nce_fwd(const InfoNceForward& call) { VLMFAST_DISPATCH(info_nce_fwd(call)) }
int info_nce_bwd(const InfoNceBackward& call) { VLMFAST_DISPATCH(info_nce_bwd(call)) }
int siglip(const SigLip& call) { VLMFAST_DISPATCH(siglip(call)) }
int ipot(const Ipot& call) { VLMFAST_DISPATCH(ipot(call)) }

int attention_fwd(const Attention* const* calls, int count, int threads) {
  VLMFAST_DISPATCH(attention_fwd(calls, count, threads))
}
int attention_bwd(const Attention* const* calls, int count, int threads) {
  VLMFAST_DISPATCH(attention_bwd(calls, count, threads))
}
int bi_attention_fwd(const BiAttention& call, int threads) { VLMFAST_DISPATCH(bi_attention_fwd(call, threads)) }
int bi_attention_bwd(const BiAttention& call, int threads) { VLMFAST_DISPATCH(bi_attention_bwd(call, threads)) }

void quantize_fwd(const Quantize& call) { VLMFAST_DISPATCH(quantize_fwd(call)) }
void quantize_bwd(const QuantizeBackward& call) { VLMFAST_DISPATCH(quantize_bwd(call)) }
void encode_indices(const Encode& call) { VLMFAST_DISPATCH(encode_indices(call)) }
void gumbel_noise(int64_t rows, int64_t vocabulary, uint64_t seed, uint64_t offset, bool wide, void* to, int threads) {
  VLMFAST_DISPATCH(gumbel_noise(rows, vocabulary, seed, offset, wide, to, threads))
}

void denoise_step(const Denoise& call) { VLMFAST_DISPATCH(denoise_step(call)) }
void diffusion_loss(const DiffusionLoss& call) { VLMFAST_DISPATCH(diffusion_loss(call)) }
void diffusion_loss_bwd(const DiffusionLoss& call) { VLMFAST_DISPATCH(diffusion_loss_bwd(call)) }

void few_row_linear(const Linear& call) { VLMFAST_DISPATCH(few_row_linear(call)) }

void group_norm_fwd(const GroupNorm& call) { VLMFAST_DISPATCH(group_norm_fwd(call)) }
void group_norm_bwd(const GroupNormBackward& call) { VLMFAST_DISPATCH(group_norm_bwd(call)) }

}  // namespace vlmfast::cpu
