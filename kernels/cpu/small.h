// A whole forward and backward in one call, for batches whose panel fits in cache (there, dispatch costs more than
// arithmetic). The mathematics is that of rows.h and symmetric.h; the three products are those of small_products.h:
//
//   S   = z1hat z2^T
//   dz1 = project(G z2)
//   dz2 = project(G^T z1hat)
//
// Rows are shared out among the threads, and as many columns; barriers where a thread needs what others have of them.
#pragma once
#include <algorithm>
#include <utility>

#include "norms.h"
#include "small_products.h"
#include "symmetric.h"

namespace pycse::PYCSE_ISA {

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
