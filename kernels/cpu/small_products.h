// Register-tiled products for batches that fit in cache, where packing and dispatch would cost more than arithmetic:
//
//   S   = diag(r1) x y^T        dot products, kDotRows x kDotCols at a time, no packing
//   out = G z                   kRows rows by kVecs vectors at a time; of G^T the same tiles, G read by columns
#pragma once
#include <algorithm>
#include <cstring>

#include "simd.h"

namespace pycse::PYCSE_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kDotRows = 6, kDotCols = 4, kRows = 6, kVecs = 4;  // 24 of 32 registers accumulate
#elif defined(__AVX2__)
constexpr int kWidth = 8, kDotRows = 3, kDotCols = 3, kRows = 4, kVecs = 2;   // 9 and 8 of 16
#elif defined(__aarch64__)
constexpr int kWidth = 4, kDotRows = 6, kDotCols = 4, kRows = 6, kVecs = 4;   // as with AVX-512
#else
constexpr int kWidth = 4, kDotRows = 3, kDotCols = 3, kRows = 4, kVecs = 2;
#endif

typedef float vec __attribute__((vector_size(kWidth * 4)));
typedef uint32_t uvec __attribute__((vector_size(kWidth * 4)));
typedef uint16_t hvec __attribute__((vector_size(kWidth * 2)));

PYCSE_INLINE vec load_vec(const float* x) {
  vec v;
  std::memcpy(&v, x, sizeof v);
  return v;
}
PYCSE_INLINE vec load_vec(const bf16* x) {
  hvec h;
  std::memcpy(&h, x, sizeof h);
  return (vec)(__builtin_convertvector(h, uvec) << 16);
}
// Sum of the lanes, by halves.
typedef float vec4 __attribute__((vector_size(16)));
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec16 __attribute__((vector_size(64)));
PYCSE_INLINE float total(vec4 v) { return (v[0] + v[2]) + (v[1] + v[3]); }
PYCSE_INLINE float total(vec8 v) {
  vec4 halves[2];
  std::memcpy(halves, &v, sizeof v);
  return total(halves[0] + halves[1]);
}
PYCSE_INLINE float total(vec16 v) {
  vec8 halves[2];
  std::memcpy(halves, &v, sizeof v);
  return total(halves[0] + halves[1]);
}

// sums_hk = a_h . b_k over D features.
template <class T>
PYCSE_INLINE void dot_tile(const T* const* a, const T* const* b, int64_t D, float (*sums)[kDotCols]) {
  const int64_t whole = D / kWidth * kWidth;
  vec acc[kDotRows][kDotCols] = {};
  for (int64_t d = 0; d < whole; d += kWidth) {
    vec bv[kDotCols];
#pragma GCC unroll 8
    for (int k = 0; k < kDotCols; ++k) bv[k] = load_vec(b[k] + d);
#pragma GCC unroll 8
    for (int h = 0; h < kDotRows; ++h) {
      vec av = load_vec(a[h] + d);
#pragma GCC unroll 8
      for (int k = 0; k < kDotCols; ++k) acc[h][k] += av * bv[k];
    }
  }
  for (int h = 0; h < kDotRows; ++h)
    for (int k = 0; k < kDotCols; ++k) {
      sums[h][k] = total(acc[h][k]);
      for (int64_t d = whole; d < D; ++d) sums[h][k] += load(a[h][d]) * load(b[k][d]);
    }
}

// S[i0:i1, :] = diag(r1) x y^T. Rows past an edge repeat the last one and are not stored.
template <class T>
PYCSE_NOINLINE void similarities(const T* x, int64_t ldx, const T* y, int64_t ldy, int64_t i0, int64_t i1, int64_t N,
                                 int64_t D, const float* r1, float* S) {
  for (int64_t i = i0; i < i1; i += kDotRows)
    for (int64_t j = 0; j < N; j += kDotCols) {
      const T *a[kDotRows], *b[kDotCols];
      for (int k = 0; k < kDotRows; ++k) a[k] = x + std::min(i + k, i1 - 1) * ldx;
      for (int k = 0; k < kDotCols; ++k) b[k] = y + std::min(j + k, N - 1) * ldy;
      float sums[kDotRows][kDotCols];
      dot_tile(a, b, D, sums);
      for (int h = 0; h < kDotRows && i + h < i1; ++h)
        for (int k = 0; k < kDotCols && j + k < N; ++k) S[(i + h) * N + j + k] = sums[h][k] * r1[i + h];
    }
}

// out[h, d : d + V kWidth] = sum_j G(h, j) z[j, d : ...] for kRows rows h, of which `valid` are stored.
template <int V, class T>
PYCSE_INLINE void product_tile(const float* const* G, int64_t step, const T* z, int64_t ld, int64_t n, float* out,
                               int64_t D, int valid) {
  vec acc[kRows][V] = {};
  for (int64_t j = 0; j < n; ++j) {
    vec zv[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) zv[v] = load_vec(z + j * ld + v * kWidth);
#pragma GCC unroll 8
    for (int h = 0; h < kRows; ++h) {
      const float g = G[h][j * step];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[h][v] += g * zv[v];
    }
  }
  for (int h = 0; h < valid; ++h)
    for (int v = 0; v < V; ++v) std::memcpy(out + h * D + v * kWidth, &acc[h][v], sizeof(vec));
}

// out[i0:i1, :] = sum_j G(i, j) z_j, with G(i, j) = G[i * row + j * step].
template <class T>
PYCSE_NOINLINE void product(const float* G, int64_t row, int64_t step, const T* z, int64_t ld, int64_t n, int64_t D,
                            int64_t i0, int64_t i1, float* out) {
  constexpr int64_t wide = kVecs * kWidth;
  for (int64_t d = 0; d < D;) {
    const int64_t left = D - d, taken = left >= wide ? wide : left >= kWidth ? kWidth : left;
    for (int64_t i = i0; i < i1; i += kRows) {
      const float* rows[kRows];
      for (int h = 0; h < kRows; ++h) rows[h] = G + std::min(i + h, i1 - 1) * row;
      const int valid = int(std::min<int64_t>(kRows, i1 - i));
      float* o = out + i * D + d;
      if (taken == wide) product_tile<kVecs>(rows, step, z + d, ld, n, o, D, valid);
      else if (taken == kWidth) product_tile<1>(rows, step, z + d, ld, n, o, D, valid);
      else
        for (int h = 0; h < valid; ++h)
          for (int64_t k = 0; k < taken; ++k) {
            float sum = 0;
            for (int64_t j = 0; j < n; ++j) sum += rows[h][j * step] * load(z[j * ld + d + k]);
            o[h * D + k] = sum;
          }
    }
    d += taken;
  }
}

}  // namespace pycse::PYCSE_ISA
