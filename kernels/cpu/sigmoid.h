// The row kernel of the sigmoid loss: one visit turns a panel of raw products into losses and gradients.
//
// Symbols (kernels/README.md). A panel holds c rows of S_ij = z1hat_i . z2_j; the keys' norms fold in here:
//   s_ij = S_ij r_j                 r_j = 1/|z2_j|
//   x_ij = y_ij (scale s_ij + bias) y = -1 for a positive, 1 for a negative
//   L_i  = sum_j log(1 + exp(x_ij))
// Gradient, complete, written over S:
//   G_ij = P_ij scale r_j           P_ij = coef_i y_ij sigma(x_ij), dLoss/dl of l = scale s + bias
//   dscale_i = sum_j P_ij s_ij,     dbias_i = sum_j P_ij
// With u = exp(-|x|) nothing overflows or cancels: log(1 + exp(x)) = max(x, 0) + log1p(u), sigma(x) = 1/(1 + u), or
// u/(1 + u) below 0.
// Ids: each lane has its y, any number of them positive. One positive a row: its lane is masked (x = -inf adds nothing),
// and it is added in double precision. Stored: nothing but the panel. Memory: O(1) beyond it.
#pragma once
#include <algorithm>

#include "problem.h"
#include "rows.h"
#include "simd.h"

namespace pycse::PYCSE_ISA {

// log(1 + u) for u in [0, 1], with u's relative digits however small it is: 2 w P(w^2), w = u / (2 + u), is the series
// of the inverse hyperbolic tangent; P minimax on [0, 1/9], relative error 4e-9.
PYCSE_INLINE float log1p_(float w) {
  const float v = w * w;
  float y = 2.8178335159e-1f;
  y = y * v + 2.7960603031e-1f;
  y = y * v + 4.0024910231e-1f;
  y = y * v + 6.6666314684e-1f;
  y = y * v + 2.0000000079f;
  return w * y;
}

// log(1 + exp(x)) and sigma(x) of one pair.
template <class A>
struct Softplus {
  A value, sigma;
};
PYCSE_INLINE Softplus<float> softplus(float x) {
  const float u = exp2_(-std::fabs(x) * float(kLog2e));
  const float one = 1 + u, two = 2 + u;
  const float q = 1 / (one * two);  // one division for both quotients
  return {(x > 0 ? x : 0) + log1p_(u * one * q), (x >= 0 ? 1 : u) * two * q};
}
PYCSE_INLINE Softplus<double> softplus(double x) {
  const double u = std::exp(-std::fabs(x));
  return {(x > 0 ? x : 0) + std::log1p(u), (x >= 0 ? 1 : u) / (1 + u)};
}

// Of the keys of a block: y, and what is added to y scale s: y bias, or -inf for one that does not count.
template <class A>
struct alignas(64) Signs {
  A y[kBlock], offset[kBlock];
  A plain_y[kBlock], plain_offset[kBlock];  // negatives everywhere: most blocks
  explicit Signs(A bias) {
    for (int64_t k = 0; k < kBlock; ++k) plain_y[k] = 1, plain_offset[k] = bias;
  }
};

// Those of row i's keys [a, a + n), padded: whether they are the plain ones.
template <class A>
PYCSE_INLINE bool signs_of(const Sigmoid& p, int64_t i, int64_t positive, int64_t a, int64_t n, int64_t padded, A bias,
                           Signs<A>& signs) {
  const bool masked = positive >= a && positive < a + n;
  if (!p.query_ids && n == padded && !masked) return true;
  for (int64_t k = 0; k < padded; ++k) signs.y[k] = 1, signs.offset[k] = bias;
  if (p.query_ids) {
    const int64_t id = p.query_ids[i];
    const int64_t* ids = p.key_ids + a;
    for (int64_t k = 0; k < n; ++k) signs.y[k] = ids[k] == id ? A(-1) : A(1);
    for (int64_t k = 0; k < n; ++k) signs.offset[k] = bias * signs.y[k];
  }
  if (masked) signs.offset[positive - a] = -INFINITY;
  for (int64_t k = n; k < padded; ++k) signs.offset[k] = -INFINITY;
  return false;
}

struct PairSums {
  double loss = 0, P = 0, Ps = 0;  // P in units of coef
};

// Not inlined: see rows.h. factor: coef_i scale.
template <bool Grad, bool Params, class T, class A>
PYCSE_NOINLINE void visit_pairs(T* S, const A* r2, const A* y, const A* offset, int64_t n, A scale, A factor,
                                PairSums& sums) {
  A loss = 0, P = 0, Ps = 0;
#pragma omp simd reduction(+ : loss, P, Ps)
  for (int64_t k = 0; k < n; ++k) {
    const A r = r2[k];
    const A s = A(load(S[k])) * r;
    const auto of = softplus(y[k] * (scale * s) + offset[k]);
    loss += of.value;
    if constexpr (Grad) {
      const A g = y[k] * of.sigma;
      if constexpr (Params) {
        P += g;
        Ps += g * s;
      }
      store(S[k], g * (factor * r));
    }
  }
  sums.loss += loss;
  sums.P += P;
  sums.Ps += Ps;
}

template <bool Grad, bool Params, class T>
PYCSE_INLINE void pairs_of_row(const Sigmoid& p, int64_t i, T* S, Signs<acc_t<T>>& signs) {
  using A = acc_t<T>;
  const A* r2 = static_cast<const A*>(p.r2);
  const A scale = A(p.scale), bias = A(p.bias);
  const double coef = p.coefficient<A>(i);
  const A factor = A(coef * p.scale);
  const int64_t pos = p.query_ids ? -1 : p.positives ? p.positives[i] : i;
  double s_pos = 0;
  if (pos >= 0) s_pos = p.s_pos ? static_cast<const A*>(p.s_pos)[i] : load(S[pos]) * r2[pos];

  PairSums sums;
  const auto visit = [&](T* at, const A* r, int64_t a, int64_t n, int64_t padded) {
    const bool plain = signs_of(p, i, pos, a, n, padded, bias, signs);
    visit_pairs<Grad, Params>(at, r, plain ? signs.plain_y : signs.y, plain ? signs.plain_offset : signs.offset, padded,
                              scale, factor, sums);
  };
  const int64_t whole = p.N / kLane * kLane;
  for (int64_t a = 0; a < whole; a += kBlock) {
    const int64_t n = std::min(kBlock, whole - a);
    visit(S + a, r2 + a, a, n, n);
  }
  if (const int64_t n = p.N - whole; n > 0) {  // padded copies: never run as scalars
    T tail[kLane] = {};
    A r_tail[kLane] = {};
    for (int64_t k = 0; k < n; ++k) tail[k] = S[whole + k], r_tail[k] = r2[whole + k];
    visit(tail, r_tail, whole, n, kLane);
    for (int64_t k = 0; Grad && k < n; ++k) S[whole + k] = tail[k];
  }

  if (pos >= 0) {
    const auto of = softplus(-(p.scale * s_pos + p.bias));
    sums.loss += of.value;
    sums.P -= of.sigma;
    sums.Ps -= of.sigma * s_pos;
    if constexpr (Grad) store(S[pos], A(-of.sigma * factor * r2[pos]));
  }
  static_cast<A*>(p.loss)[i] = A(sums.loss);
  if constexpr (Params) {
    A* d = static_cast<A*>(p.dlogit) + i;
    d[0] = A(coef * sums.Ps);
    d[p.B] = A(coef * sums.P);
  }
}

template <bool Grad, bool Params, class T>
void pairs_of(const Sigmoid& p, const Panel& panel) {
#pragma omp parallel for num_threads(panel.threads) schedule(static)
  for (int t = 0; t < panel.threads; ++t) {
    Signs<acc_t<T>> signs{acc_t<T>(p.bias)};
    const int64_t begin = panel.c * t / panel.threads, end = panel.c * (t + 1) / panel.threads;
    for (int64_t k = begin; k < end; ++k)
      pairs_of_row<Grad, Params, T>(p, panel.i0 + k, static_cast<T*>(panel.S) + k * panel.ld, signs);
  }
}

template <class T>
void pairs_dtype(const Sigmoid& p, const Panel& panel, bool grad) {
  if (!grad) pairs_of<false, false, T>(p, panel);
  else if (p.dlogit) pairs_of<true, true, T>(p, panel);
  else pairs_of<true, false, T>(p, panel);
}

inline void sigmoid_rows(const Sigmoid& p, const Panel& panel, bool grad) {
  switch (panel.dtype) {
    case DType::f32: return pairs_dtype<float>(p, panel, grad);
    case DType::bf16: return pairs_dtype<bf16>(p, panel, grad);
    case DType::f64: return pairs_dtype<double>(p, panel, grad);
  }
}

}  // namespace pycse::PYCSE_ISA
