// Uniformity, the row kernel: similarities to exponentials of distances.
//
//   E_kj = 2^(u S_kj + bias_k + bias_j), 0 at j = k     exp(-t |zhat_k - zhat_j|^2) times a constant; u = 2 t / log 2
//   sums_k = sum_{j < c} E_kj + 2 sum_{j >= c} E_kj     keys behind the panel's c rows stand for their mirror images
// Panel: rows [i0, i0 + c), keys [i0, i0 + n). Stored: sums; E over S with grad. Memory: nothing beyond the panel.
#pragma once
#include "problem.h"
#include "simd.h"

namespace pycse::PYCSE_ISA {

// S becomes E = 2^(u S + bias + own) with grad; returns its sum.
template <bool Grad, class T, class A>
PYCSE_NOINLINE double exponentials_of(T* S, const A* bias, A own, A u, int64_t n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < n; ++k) {
    const A e = exp2_(u * A(load(S[k])) + (bias[k] + own));
    sum += e;
    if constexpr (Grad) store(S[k], e);
  }
  return double(sum);
}

template <bool Grad, class T>
void uniformity_panel(const Uniformity& p, const Panel& panel, int64_t n) {
  using A = acc_t<T>;
  const A* bias = static_cast<const A*>(p.bias) + panel.i0;
  const A u = A(p.u);
#pragma omp parallel for num_threads(panel.threads) schedule(static)
  for (int64_t k = 0; k < panel.c; ++k) {
    T* S = static_cast<T*>(panel.S) + k * panel.ld;
    double sum = exponentials_of<Grad>(S, bias, bias[k], u, k);
    sum += exponentials_of<Grad>(S + k + 1, bias + k + 1, bias[k], u, panel.c - k - 1);
    sum += 2 * exponentials_of<Grad>(S + panel.c, bias + panel.c, bias[k], u, n - panel.c);
    if constexpr (Grad) store(S[k], A(0));
    static_cast<A*>(p.sums)[panel.i0 + k] = A(sum);
  }
}

template <class T>
void uniformity_dtype(const Uniformity& p, const Panel& panel, int64_t n, bool grad) {
  if (grad) return uniformity_panel<true, T>(p, panel, n);
  uniformity_panel<false, T>(p, panel, n);
}

inline void uniformity(const Uniformity& p, const Panel& panel, int64_t n, bool grad) {
  switch (panel.dtype) {
    case DType::f32: return uniformity_dtype<float>(p, panel, n, grad);
    case DType::bf16: return uniformity_dtype<bf16>(p, panel, n, grad);
    case DType::f64: return uniformity_dtype<double>(p, panel, n, grad);
  }
}

}  // namespace pycse::PYCSE_ISA
