// Element types that cross the binding, and the 16-bit floats as plain integers, for host and device.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define VLMFAST_HD __host__ __device__ __forceinline__
#else
#define VLMFAST_HD inline
#endif

namespace vlmfast {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

namespace {  // every instruction set keeps its own copy: the linker must not share AVX-512 code with the scalar path

VLMFAST_HD float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

VLMFAST_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

VLMFAST_HD float bfloat16_to_float(uint16_t half) { return bits_to_float(uint32_t(half) << 16); }

// Round to nearest even; NaN stays NaN.
VLMFAST_HD uint16_t float_to_bfloat16(float value) {
  uint32_t bits = float_to_bits(value);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t(value != value ? (bits >> 16) | 0x40u : rounded);
}

// A half is a float whose exponent is off by 112; the multiplication also normalises subnormals.
VLMFAST_HD float float16_to_float(uint16_t half) {
  uint32_t magnitude = uint32_t(half & 0x7fffu) << 13;
  float value = bits_to_float(magnitude) * 0x1p112f;
  uint32_t bits = float_to_bits(value);
  bits = magnitude >= (31u << 23) ? (magnitude | 0x7f800000u) : bits;
  return bits_to_float(bits | uint32_t(half & 0x8000u) << 16);
}

// Round to nearest even, overflow to infinity, subnormals kept; NaN stays NaN.
VLMFAST_HD uint16_t float_to_float16(float value) {
  uint32_t bits = float_to_bits(value);
  uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude >= 0x7f800000u) {
    result = 0x7c00u | (magnitude > 0x7f800000u ? 0x200u : 0u);
  } else if (magnitude >= 0x477ff000u) {
    result = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // adding 0.5 aligns the subnormal's last bit with the float's
    result = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return uint16_t(sign | result);
}

}  // namespace
}  // namespace vlmfast
