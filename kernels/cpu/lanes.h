// Vectors of the accumulation type (float or double), one register wide, and the 16-bit types' way in and out of them.
#pragma once
#include <cstring>

#include "simd.h"
#include "small_products.h"

namespace pycse::PYCSE_ISA {

template <class A> constexpr int kLanes = kWidth * 4 / int(sizeof(A));
template <class A> struct Vec { typedef A type __attribute__((vector_size(kWidth * 4))); };
template <class A> using vec_t = typename Vec<A>::type;

template <class A>
PYCSE_INLINE vec_t<A> load_lanes(const A* x) {
  vec_t<A> v;
  std::memcpy(&v, x, sizeof v);
  return v;
}
PYCSE_INLINE vec load_lanes(const bf16* x) { return load_vec(x); }

template <class A>
PYCSE_INLINE void store_lanes(A* out, vec_t<A> v) {
  std::memcpy(out, &v, sizeof v);
}
PYCSE_INLINE void store_lanes(bf16* out, vec v) {
  const uvec u = (uvec)v, rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uvec bits = (u & 0x7fffffffu) > 0x7f800000u ? uvec{} + 0x7fc0u : rounded;  // NaN stays NaN
  const hvec h = __builtin_convertvector(bits, hvec);
  std::memcpy(out, &h, sizeof h);
}

typedef double dvec2 __attribute__((vector_size(16)));
typedef double dvec4 __attribute__((vector_size(32)));
typedef double dvec8 __attribute__((vector_size(64)));
PYCSE_INLINE double total(dvec2 v) { return v[0] + v[1]; }
PYCSE_INLINE double total(dvec4 v) { return (v[0] + v[2]) + (v[1] + v[3]); }
PYCSE_INLINE double total(dvec8 v) {
  dvec4 halves[2];
  std::memcpy(halves, &v, sizeof v);
  return total(halves[0] + halves[1]);
}

// A store past the caches, for results larger than they are: such a line is written without being read first. Needs an
// aligned address, and stores_done() before another thread reads. A plain store where the processor has none.
template <class A>
PYCSE_INLINE void stream_lanes(A* out, vec_t<A> v) {
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_ia32_movntps512(reinterpret_cast<float*>(out), (vec_t<float>)v);
#elif defined(__AVX2__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_ia32_movntps256(reinterpret_cast<float*>(out), (vec_t<float>)v);
#else
  store_lanes(out, v);
#endif
}
PYCSE_INLINE void stores_done() {
#if defined(__AVX2__)
  __builtin_ia32_sfence();
#endif
}

}  // namespace pycse::PYCSE_ISA
