// Normalisation and its gradient, and the positives' similarities. The threads of a warp share a row.
//
//   r_i = 1 / |z_i|  (0 where |z_i| <= 1e-12),   zhat_i = r_i z_i, or factor times that
//   dz_i = k_i (g_i - zhat_i <zhat_i, g_i>)      g = dL/dzhat in units of f (1 where null) and k = r f;
//                                                or g already carries r (scaled) and k = f
//   s_i,pos = (z1hat_i . z2_pos) r_pos
// Traffic: the second visit of a row finds it in L1.
#pragma once
#include "rows.h"

namespace pycse::cuda {

constexpr double kTinyNorm = 1e-12;

template <class T>
PYCSE_BODY const T* row_of(const Vectors& z, int64_t i) {
  return static_cast<const T*>(z.z) + i * z.ld;
}

template <class A> constexpr A kLargeSquare = A(1e30);
template <> constexpr double kLargeSquare<double> = 1e300;
template <class A> constexpr A kShrink = A(0x1p-100);
template <> constexpr double kShrink<double> = 0x1p-600;

// 1/|z|, 0 where |z| <= 1e-12; also where the square, or the norm itself, leaves the accumulation type's range. (A norm
// whose square underflows is below kTinyNorm.)
template <class T, class Block>
PYCSE_BODY acc_t<T> inverse_norm(Block block, const T* z, int D, int head) {
  using A = acc_t<T>;
  const auto square_of = [&](A scale) {
    A square = 0;
    each<kWidth<T>>(block, D, head, [&](int d, auto width) {
      constexpr int W = decltype(width)::value;
      A x[W];
      read<W>(z + d, true, x);
      for (int n = 0; n < W; ++n) square += (x[n] * scale) * (x[n] * scale);
    });
    return block.sum(square);
  };
  const A square = square_of(1);
  if (square > kLargeSquare<A>) return kShrink<A> / sqrt(square_of(kShrink<A>));
  return square <= A(kTinyNorm) * A(kTinyNorm) ? A(0) : 1 / sqrt(square);
}

// r = 1/|z|, and with `out` also factor zhat in z's own type.
template <class T, class Block>
PYCSE_BODY void normalize_row(Block block, const Vectors& vectors, int i, void* r, void* out, int64_t ld_out,
                              double factor) {
  using A = acc_t<T>;
  const T* z = row_of<T>(vectors, i);
  const A r_i = inverse_norm(block, z, vectors.D, head_of(z));
  if (r && block.index() == 0) static_cast<A*>(r)[i] = r_i;
  if (!out) return;
  T* zhat = static_cast<T*>(out) + i * ld_out;
  const A scale = r_i * A(factor);
  each<kWidth<T>>(block, vectors.D, aligned(z) && aligned(zhat) ? 0 : vectors.D, [&](int d, auto width) {
    constexpr int W = decltype(width)::value;
    A x[W];
    read<W>(z + d, true, x);
    for (int n = 0; n < W; ++n) x[n] *= scale;
    write<W>(zhat + d, true, x);
  });
}

// out may be g: each element is read and then written by one thread.
template <class T, class G, class Block>
PYCSE_BODY void project_row(Block block, const Vectors& vectors, int i, const void* g_, const void* r, const void* f,
                            bool scaled, void* out_) {
  using A = acc_t<T>;
  constexpr int V = kWidth<T>;
  const int D = vectors.D;
  const T* z = row_of<T>(vectors, i);
  const G* g = static_cast<const G*>(g_) + int64_t(i) * D;
  T* out = static_cast<T*>(out_) + int64_t(i) * D;
  const A r_i = static_cast<const A*>(r)[i], f_i = f ? static_cast<const A*>(f)[i] : A(1),
          factor = scaled ? A(r_i != 0) : r_i;  // last: f may be as small as r is
  const int head = aligned(z) && aligned(g) && aligned(out) ? 0 : D;

  A along = 0;
  each<V>(block, D, head, [&](int d, auto width) {
    constexpr int W = decltype(width)::value;
    A x[W], y[W];
    read<W>(z + d, true, x);
    read<W>(g + d, true, y);
    for (int n = 0; n < W; ++n) along += (r_i * x[n]) * y[n];
  });
  along = block.sum(along);
  each<V>(block, D, head, [&](int d, auto width) {
    constexpr int W = decltype(width)::value;
    A x[W], y[W];
    read<W>(z + d, true, x);
    read<W>(g + d, true, y);
    for (int n = 0; n < W; ++n) x[n] = factor * (f_i * (y[n] - along * (r_i * x[n])));
    write<W>(out + d, true, x);
  });
}

// s_pos of row i0 + k, whose embedding is row k of z1hat; NaN where positives[i] is no key.
template <class T, class Block>
PYCSE_BODY void positive_row(Block block, const Contrastive& p, const Vectors& z1hat, const Vectors& z2, int i0,
                             int k) {
  using A = acc_t<T>;
  const int i = i0 + k, positive = positive_of(p, i);
  A s = nan<A>();
  if (positive >= 0) {
    const T *a = row_of<T>(z1hat, k), *b = row_of<T>(z2, positive);
    s = 0;
    each<kWidth<T>>(block, z2.D, aligned(a) && aligned(b) ? 0 : z2.D, [&](int d, auto width) {
      constexpr int W = decltype(width)::value;
      A x[W], y[W];
      read<W>(a + d, true, x);
      read<W>(b + d, true, y);
      for (int n = 0; n < W; ++n) s += x[n] * y[n];
    });
    s = block.sum(s) * static_cast<const A*>(p.r2)[positive];
  }
  if (block.index() == 0) static_cast<A*>(p.s_pos)[i] = s;
}

template <class Run>
void project_variant(DType z_type, DType g_type, Run run) {
  if (z_type == DType::f64) return run(double(), double());
  if (z_type == DType::f32) return run(float(), float());
  if (g_type == DType::f32) return run(bf16(), float());
  return run(bf16(), bf16());
}

}  // namespace pycse::cuda
