// The distillation of a small batch in one call: distill.h between register-tiled products (small_products.h).
//
//   T  = sum_k w_k r^k_i r^k_j e^k_i . e^k_j     upper tiles, mirrored; a teacher at a time, so that it stays in L2
//   S  = r_i r_j z_i . z_j                        likewise
//   G  = rows of distill.h
//   dz = project((G + G^T) z)                     both sides of a pair are rows of z: one product
// O(B^2) scratch: the batch is small.
#pragma once
#include "distill.h"
#include "norms.h"
#include "small_products.h"

namespace pycse::PYCSE_ISA {

template <class T>
PYCSE_INLINE const T* row_at(const Vectors& x, int64_t i) {
  return static_cast<const T*>(x.x) + i * x.ld;
}

// 1/|x_i| into r for rows [i0, i1); false where a product of two such rows might overflow.
template <class T>
PYCSE_NOINLINE bool inverse_norms(const Vectors& x, int64_t i0, int64_t i1, bool normalize, float* r) {
  bool ok = true;
  for (int64_t i = i0; i < i1; ++i) {
    const double inverse = normalize ? inverse_norm(row_at<T>(x, i), x.D) : 1;
    ok = ok && !(inverse < 1 / kFar && inverse != 0);
    r[i] = float(inverse);
  }
  return ok;
}

// out += w diag(r) x x^T diag(r) (or =, where first), thread t of n.
template <class T>
PYCSE_NOINLINE void add_gram(const Vectors& x, int64_t B, const float* r, float w, bool first, float* out, int64_t t,
                             int64_t n) {
  for (int64_t i = t * kDotRows; i < B; i += n * kDotRows)
    for (int64_t j = i; j < B; j += kDotCols) {
      const T *a[kDotRows], *b[kDotCols];
      for (int k = 0; k < kDotRows; ++k) a[k] = row_at<T>(x, std::min(i + k, B - 1));
      for (int k = 0; k < kDotCols; ++k) b[k] = row_at<T>(x, std::min(j + k, B - 1));
      float sums[kDotRows][kDotCols];
      dot_tile(a, b, x.D, sums);
      for (int h = 0; h < kDotRows && i + h < B; ++h)
        for (int k = 0; k < kDotCols && j + k < B; ++k) {
          if (j + k < i + h) continue;  // below the diagonal: mirrored
          float& o = out[(i + h) * B + j + k];
          o = (first ? 0 : o) + w * r[i + h] * r[j + k] * sums[h][k];
          out[(j + k) * B + i + h] = o;
        }
    }
}

template <class F>
PYCSE_INLINE bool with_float(DType type, F run) {
  if (type == DType::bf16) return run(bf16());
  return run(float());
}

template <class T>
bool small_distill_of(const Distill& d, const SmallDistill& q) {
  const int64_t B = d.B, D = q.z.D, K = q.teachers;
  float *r = q.work, *r_k = r + B, *S = r_k + K * B, *teachers = S + B * B, *both = teachers + (K > 0 ? B * B : 0);
  T* dz = static_cast<T*>(q.dz);
  float* g = both + B * B;
  if constexpr (sizeof(T) == sizeof(float)) g = dz;
  auto scratch = scratch_of<float>(q.threads, B);
  int too_long = 0;
  const auto check = [&](bool ok) {
    if (!ok) {
#pragma omp atomic write
      too_long = 1;
    }
  };

#pragma omp parallel num_threads(q.threads)
  {
    const int64_t t = thread_index(), n = team_size();
    const int64_t i0 = B * t / n, i1 = B * (t + 1) / n;
    check(inverse_norms<T>(q.z, i0, i1, q.normalize, r));
    for (int64_t k = 0; k < K; ++k)
      check(with_float(q.teacher[k].type,
                       [&](auto e) { return inverse_norms<decltype(e)>(q.teacher[k], i0, i1, true, r_k + k * B); }));
#pragma omp barrier
    add_gram<T>(q.z, B, r, 1, true, S, t, n);
    for (int64_t k = 0; k < K; ++k)
      with_float(q.teacher[k].type, [&](auto e) {
        add_gram<decltype(e)>(q.teacher[k], B, r_k + k * B, float(q.weight[k]), k == 0, teachers, t, n);
        return true;
      });
#pragma omp barrier
    const bool ok = !too_long;
    if (ok) {
      DistillScratch<float>& w = scratch[t];
      for (int64_t i = i0; i < i1; ++i) {
        float* s = S + i * B;
        if (K > 0) distill_row(d, i, s, teachers + i * B, dz != nullptr, w);
        else if (q.logits.type == DType::f64) distill_row(d, i, s, row_at<double>(q.logits, i), dz != nullptr, w);
        else if (q.logits.type == DType::bf16) distill_row(d, i, s, row_at<bf16>(q.logits, i), dz != nullptr, w);
        else distill_row(d, i, s, row_at<float>(q.logits, i), dz != nullptr, w);
      }
    }
#pragma omp barrier
    if (dz && ok) {
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t j = 0; j < B; ++j) both[i * B + j] = (S[i * B + j] + S[j * B + i]) * r[j];
      product(both, B, 1, row_at<T>(q.z, 0), q.z.ld, B, D, i0, i1, g);
      for (int64_t i = i0; i < i1; ++i) {
        if (q.normalize) project_row(row_at<T>(q.z, i), g + i * D, D, r[i], 1.0f, false, dz + i * D);
        else if constexpr (sizeof(T) != sizeof(float))
          for (int64_t k = 0; k < D; ++k) store(dz[i * D + k], g[i * D + k]);
      }
    }
  }
  return !too_long;
}

inline bool small_distill(const Distill& d, const SmallDistill& q) {
  return with_float(q.z.type, [&](auto z) { return small_distill_of<decltype(z)>(d, q); });
}

}  // namespace pycse::PYCSE_ISA
