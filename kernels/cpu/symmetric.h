// The symmetric loss: rows and columns share every similarity.
//
//   L_i  = (row_i + column_i) / 2,   row_i = log(1 + sum_{j != i} exp(l_ij - l_ii)),   column_j likewise over i
//   G_ij = (coef_i exp(l_ij - lse_i) + coef_j exp(l_ij - lse^c_j)) l'_ij r_j / 2         i != j
//   G_ii = -coef_i (sigma(lneg_i - l_ii) + sigma(lneg^c_i - l_ii)) l'_ii r_i / 2
//
// Two sweeps over the panels: rows (no gradient) and columns gather the log-sums lneg, then symmetric writes G.
// Stored between the sweeps: O(N).
#pragma once
#include "rows.h"

namespace pycse::PYCSE_ISA {

// -inf for pairs (i, j) that are no negatives of COLUMN j, else 0; thresholds compare with s_jj.
template <class T, class A>
PYCSE_INLINE void column_bias(const Contrastive& p, int64_t i, const T* S, int64_t a, int64_t n, A* bias) {
  const A minus_inf = -INFINITY;
  const A* r2 = static_cast<const A*>(p.r2) + a;
  for (int64_t k = 0; k < n; ++k) bias[k] = 0;
  if (p.query_ids) {
    const int64_t id = p.query_ids[i];
    for (int64_t k = 0; k < n; ++k) bias[k] = p.key_ids[a + k] == id ? minus_inf : bias[k];
  }
  if (p.exclude) {
    const A* diag = static_cast<const A*>(p.s_diag) + a;
    for (int64_t k = 0; k < n; ++k)
      bias[k] = load(S[k]) * r2[k] > diag[k] + A(p.exclude_above) ? minus_inf : bias[k];
  }
  if (i >= a && i < a + n) bias[i - a] = minus_inf;
}

// Folds the panel's rows into each column's running maximum and sum of exponentials.
template <class T>
void columns_of(const Contrastive& p, const Panel& panel) {
  using A = acc_t<T>;
  const Logit<A> logit = negative_logit<A>(p.focal, A(p.m), A(p.inv_tau));
  const int64_t blocks = (p.N + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(panel.threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t a = block * kBlock, n = std::min(kBlock, p.N - a);
    const A* r2 = static_cast<const A*>(p.r2) + a;
    alignas(64) A bias[kBlock], shift[kBlock], sum[kBlock];
    double* column_max = p.column_max + a;
    double* column_sum = p.column_sum + a;
    auto row_of = [&](int64_t k) { return static_cast<const T*>(panel.S) + k * panel.ld + a; };

    for (int64_t k = 0; k < n; ++k) shift[k] = A(p.fixed_shift ? p.shift : column_max[k]), sum[k] = 0;
    if (!p.fixed_shift)
      for (int64_t c = 0; c < panel.c; ++c) {
        const T* S = row_of(c);
        column_bias(p, panel.i0 + c, S, a, n, bias);
#pragma omp simd
        for (int64_t k = 0; k < n; ++k) {
          A l = logit(load(S[k]) * r2[k]) + bias[k];
          shift[k] = l > shift[k] ? l : shift[k];
        }
      }
    for (int64_t c = 0; c < panel.c; ++c) {
      const T* S = row_of(c);
      column_bias(p, panel.i0 + c, S, a, n, bias);
#pragma omp simd
      for (int64_t k = 0; k < n; ++k) sum[k] += exp_(logit(load(S[k]) * r2[k]) + bias[k] - shift[k]);
    }
    for (int64_t k = 0; k < n; ++k) {
      if (shift[k] == -INFINITY) continue;  // no negative yet
      double old = column_sum[k];
      column_sum[k] = (old == 0 ? 0 : old * std::exp(column_max[k] - double(shift[k]))) + double(sum[k]);
      column_max[k] = double(shift[k]);
    }
  }
}

inline void columns(const Contrastive& p, const Panel& panel) {
  switch (panel.dtype) {
    case DType::f32: return columns_of<float>(p, panel);
    case DType::bf16: return columns_of<bf16>(p, panel);
    case DType::f64: return columns_of<double>(p, panel);
  }
}

PYCSE_INLINE double log_add(double x, double y) {
  double top = x > y ? x : y;
  return top == -INFINITY ? top : top + std::log1p(std::exp((x > y ? y : x) - top));
}
PYCSE_INLINE double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

template <bool Params, class T>
void symmetric_of(const Contrastive& p, const Panel& panel) {
  using A = acc_t<T>;
  const Logit<A> logit = negative_logit<A>(p.focal, A(p.m), A(p.inv_tau));
  const Logit<A> logit_pos = positive_logit<A>(p.focal, A(p.inv_tau));
  const A* r2 = static_cast<const A*>(p.r2);
  const A* coef = static_cast<const A*>(p.coef);
  const A* lse_column = static_cast<const A*>(p.lse_column);
#pragma omp parallel for num_threads(panel.threads) schedule(static)
  for (int64_t c = 0; c < panel.c; ++c) {
    const int64_t i = panel.i0 + c;
    T* S = static_cast<T*>(panel.S) + c * panel.ld;
    Bias<A> row_bias;
    alignas(64) A col_bias[kBlock];
    const A s_pos = load(S[i]) * r2[i];
    const double l_pos = p.lpos[i];
    const A lse = A(log_add(p.lneg[i], l_pos)), threshold = s_pos + A(p.exclude_above);
    double el = 0, es = 0;
    for (int64_t a = 0; a < p.N; a += kBlock) {
      const int64_t n = std::min(kBlock, p.N - a);
      T* s_block = S + a;
      const A* bias = bias_of(p, i, i, s_block, r2 + a, threshold, a, n, n, row_bias);
      column_bias(p, i, s_block, a, n, col_bias);
      const A half = A(0.5), coef_i = coef[i], *coef_j = coef + a, *lse_j = lse_column + a;
      A sum_l = 0, sum_s = 0;
#pragma omp simd reduction(+ : sum_l, sum_s)
      for (int64_t k = 0; k < n; ++k) {
        A s = load(s_block[k]) * r2[a + k];
        A l = logit(s);
        A P = half * (coef_i * exp_(l + bias[k] - lse) + coef_j[k] * exp_(l + col_bias[k] - lse_j[k]));
        if constexpr (Params) {
          sum_l += P * l;
          sum_s += P * s;
        }
        store(s_block[k], P * logit.slope(s) * r2[a + k] * logit.inv_tau);
      }
      el += sum_l;
      es += sum_s;
    }
    const double P_pos = -0.5 * double(coef[i]) * (sigmoid(p.lneg[i] - l_pos) + sigmoid(p.lneg_column[i] - l_pos));
    store(S[i], A(P_pos * p.inv_tau * double(logit_pos.slope(s_pos)) * double(r2[i])));
    if (p.dtau) static_cast<A*>(p.dtau)[i] = A(-p.inv_tau * (el + P_pos * l_pos));
    if (p.dm) static_cast<A*>(p.dm)[i] = A(p.inv_tau * es);
  }
}

template <class T>
void symmetric_dtype(const Contrastive& p, const Panel& panel) {
  if (p.dtau || p.dm) symmetric_of<true, T>(p, panel);
  else symmetric_of<false, T>(p, panel);
}

inline void symmetric(const Contrastive& p, const Panel& panel) {
  switch (panel.dtype) {
    case DType::f32: return symmetric_dtype<float>(p, panel);
    case DType::bf16: return symmetric_dtype<bf16>(p, panel);
    case DType::f64: return symmetric_dtype<double>(p, panel);
  }
}

}  // namespace pycse::PYCSE_ISA
