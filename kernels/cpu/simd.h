// Scalar building blocks that the compiler vectorises: storage types, and an exponential with no branch and no call.
#pragma once
#include <cmath>
#include <cstdint>

#ifndef PYCSE_ISA
#error "compile through kernels/cpu/isa.cpp, once for each instruction set"
#endif

#define PYCSE_INLINE static inline __attribute__((always_inline))
#define PYCSE_NOINLINE static __attribute__((noinline))

namespace pycse::PYCSE_ISA {

struct bf16 { uint16_t bits; };

template <class T> struct Acc { using type = T; };
template <> struct Acc<bf16> { using type = float; };
template <class T> using acc_t = typename Acc<T>::type;

PYCSE_INLINE float load(float x) { return x; }
PYCSE_INLINE double load(double x) { return x; }
PYCSE_INLINE float load(bf16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }

PYCSE_INLINE void store(float& out, float x) { out = x; }
PYCSE_INLINE void store(double& out, double x) { out = x; }
PYCSE_INLINE void store(bf16& out, float x) {  // round to nearest even; NaN stays NaN
  uint32_t u = __builtin_bit_cast(uint32_t, x);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out.bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// 2^x for x < 128 (less a row's maximum, whose rounding is 32 bits at most: rows.h): 0 below -126 (so -inf marks a key
// that does not count), NaN for NaN. Relative error 1.7e-7: a minimax polynomial on [-1/2, 1/2]; adding 1.5 * 2^23
// rounds to an integer and leaves it in the low mantissa bits, and 127 more makes it an exponent. The product, not a
// sum of bits, keeps a NaN whatever its payload.
PYCSE_INLINE float exp2_(float x) {
  const float t = x + 12583039.0f;
  const float r = x - (t - 12583039.0f);
  float y = 1.3264727262e-3f;
  y = y * r + 9.6715127104e-3f;
  y = y * r + 5.5507337437e-2f;
  y = y * r + 2.4022242084e-1f;
  y = y * r + 6.9314697760e-1f;
  y = y * r + 1.0f;
  y *= __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, t) << 23);
  return x < -126.0f ? 0.0f : y;
}
PYCSE_INLINE double exp2_(double x) { return std::exp2(x); }

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

}  // namespace pycse::PYCSE_ISA
