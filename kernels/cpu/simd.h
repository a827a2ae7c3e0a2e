// Scalar building blocks that the compiler vectorises: an exponential with no branch and no call. (Storage types:
// common/storage.h.)
#pragma once
#include <cmath>
#include <cstdint>

#include "../common/loss.h"

#ifndef PYCSE_ISA
#error "compile through kernels/cpu/isa.cpp, once for each instruction set"
#endif

#define PYCSE_INLINE static inline __attribute__((always_inline))
#define PYCSE_NOINLINE static __attribute__((noinline))

namespace pycse::PYCSE_ISA {

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

}  // namespace pycse::PYCSE_ISA
