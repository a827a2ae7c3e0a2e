// Scalar building blocks that the compiler vectorises: storage types, and an exponential with no branch and no call.
#pragma once
#include <cmath>
#include <cstdint>

#ifndef PYCSE_ISA
#error "compile through kernels/cpu/isa.cpp, once for each instruction set"
#endif

#define PYCSE_INLINE static inline __attribute__((always_inline))

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

// exp(x) for x <= 88: 0 below -87.3 (so -inf marks a key that does not count), NaN for NaN.
// Cephes' polynomial on [-ln2/2, ln2/2]; adding 1.5 * 2^23 rounds to an integer and leaves it in the low mantissa bits.
PYCSE_INLINE float exp_(float x) {
  float c = x > 88.0f ? 88.0f : x;
  float t = c * 1.44269504f + 12582912.0f;
  float n = t - 12582912.0f;
  float r = c - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  uint32_t bits = __builtin_bit_cast(uint32_t, y) + (__builtin_bit_cast(uint32_t, t) << 23);
  return x < -87.3f ? 0.0f : __builtin_bit_cast(float, bits);
}
PYCSE_INLINE double exp_(double x) { return std::exp(x); }

}  // namespace pycse::PYCSE_ISA
