// A whole forward and backward of a loss at several lengths in one call, for batches whose panels fit in cache. The
// mathematics is that of prefixes.h, the products those of small_products.h; rows and keys are as they come, so norms
// are those of prefixes themselves. With S^k the raw products of the first d_k features, b the features from d_{b-1} to
// d_b, and f^k_i, the row's factor, known when its row is complete:
//
//   S^k     = S^{k-1} + z1[:, k] z2[:, k]^T,      s^k_ij = r1^k_i r2^k_j S^k_ij
//   G^k_ij  = f^k_i r1^k_i r2^k_j dL^k/ds^k_ij     dL/dS^k, from row() of rows.h
//   H^b     = sum_{k >= b} G^k,                    t^k_i = sum_j G^k_ij S^k_ij,  c^k_j = sum_i of the same
//   dz1[:, b] = H^b z2[:, b]   - z1[:, b] sum_{k >= b} (r1^k)^2 t^k
//   dz2[:, b] = H^b^T z1[:, b] - z2[:, b] sum_{k >= b} (r2^k)^2 c^k
//
// Stored: S^k (then its products with G^k) and G^k (then H^k), 2 K B N floats.
#pragma once
#include <algorithm>
#include <utility>

#include "norms.h"
#include "rows.h"
#include "small_products.h"

namespace pycse::PYCSE_ISA {

// One row at one length: its loss, G^k over `s` and G^k S^k over `raw`; returns t^k.
template <bool Grad, bool Params>
PYCSE_NOINLINE float small_prefix(const Contrastive& p, int64_t i, float r, Bias<float>& bias, float* raw, float* s) {
  for (int64_t j = 0; j < p.N; ++j) s[j] = raw[j] * r;
  const float f = row<Grad, Params, float>(p, Panel(), i, s, bias) * r;
  float t = 0;
  if (Grad)
    for (int64_t j = 0; j < p.N; ++j) {
      s[j] *= f;
      raw[j] *= s[j];
      t += raw[j];
    }
  return t;
}

template <class T>
bool small_prefixes_of(const Prefixes& p, const int64_t* dims, const Small& q) {
  const int K = p.lengths;
  const int64_t B = p.of[0]->B, N = p.of[0]->N, D = q.D, longest = dims[K - 1];
  const T *z1 = static_cast<const T*>(q.z1), *z2 = static_cast<const T*>(q.z2);
  T *dz1 = static_cast<T*>(q.dz1), *dz2 = static_cast<T*>(q.dz2);
  float* next = q.work;
  const auto take = [&](int64_t n) { return std::exchange(next, next + n); };
  float *ones = take(B), *r1 = take(K * B), *r2 = take(K * N), *t1 = take(K * B), *t2 = take(K * N);
  float *S = take(K * B * N), *G = take(K * B * N), *g1 = take(B * longest), *g2 = take(N * longest);
  const bool params = p.of[0]->dlogit, grad = dz1 || dz2 || params;
  Contrastive of[kMostLengths];
  for (int k = 0; k < K; ++k) of[k] = *p.of[k], of[k].r2 = r2 + k * N;

  int too_long = 0;
  auto inverse = [&](const T* z, int64_t d) {
    const double r = q.normalize ? inverse_norm(z, d) : 1;
    if (r < 1 / kFar && r != 0) {
#pragma omp atomic write
      too_long = 1;
    }
    return float(r);
  };
  // sums_k becomes sum_{k' >= k} r_k'^2 sums_k', 0 where nothing is normalised.
  auto of_norms = [&](const float* r, float* sums, int64_t step) {
    float total = 0;
    for (int k = K - 1; k >= 0; --k)
      sums[k * step] = total += q.normalize ? sums[k * step] * r[k * step] * r[k * step] : 0;
  };
  auto project = [&](const T* z, const float* g, float t, int64_t width, T* out) {
    for (int64_t d = 0; d < width; ++d) store(out[d], g[d] - t * load(z[d]));
  };

#pragma omp parallel num_threads(q.threads)
  {
    const int64_t t = thread_index(), T_ = team_size();
    const int64_t i0 = B * t / T_, i1 = B * (t + 1) / T_, j0 = N * t / T_, j1 = N * (t + 1) / T_;
    for (int64_t i = i0; i < i1; ++i) ones[i] = 1;
    for (int k = 0; k < K; ++k) {
      const int64_t from = k ? dims[k - 1] : 0;
      for (int64_t i = i0; i < i1; ++i) r1[k * B + i] = inverse(z1 + i * q.ld1, dims[k]);
      for (int64_t j = j0; j < j1; ++j) r2[k * N + j] = inverse(z2 + j * q.ld2, dims[k]);
      float* panel = S + k * B * N;
      similarities(z1 + from, q.ld1, z2 + from, q.ld2, i0, i1, N, dims[k] - from, ones, panel);
      for (int64_t x = i0 * N; k && x < i1 * N; ++x) panel[x] += panel[x - B * N];
    }
#pragma omp barrier
    const bool ok = !too_long;
    Bias<float> bias;
    for (int k = 0; k < K && ok; ++k) {
      bias.set(float(-of[k].shift * kLog2e));
      for (int64_t i = i0; i < i1; ++i) {
        float *raw = S + (k * B + i) * N, *s = G + (k * B + i) * N;
        const float r = r1[k * B + i];
        if (!grad) small_prefix<false, false>(of[k], i, r, bias, raw, s);
        else if (params) t1[k * B + i] = small_prefix<true, true>(of[k], i, r, bias, raw, s);
        else t1[k * B + i] = small_prefix<true, false>(of[k], i, r, bias, raw, s);
      }
    }
    for (int k = K - 2; k >= 0 && grad && ok; --k)
      for (int64_t x = (k * B + i0) * N; x < (k * B + i1) * N; ++x) G[x] += G[x + B * N];
    if (dz1 && ok) {
      for (int64_t i = i0; i < i1; ++i) {
        of_norms(r1 + i, t1 + i, B);
        std::fill(dz1 + i * D + longest, dz1 + (i + 1) * D, T{});
      }
      for (int k = 0; k < K; ++k) {
        const int64_t from = k ? dims[k - 1] : 0, width = dims[k] - from;
        float* g = g1 + B * from;
        product(G + k * B * N, N, 1, z2 + from, q.ld2, N, width, i0, i1, g);
        for (int64_t i = i0; i < i1; ++i)
          project(z1 + i * q.ld1 + from, g + i * width, t1[k * B + i], width, dz1 + i * D + from);
      }
    }
    if (dz2 && ok) {
#pragma omp barrier
      for (int k = 0; k < K; ++k) {
        float* sums = t2 + k * N;
        std::fill(sums + j0, sums + j1, 0.f);
        for (int64_t i = 0; i < B; ++i)
          for (int64_t j = j0; j < j1; ++j) sums[j] += S[(k * B + i) * N + j];
      }
      for (int64_t j = j0; j < j1; ++j) {
        of_norms(r2 + j, t2 + j, N);
        std::fill(dz2 + j * D + longest, dz2 + (j + 1) * D, T{});
      }
      for (int k = 0; k < K; ++k) {
        const int64_t from = k ? dims[k - 1] : 0, width = dims[k] - from;
        float* g = g2 + N * from;
        product(G + k * B * N, 1, N, z1 + from, q.ld1, B, width, j0, j1, g);
        for (int64_t j = j0; j < j1; ++j)
          project(z2 + j * q.ld2 + from, g + j * width, t2[k * N + j], width, dz2 + j * D + from);
      }
    }
  }
  return !too_long;
}

inline bool small_prefixes(const Prefixes& p, const int64_t* dims, const Small& q) {
  if (q.dtype == DType::f32) return small_prefixes_of<float>(p, dims, q);
  return small_prefixes_of<bf16>(p, dims, q);
}

}  // namespace pycse::PYCSE_ISA
