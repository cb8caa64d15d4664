// One vector type for every instruction set, through the compiler's vector extension, and the few functions of it.
// Each kernel source is compiled once per instruction set, with VLMFAST_ISA and VLMFAST_VECTOR_BYTES defined.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "../common/numbers.h"

namespace vlmfast {
namespace {

template <class T>
struct Simd {
  typedef T V __attribute__((vector_size(VLMFAST_VECTOR_BYTES)));
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Int I __attribute__((vector_size(VLMFAST_VECTOR_BYTES)));
  static constexpr int lanes = VLMFAST_VECTOR_BYTES / sizeof(T);
};

template <class T>
using Vec = typename Simd<T>::V;

template <class T>
inline Vec<T> load(const T* from) {
  Vec<T> value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
inline void store(T* to, Vec<T> value) {
  memcpy(to, &value, sizeof value);
}

template <class T>
inline Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}

template <class V>
inline V smaller(V a, V b) {
  return a < b ? a : b;
}

// The very same by one instruction: it, too, gives b where a or b is NaN, which the compiler does not see. (Of the
// 512-bit intrinsics those with a mask, since gcc 12 warns of the undefined operand of the others.)
#if VLMFAST_VECTOR_BYTES == 64 && defined(__AVX512F__)
#define VLMFAST_EXTREMES(T, kind)                                                                                   \
  template <> inline Vec<T> larger(Vec<T> a, Vec<T> b) { return Vec<T>(_mm512_maskz_max_##kind(-1, a, b)); }  \
  template <> inline Vec<T> smaller(Vec<T> a, Vec<T> b) { return Vec<T>(_mm512_maskz_min_##kind(-1, a, b)); }
#elif VLMFAST_VECTOR_BYTES == 32 && defined(__AVX__)
#define VLMFAST_EXTREMES(T, kind)                                                                       \
  template <> inline Vec<T> larger(Vec<T> a, Vec<T> b) { return Vec<T>(_mm256_max_##kind(a, b)); }  \
  template <> inline Vec<T> smaller(Vec<T> a, Vec<T> b) { return Vec<T>(_mm256_min_##kind(a, b)); }
#endif
#ifdef VLMFAST_EXTREMES
VLMFAST_EXTREMES(float, ps)
VLMFAST_EXTREMES(double, pd)
#undef VLMFAST_EXTREMES
#endif

template <class T, class V>
inline T sum_lanes(V value) {
  T lanes[sizeof(V) / sizeof(T)], total = 0;
  memcpy(lanes, &value, sizeof value);
  for (T lane : lanes) total += lane;
  return total;
}

template <class V, size_t... i>
inline auto folded(V value, std::index_sequence<i...>) {
  return __builtin_shufflevector(value, value, i...) + __builtin_shufflevector(value, value, (i + sizeof...(i))...);
}

// The sum of a vector's lanes by halves, which takes fewer steps than `sum_lanes` and rounds less.
template <class T, class V>
inline T sum_halves(V value) {
  constexpr size_t lanes = sizeof(V) / sizeof(T);
  if constexpr (lanes == 2)
    return value[0] + value[1];
  else
    return sum_halves<T>(folded(value, std::make_index_sequence<lanes / 2>()));
}

template <class T, class V>
inline T max_lanes(V value) {
  T lanes[sizeof(V) / sizeof(T)];
  memcpy(lanes, &value, sizeof value);
  T best = lanes[0];
  for (T lane : lanes) best = lane > best ? lane : best;
  return best;
}

// exp(x): 2^n e^r with |r| <= ln2 / 2 and the Taylor series of e^r to full precision (7 terms for float, 13 for
// double); 0 below the smallest normal number, +inf above the largest.
template <class T>
inline Vec<T> exp(Vec<T> x) {
  constexpr bool single = sizeof(T) == 4;
  constexpr T low = single ? T(-87.33) : T(-708.39), high = single ? T(88.72) : T(709.78);
  constexpr T round = single ? T(0x1.8p23) : T(0x1.8p52);
  constexpr T ln2_high = single ? T(0x1.62e4p-1) : T(0x1.62e42fee00000p-1);
  constexpr T ln2_low = single ? T(0x1.7f7d1cp-20) : T(0x1.a39ef35793c76p-33);
  constexpr int mantissa = single ? 23 : 52;
  constexpr int terms = single ? 7 : 13;
  using I = typename Simd<T>::I;
  Vec<T> bounded = smaller(larger(x, broadcast(low)), broadcast(high));
  Vec<T> shifted = bounded * T(1.4426950408889634) + round;
  Vec<T> n = shifted - round;
  Vec<T> r = bounded - n * ln2_high;
  r = r - n * ln2_low;
  T factorial[terms + 1] = {1};
  for (int k = 1; k <= terms; ++k) factorial[k] = factorial[k - 1] / k;
  Vec<T> value = broadcast(factorial[terms]);
#pragma GCC unroll 16
  for (int k = terms - 1; k >= 0; --k) value = value * r + factorial[k];
  I bits, power;
  memcpy(&power, &shifted, sizeof power);
  memcpy(&bits, &value, sizeof bits);
  bits += power << mantissa;
  memcpy(&value, &bits, sizeof value);
  value = x < low ? Vec<T>{} : value;
  value = x > high ? broadcast(std::numeric_limits<T>::infinity()) : value;
  return x != x ? x : value;
}

// log(1 + e) for 0 <= e <= 1: 2 atanh(e / (2 + e)), whose series converges like 9^-k.
template <class T>
inline Vec<T> log1p_unit(Vec<T> e) {
  constexpr int terms = sizeof(T) == 4 ? 9 : 17;
  Vec<T> u = e / (e + T(2)), square = u * u;
  Vec<T> value = broadcast(T(1) / T(2 * terms - 1));
#pragma GCC unroll 17
  for (int k = terms - 2; k >= 0; --k) value = value * square + T(1) / T(2 * k + 1);
  return T(2) * u * value;
}

// log(x) of positive normal numbers: x = 2^n m with m between sqrt(1/2) and sqrt(2), and 2 atanh((m - 1) / (m + 1)).
template <class T>
inline Vec<T> log(Vec<T> x) {
  constexpr bool single = sizeof(T) == 4;
  constexpr int mantissa = single ? 23 : 52, terms = single ? 5 : 11;
  using I = typename Simd<T>::I;
  using Int = typename Simd<T>::Int;
  constexpr Int half_root = single ? Int(0x3f3504f3) : Int(0x3fe6a09e667f3bcd);
  constexpr T ln2_high = single ? T(0x1.62e4p-1) : T(0x1.62e42fee00000p-1);
  constexpr T ln2_low = single ? T(0x1.7f7d1cp-20) : T(0x1.a39ef35793c76p-33);
  I bits;
  memcpy(&bits, &x, sizeof bits);
  I power = (bits - half_root) >> mantissa;
  bits -= power << mantissa;
  Vec<T> m;
  memcpy(&m, &bits, sizeof m);
  Vec<T> u = (m - T(1)) / (m + T(1)), square = u * u, n = __builtin_convertvector(power, Vec<T>);
  Vec<T> value = broadcast(T(1) / T(2 * terms - 1));
#pragma GCC unroll 11
  for (int k = terms - 2; k >= 0; --k) value = value * square + T(1) / T(2 * k + 1);
  return n * ln2_high + (n * ln2_low + T(2) * u * value);
}

// Square roots of numbers of at least 0.
template <class T>
inline Vec<T> root(Vec<T> x) {
  T lanes[Simd<T>::lanes];
  memcpy(lanes, &x, sizeof x);
  for (T& lane : lanes) lane = std::sqrt(lane);
  memcpy(&x, lanes, sizeof x);
  return x;
}

// Cosine and sine of 2 pi x for -1 <= x <= 1: the nearest quarter turn, and Taylor series of what remains, an eighth of
// a turn at most.
template <class T>
inline void turn(Vec<T> x, Vec<T>& cosine, Vec<T>& sine) {
  constexpr bool single = sizeof(T) == 4;
  constexpr T round = single ? T(0x1.8p23) : T(0x1.8p52);
  constexpr int terms = single ? 6 : 9;
  using I = typename Simd<T>::I;
  Vec<T> shifted = x * T(4) + round;
  Vec<T> angle = (x - (shifted - round) * T(0.25)) * T(6.283185307179586), square = angle * angle;
  I quarter;
  memcpy(&quarter, &shifted, sizeof quarter);
  T even[terms], odd[terms];
  even[0] = odd[0] = 1;
  for (int k = 1; k < terms; ++k) {
    even[k] = -even[k - 1] / T((2 * k - 1) * (2 * k));
    odd[k] = -odd[k - 1] / T(2 * k * (2 * k + 1));
  }
  Vec<T> c = broadcast(even[terms - 1]), s = broadcast(odd[terms - 1]);
#pragma GCC unroll 9
  for (int k = terms - 2; k >= 0; --k) c = c * square + even[k], s = s * square + odd[k];
  s *= angle;
  auto swapped = (quarter & 1) != 0;
  cosine = swapped ? s : c, sine = swapped ? c : s;
  cosine = ((quarter + 1) & 2) != 0 ? -cosine : cosine;
  sine = (quarter & 2) != 0 ? -sine : sine;
}

// One row of any element type, widened to T.
template <class T>
inline void widen_row(const void* row, DType dtype, int64_t count, T* to) {
  if (dtype == DType::bfloat16) {
    auto from = static_cast<const uint16_t*>(row);
    for (int64_t i = 0; i < count; ++i) to[i] = T(bfloat16_to_float(from[i]));
  } else if (dtype == DType::float16) {
    auto from = static_cast<const uint16_t*>(row);
    for (int64_t i = 0; i < count; ++i) to[i] = T(float16_to_float(from[i]));
  } else if (dtype == DType::float32) {
    auto from = static_cast<const float*>(row);
    for (int64_t i = 0; i < count; ++i) to[i] = T(from[i]);
  } else {
    auto from = static_cast<const double*>(row);
    for (int64_t i = 0; i < count; ++i) to[i] = T(from[i]);
  }
}

// factor * from, rounded once to the element type; `from` and `to` may be the same row.
template <class T>
inline void narrow_row(const T* from, T factor, int64_t count, DType dtype, void* row) {
  if (dtype == DType::bfloat16) {
    auto to = static_cast<uint16_t*>(row);
    for (int64_t i = 0; i < count; ++i) to[i] = float_to_bfloat16(float(from[i] * factor));
  } else if (dtype == DType::float16) {
    auto to = static_cast<uint16_t*>(row);
    for (int64_t i = 0; i < count; ++i) to[i] = float_to_float16(float(from[i] * factor));
  } else if (dtype == DType::float32) {
    auto to = static_cast<float*>(row);
    for (int64_t i = 0; i < count; ++i) to[i] = float(from[i] * factor);
  } else {
    auto to = static_cast<double*>(row);
    for (int64_t i = 0; i < count; ++i) to[i] = double(from[i] * factor);
  }
}

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace
}  // namespace vlmfast
