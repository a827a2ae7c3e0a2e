// A whole forward and backward in one call, for batches whose panel fits in cache (there, dispatch costs more than
// arithmetic). The mathematics is that of rows.h and symmetric.h; the three products are small register-tiled ones:
//
//   S   = z1hat z2^T            dot products, kDotRows x kDotCols at a time, no packing
//   dz1 = project(G z2)         kRows rows by kVecs vectors at a time
//   dz2 = project(G^T z1hat)    the same tiles, G read by columns
//
// Rows are shared out among the threads, and as many columns; barriers where a thread needs what others have of them.
#pragma once
#include <algorithm>
#include <cstring>
#include <utility>

#include "norms.h"
#include "symmetric.h"

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

template <class T>
bool small_of(Contrastive p, const Small& q) {
  const int64_t B = p.B, N = p.N, D = q.D;
  const T *z1 = static_cast<const T*>(q.z1), *z2 = static_cast<const T*>(q.z2);
  T *dz1 = static_cast<T*>(q.dz1), *dz2 = static_cast<T*>(q.dz2);
  float* next = q.work;
  const auto take = [&](int64_t n) { return std::exchange(next, next + n); };
  if (q.symmetric) {
    for (void** at : {&p.lpos, &p.lneg, &p.column_max, &p.column_sum, &p.lneg_column}) *at = take(2 * B);
    p.lse_column = take(B);
    float *coef = take(B), *s_pos = take(B);
    if (p.exclude.given) p.s_pos = s_pos;  // columns compare with them
    if (!p.coef) {
      std::fill_n(coef, B, float(p.coef_all));
      p.coef = coef;
    }
    std::fill_n(static_cast<double*>(p.column_max), B, -INFINITY);
    std::fill_n(static_cast<double*>(p.column_sum), B, 0.0);
  }
  float *r1 = take(B), *r2 = take(N), *loss = take(B), *f = take(B), *S = take(B * N);
  float *g1 = next, *g2 = g1 + B * D;
  if constexpr (sizeof(T) == sizeof(float)) g1 = dz1, g2 = dz2;
  p.r2 = r2;
  if (p.loss == nullptr) p.loss = loss;
  const bool grad = dz1 || dz2 || p.dlogit, params = p.dlogit;

  int too_long = 0;
  auto inverse = [&](const T* z) {
    const double r = q.normalize ? inverse_norm(z, D) : 1;
    if (r < 1 / kFar && r != 0) {
#pragma omp atomic write
      too_long = 1;
    }
    return float(r);
  };
  auto project = [&](const T* z, const float* g, float r, float f, bool scaled, T* out) {
    if (q.normalize) return project_row(z, g, D, r, f, scaled, out);
    for (int64_t d = 0; d < D; ++d) store(out[d], f * g[d]);
  };

#pragma omp parallel num_threads(q.threads)
  {
    const int64_t t = thread_index(), T_ = team_size();
    const int64_t i0 = B * t / T_, i1 = B * (t + 1) / T_, j0 = N * t / T_, j1 = N * (t + 1) / T_;
    for (int64_t i = i0; i < i1; ++i) r1[i] = inverse(z1 + i * q.ld1);
    for (int64_t j = j0; j < j1; ++j) r2[j] = inverse(z2 + j * q.ld2);
    similarities(z1, q.ld1, z2, q.ld2, i0, i1, N, D, r1, S);
#pragma omp barrier
    const bool ok = !too_long;
    Bias<float> bias;
    bias.set(float(-p.shift * kLog2e));
    if (p.s_pos) {
      for (int64_t i = i0; i < i1; ++i) static_cast<float*>(p.s_pos)[i] = S[i * N + i] * r2[i];
#pragma omp barrier
    }
    for (int64_t i = i0; ok && i < i1; ++i) {
      float* s = S + i * N;
      if (!grad || q.symmetric) row<false, false, float>(p, Panel(), i, s, bias);
      else if (params) f[i] = row<true, true, float>(p, Panel(), i, s, bias);
      else f[i] = row<true, false, float>(p, Panel(), i, s, bias);
    }
    if (q.symmetric && ok) {  // B = N: this thread has the rows and the columns i0 to i1
      for (int64_t a = i0; a < i1; a += kBlock)
        fold_columns<float>(p, Panel{{S, N, 0, B}}, a, std::min(kBlock, i1 - a));
      for (int64_t i = i0; i < i1; ++i) finish_column<float>(p, i);
#pragma omp barrier
      for (int64_t i = i0; grad && i < i1; ++i) {
        f[i] = 1;
        if (params) symmetric_row<true>(p, i, S + i * N);
        else symmetric_row<false>(p, i, S + i * N);
      }
    }
    if (dz1 && ok) {
      product(S, N, 1, z2, q.ld2, N, D, i0, i1, g1);
      for (int64_t i = i0; i < i1; ++i) project(z1 + i * q.ld1, g1 + i * D, r1[i], f[i], false, dz1 + i * D);
    }
    if (dz2 && ok) {
      for (int64_t i = i0; i < i1; ++i) {  // f z1hat = (f r1) z1
        const float k = r1[i] * f[i];
        for (int64_t j = 0; j < N; ++j) S[i * N + j] *= k;
      }
#pragma omp barrier
      product(S, 1, N, z1, q.ld1, B, D, j0, j1, g2);
      for (int64_t j = j0; j < j1; ++j) project(z2 + j * q.ld2, g2 + j * D, r2[j], 1, true, dz2 + j * D);
    }
  }
  double sum = 0;
  for (int64_t i = 0; i < B; ++i) sum += double(p.coefficient<float>(i)) * static_cast<const float*>(p.loss)[i];
  if (q.total) *q.total = float(sum);
  return !too_long;
}

inline bool small(const Contrastive& p, const Small& q) {
  if (q.dtype == DType::f32) return small_of<float>(p, q);
  return small_of<bf16>(p, q);
}

}  // namespace pycse::PYCSE_ISA
