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

// bias[k] for the pairs (i, a + k): -inf where i is no negative of COLUMN a + k (thresholds compare with s_jj), else
// offset[k], minus the column's shift in bits.
template <class T, class A>
PYCSE_NOINLINE void column_bias(const Contrastive& p, int64_t i, const T* S, int64_t a, int64_t n, const A* offset,
                                A* bias) {
  const A minus_inf = -INFINITY;
  const A* r2 = static_cast<const A*>(p.r2) + a;
  for (int64_t k = 0; k < n; ++k) bias[k] = offset[k];
  if (p.query_ids) {
    const int64_t id = p.query_ids[i];
    for (int64_t k = 0; k < n; ++k) bias[k] = p.key_ids[a + k] == id ? minus_inf : bias[k];
  }
  if (p.exclude.given) {
    const A* diag = static_cast<const A*>(p.s_pos) + a;
    for (int64_t k = 0; k < n; ++k) bias[k] = load(S[k]) * r2[k] > p.exclude.of(a + k, diag[k]) ? minus_inf : bias[k];
  }
  if (i >= a && i < a + n) bias[i - a] = minus_inf;
}

template <class T, class A>
PYCSE_NOINLINE void column_tops(const T* S, const A* r2, const A* bias, int64_t n, Bits<A> bits, A* top) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    A s = load(S[k]) * r2[k];
    A x = (bits.u * s + bits.v) * s + bias[k];
    top[k] = x <= top[k] || top[k] != top[k] ? top[k] : x;  // NaN stays: it is a negative too
  }
}

template <class T, class A>
PYCSE_NOINLINE void column_sums(const T* S, const A* r2, const A* bias, int64_t n, Bits<A> bits, A* sum) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    A s = load(S[k]) * r2[k];
    sum[k] += exp2_((bits.u * s + bits.v) * s + bias[k]);
  }
}

// Folds the panel's rows into the running maximum (in bits) and sum of exponentials of the columns [a, a + n), n <=
// kBlock.
template <class T>
void fold_columns(const Contrastive& p, const Panel& panel, int64_t a, int64_t n) {
  using A = acc_t<T>;
  const Bits<A> bits(p.logit.logit<A>());
  const A* r2 = static_cast<const A*>(p.r2) + a;
  alignas(64) A bias[kBlock], offset[kBlock] = {}, top[kBlock], sum[kBlock] = {};
  double* column_max = static_cast<double*>(p.column_max) + a;
  double* column_sum = static_cast<double*>(p.column_sum) + a;
  auto row_of = [&](int64_t c) { return static_cast<const T*>(panel.S) + c * panel.ld + a; };

  for (int64_t k = 0; k < n; ++k) top[k] = A(p.fixed_shift ? p.shift * kLog2e : column_max[k]);
  if (!p.fixed_shift)
    for (int64_t c = 0; c < panel.c; ++c) {
      column_bias(p, panel.i0 + c, row_of(c), a, n, offset, bias);
      column_tops(row_of(c), r2, bias, n, bits, top);
    }
  for (int64_t k = 0; k < n; ++k) offset[k] = top[k] == -INFINITY ? A(0) : -top[k];
  for (int64_t c = 0; c < panel.c; ++c) {
    column_bias(p, panel.i0 + c, row_of(c), a, n, offset, bias);
    column_sums(row_of(c), r2, bias, n, bits, sum);
  }
  for (int64_t k = 0; k < n; ++k) {
    if (top[k] == -INFINITY) continue;  // no negative yet
    const double old = column_sum[k];
    column_sum[k] = (old == 0 ? 0 : old * std::exp2(column_max[k] - double(top[k]))) + double(sum[k]);
    column_max[k] = double(top[k]);
  }
}

template <class T>
void columns_of(const Contrastive& p, const Panel& panel) {
#pragma omp parallel for num_threads(panel.threads) schedule(static)
  for (int64_t a = 0; a < p.N; a += kBlock) fold_columns<T>(p, panel, a, std::min(kBlock, p.N - a));
}

inline void columns(const Contrastive& p, const Panel& panel) {
  switch (panel.dtype) {
    case DType::f32: return columns_of<float>(p, panel);
    case DType::bf16: return columns_of<bf16>(p, panel);
    case DType::f64: return columns_of<double>(p, panel);
  }
}

// Column j's log-sums, and the loss of row j, which had the row's share so far.
template <class A>
void finish_column(const Contrastive& p, int64_t j) {
  const double sum = static_cast<const double*>(p.column_sum)[j], top = static_cast<const double*>(p.column_max)[j];
  const double l_neg = sum == 0 ? -INFINITY : (std::log2(sum) + top) * kLn2;
  const double l_pos = static_cast<const double*>(p.lpos)[j];
  static_cast<double*>(p.lneg_column)[j] = l_neg;
  static_cast<A*>(p.lse_column)[j] = A(log_add(l_neg, l_pos));
  A& loss = static_cast<A*>(p.loss)[j];
  loss = A((double(loss) + log_add(l_neg - l_pos, 0.0)) / 2);
}

// 2^x where only the rounding of a log-sum makes x positive.
template <class A>
PYCSE_INLINE A probability(A x) {
  return exp2_(x > 0 ? A(0) : x);
}

// One block of a row: S -> G. Returns sum P s^2 and sum P s through the last two arguments, P = dLoss/dl.
template <bool Params, class T, class A>
PYCSE_NOINLINE void symmetric_block(T* S, const A* r2, const A* row_bias, const A* column_bias, int64_t n,
                                    Logit<A> logit, Bits<A> bits, A coef_i, const A* coef_j, double& Pss, double& Ps) {
  A sum_ss = 0, sum_s = 0;
#pragma omp simd reduction(+ : sum_ss, sum_s)
  for (int64_t k = 0; k < n; ++k) {
    A s = load(S[k]) * r2[k];
    A x = (bits.u * s + bits.v) * s;
    A P = A(0.5) * (coef_i * probability(x + row_bias[k]) + coef_j[k] * probability(x + column_bias[k]));
    if constexpr (Params) {
      sum_ss += P * s * s;
      sum_s += P * s;
    }
    store(S[k], P * logit.derivative(s) * r2[k]);
  }
  Pss += sum_ss;
  Ps += sum_s;
}

// Row i: S -> G, complete.
template <bool Params, class T>
void symmetric_row(const Contrastive& p, int64_t i, T* S) {
  using A = acc_t<T>;
  const Logit<A> logit = p.logit.logit<A>();
  const Bits<A> bits(logit);
  const A* r2 = static_cast<const A*>(p.r2);
  const A* coef = static_cast<const A*>(p.coef);
  const A* lse_column = static_cast<const A*>(p.lse_column);
  Bias<A> row_bias;
  alignas(64) A offset[kBlock], bias[kBlock];
  const A s_pos = p.s_pos ? static_cast<const A*>(p.s_pos)[i] : load(S[i]) * r2[i];
  const double l_pos = static_cast<const double*>(p.lpos)[i], l_neg = static_cast<const double*>(p.lneg)[i];
  const double l_neg_column = static_cast<const double*>(p.lneg_column)[i];
  row_bias.set(A(-log_add(l_neg, l_pos) * kLog2e));
  double Pss = 0, Ps = 0;
  for (int64_t a = 0; a < p.N; a += kBlock) {
    const int64_t n = std::min(kBlock, p.N - a);
    for (int64_t k = 0; k < n; ++k) offset[k] = -lse_column[a + k] * A(kLog2e);
    column_bias(p, i, S + a, a, n, offset, bias);
    symmetric_block<Params>(
        S + a, r2 + a, bias_of(p, i, i, S + a, r2 + a, p.exclude.of(i, s_pos), a, n, n, logit, GuideRow(), row_bias),
        bias, n, logit, bits, coef[i], coef + a, Pss, Ps);
  }
  const double P_pos = -0.5 * double(coef[i]) * (sigmoid(l_neg - l_pos) + sigmoid(l_neg_column - l_pos));
  store(S[i], A(P_pos * double(logit.positive_derivative(s_pos)) * double(r2[i])));
  if constexpr (Params) p.store_gradients(i, A(Pss), A(Ps), A(P_pos), s_pos);
}

template <bool Params, class T>
void symmetric_of(const Contrastive& p, const Panel& panel) {
#pragma omp parallel for num_threads(panel.threads) schedule(static)
  for (int64_t c = 0; c < panel.c; ++c) symmetric_row<Params>(p, panel.i0 + c, static_cast<T*>(panel.S) + c * panel.ld);
}

template <class T>
void symmetric_dtype(const Contrastive& p, const Panel& panel) {
  if (p.dlogit) symmetric_of<true, T>(p, panel);
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
