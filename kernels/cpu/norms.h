// Normalisation and its gradient, one visit each.
//
//   r_i = 1 / |z_i|  (0 where |z_i| <= 1e-12),   zhat_i = r_i z_i
//   dz_i = k_i (g_i - zhat_i <zhat_i, g_i>)      g = dL/dzhat in units of f (1 where null) and k = r f;
//                                                or g already carries r (scaled) and k = f
#pragma once
#include <algorithm>

#include "problem.h"
#include "simd.h"
#include "threads.h"

namespace pycse::PYCSE_ISA {

constexpr double kTinyNorm = 1e-12;
constexpr double kFar = 1e12;  // longer keys are normalised before a product, which may overflow

template <class T, class U>
PYCSE_INLINE acc_t<T> dot(const T* x, const U* y, int64_t D) {
  acc_t<T> sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < D; ++k) sum += load(x[k]) * acc_t<T>(load(y[k]));
  return sum;
}

// 1/|z|, 0 where |z| <= 1e-12; also where the square, or the norm itself, leaves the type's range.
template <class T>
PYCSE_INLINE double inverse_norm(const T* z, int64_t D) {
  const double square = dot(z, z, D);
  if (square > 1e-23 && square < 1e30) return 1 / std::sqrt(square);
  double largest = 0, scaled = 0;
  for (int64_t k = 0; k < D; ++k) largest = std::max(largest, std::abs(double(load(z[k]))));
  if (std::isnan(square) || std::isinf(largest)) return NAN;
  if (largest == 0) return 0;
  for (int64_t k = 0; k < D; ++k) {
    const double x = double(load(z[k])) / largest;
    scaled += x * x;
  }
  scaled = std::sqrt(scaled);
  return largest * scaled <= kTinyNorm ? 0 : 1 / largest / scaled;
}

// r = 1/|z|, and with `out` also factor zhat in z's own type. Returns whether a row is longer than kFar.
template <class T>
bool normalize_of(const void* z, int64_t ld, int64_t n, int64_t D, void* r, void* out, int64_t ld_out, double factor,
                  int threads) {
  using A = acc_t<T>;
  int far = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : far)
  for (int64_t i = 0; i < n; ++i) {
    const T* zi = static_cast<const T*>(z) + i * ld;
    const double ri = inverse_norm(zi, D);
    const bool far_i = ri < 1 / kFar && ri != 0;
    far |= far_i;
    if (r) static_cast<A*>(r)[i] = A(ri);
    if (!out) continue;
    T* oi = static_cast<T*>(out) + i * ld_out;
    if (far_i)  // its inverse may be too small for A
      for (int64_t k = 0; k < D; ++k) store(oi[k], A(double(load(zi[k])) * ri * factor));
    else
      for (int64_t k = 0; k < D; ++k) store(oi[k], load(zi[k]) * (A(ri) * A(factor)));
  }
  return far != 0;
}

inline bool normalize(DType dtype, const void* z, int64_t ld, int64_t n, int64_t D, void* r, void* out, int64_t ld_out,
                      double factor, int threads) {
  switch (dtype) {
    case DType::f32: return normalize_of<float>(z, ld, n, D, r, out, ld_out, factor, threads);
    case DType::bf16: return normalize_of<bf16>(z, ld, n, D, r, out, ld_out, factor, threads);
    case DType::f64: return normalize_of<double>(z, ld, n, D, r, out, ld_out, factor, threads);
  }
  return false;
}

template <class T>
void positives_of(const Contrastive& p, const void* z1hat, int64_t ld1, const void* z2, int64_t ld2, int64_t D,
                  int64_t i0, int64_t n, int threads) {
  using A = acc_t<T>;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t k = 0; k < n; ++k) {
    const int64_t i = i0 + k, j = p.positives ? p.positives[i] : i;
    static_cast<A*>(p.s_pos)[i] = dot(static_cast<const T*>(z1hat) + k * ld1, static_cast<const T*>(z2) + j * ld2, D) *
                                  static_cast<const A*>(p.r2)[j];
  }
}

inline void positives(const Contrastive& p, DType dtype, const void* z1hat, int64_t ld1, const void* z2, int64_t ld2,
                      int64_t D, int64_t i0, int64_t n, int threads) {
  switch (dtype) {
    case DType::f32: return positives_of<float>(p, z1hat, ld1, z2, ld2, D, i0, n, threads);
    case DType::bf16: return positives_of<bf16>(p, z1hat, ld1, z2, ld2, D, i0, n, threads);
    case DType::f64: return positives_of<double>(p, z1hat, ld1, z2, ld2, D, i0, n, threads);
  }
}

template <class T, class G>
PYCSE_INLINE void project_row(const T* z, const G* g, int64_t D, acc_t<T> r, acc_t<T> f, bool scaled, T* out) {
  using A = acc_t<T>;
  const A k = scaled ? A(r != 0) : r;  // last: f may be as small as r is
  A along = 0;  // of zhat: g in units of f reaches 2^64, and z g may overflow
#pragma omp simd reduction(+ : along)
  for (int64_t d = 0; d < D; ++d) along += (r * load(z[d])) * A(load(g[d]));
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) store(out[d], k * (f * (A(load(g[d])) - along * (r * load(z[d])))));
}

// Rows of g [i, i + n) into buffer (n, D), where g is stored transposed: g_id at g[d * ld + i]. Whole cache lines at a
// time.
constexpr int64_t kTransposed = 32;
template <class G, class A>
PYCSE_NOINLINE void gather_rows(const G* g, int64_t ld, int64_t i, int64_t n, int64_t D, A* buffer) {
  for (int64_t d = 0; d < D; ++d)
    for (int64_t k = 0; k < n; ++k) buffer[k * D + d] = A(load(g[d * ld + i + k]));
}

// g_ld: 0 where g is (n, D) contiguous, else the leading dimension of the transposed (D, n).
template <class T, class G>
void project_of(const void* z, int64_t ld, const void* g_, int64_t g_ld, int64_t n, int64_t D, const void* r_,
                const void* f_, bool scaled, void* out, int threads) {
  using A = acc_t<T>;
  const G* g = static_cast<const G*>(g_);
  const A* r = static_cast<const A*>(r_);
  auto fi = [&](int64_t i) { return f_ ? static_cast<const A*>(f_)[i] : A(1); };
  auto zi = [&](int64_t i) { return static_cast<const T*>(z) + i * ld; };
  auto oi = [&](int64_t i) { return static_cast<T*>(out) + i * D; };
  if (g_ld == 0) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; ++i) project_row(zi(i), g + i * D, D, r[i], fi(i), scaled, oi(i));
    return;
  }
  const Scratch<A> buffers(threads * kTransposed * D);
#pragma omp parallel num_threads(threads)
  {
    A* buffer = buffers.get() + thread_index() * kTransposed * D;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; i += kTransposed) {
      const int64_t rows = n - i < kTransposed ? n - i : kTransposed;
      gather_rows(g, g_ld, i, rows, D, buffer);
      for (int64_t k = 0; k < rows; ++k)
        project_row(zi(i + k), buffer + k * D, D, r[i + k], fi(i + k), scaled, oi(i + k));
    }
  }
}

inline void project(DType z_type, DType g_type, const void* z, int64_t ld, const void* g, int64_t g_ld, int64_t n,
                    int64_t D, const void* r, const void* f, bool scaled, void* out, int threads) {
  auto run = [&](auto body) { body(z, ld, g, g_ld, n, D, r, f, scaled, out, threads); };
  if (z_type == DType::f64) return run(project_of<double, double>);
  if (z_type == DType::f32) return run(project_of<float, float>);
  if (g_type == DType::f32) return run(project_of<bf16, float>);
  return run(project_of<bf16, bf16>);
}

}  // namespace pycse::PYCSE_ISA
