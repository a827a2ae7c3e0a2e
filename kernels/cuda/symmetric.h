// The symmetric loss: rows and columns share every similarity (B = N, row i's positive is key i).
//
//   L_i  = (row_i + column_i) / 2,   row_i = log(1 + sum_{j != i} exp(l_ij - l_ii)),   column_j likewise over i
//   P_ij = (coef_i exp(l_ij - lse_i) + coef_j exp(l_ij - lse^c_j)) / 2                     i != j
//   P_ii = -coef_i (sigma(lneg_i - l_ii) + sigma(lneg^c_i - l_ii)) / 2
//   G    = P l' r_j;     of the logit's coefficients: sum_{j != i} P s^2, sum_{j != i} P s, and P s^2, P s, P at j = i
// Two sweeps over the panels: row (no gradient) and column gather the log-sums, then symmetric_row writes G over S.
// Stored between the sweeps: O(N). Traffic: S is read once by each, and written by symmetric_row.
#pragma once
#include "rows.h"

namespace pycse::cuda {

constexpr int kRowsAtOnce = 8;  // loads in flight for a thread, and one change of the running maximum

// Folds the panel's rows into column j's running maximum (in bits) and sum; the threads share the rows.
template <class T, bool Masked, class Block>
PYCSE_BODY void column(Block block, const Contrastive& p, const Panel& panel, int j) {
  using A = acc_t<T>;
  constexpr int R = kRowsAtOnce;
  const bool inside = j < p.N;
  j = inside ? j : p.N - 1;
  const T* S = static_cast<const T*>(panel.S) + j;
  const A r = static_cast<const A*>(p.r2)[j];
  const Bits<A> bits(p.logit.logit<A>());
  // The column's positive is row j, its threshold starts from s_jj, its candidates are rows.
  const Negatives<A, Masked> negatives = {j,
                                          p.query_ids,
                                          p.key_ids ? p.key_ids[j] : 0,
                                          p.exclude.given,
                                          p.exclude.given ? p.exclude.of(j, static_cast<const A*>(p.s_pos)[j]) : A(0),
                                          A(0),
                                          A(0),
                                          j,
                                          p.B};
  const A none = -infinity<A>();

  A top = p.fixed_shift ? A(p.shift * kLog2e) : none, sum = 0;
  for (int k = block.index() * R; k < panel.c; k += block.size() * R) {
    A x[R], best = top;
    for (int n = 0; n < R; ++n) x[n] = k + n < panel.c ? load(S[(k + n) * panel.ld]) * r : A(0);
    for (int n = 0; n < R; ++n) {
      x[n] = k + n < panel.c && negatives.has(x[n], panel.i0 + k + n) ? bits(x[n]) : none;
      best = larger(best, x[n]);
    }
    if (!p.fixed_shift && best > top) {
      sum *= exp2_(top - best);
      top = best;
    }
    for (int n = 0; n < R; ++n) sum += exp2_(x[n] - (top == none ? A(0) : top));
  }

  A* column_max = static_cast<A*>(p.column_max) + j;
  A* column_sum = static_cast<A*>(p.column_sum) + j;
  const A old = *column_max, best = p.fixed_shift ? top : larger(old, block.max(top));
  const A safe = best == none ? A(0) : best;
  sum = block.sum(sum * exp2_(top - safe));
  if (!inside || block.index() != 0) return;
  *column_sum = sum + *column_sum * exp2_(old - safe);
  *column_max = best;
}

// Row k of the panel: S -> G, complete.
template <class T, bool Params, bool Masked, class Block>
PYCSE_BODY void symmetric_row(Block block, const Contrastive& p, const Panel& panel, int k) {
  using A = acc_t<T>;
  constexpr int V = kWidth<T>;
  const int i = panel.i0 + k;
  T* S = static_cast<T*>(panel.S) + k * panel.ld;
  const A* r2 = static_cast<const A*>(p.r2);
  const A* lse_column = static_cast<const A*>(p.lse_column);
  const A* coef_column = static_cast<const A*>(p.coef);
  const Logit<A> logit = p.logit.logit<A>();
  const Bits<A> bits(logit);

  const A s_pos = p.s_pos ? static_cast<const A*>(p.s_pos)[i] : load(S[i]) * r2[i];
  const A l_pos = static_cast<const A*>(p.lpos)[i], l_neg = static_cast<const A*>(p.lneg)[i];
  const A lse = log_add(l_neg, l_pos) * A(kLog2e), coef = A(0.5) * p.coefficient<A>(i);
  const auto negatives = negatives_of<Masked>(p, logit, i, i, s_pos);
  const int head = head_of(S);
  const bool wide = aligned(r2 + head) && aligned(lse_column + head) && aligned(coef_column + head);

  block.sync();  // every thread has read s_pos before one writes G over it
  A Ps = 0, Pss = 0;
  each<V>(block, p.N, head, [&](int j, auto width) {
    constexpr int W = decltype(width)::value;
    A s[W], r[W], row[W], column[W], coef_j[W];
    read<W>(S + j, true, s);
    read<W>(r2 + j, wide, r);
    read<W>(lse_column + j, wide, column);
    if (coef_column) read<W>(coef_column + j, wide, coef_j);
    for (int n = 0; n < W; ++n) {
      const A x = bits(s[n] *= r[n]);
      row[n] = smaller(x - lse, A(0));  // probabilities: above 0 by rounding only
      column[n] = smaller(x - column[n] * A(kLog2e), A(0));
    }
    if (Masked || negatives.template special<W>(j))
      for (int n = 0; n < W; ++n) {
        auto of_column = negatives;  // all but the threshold is symmetric
        if (p.exclude.given) of_column.threshold = p.exclude.of(j + n, static_cast<const A*>(p.s_pos)[j + n]);
        if (!negatives.has(s[n], j + n)) row[n] = -infinity<A>();
        if (!of_column.has(s[n], j + n)) column[n] = -infinity<A>();
      }
    for (int n = 0; n < W; ++n) {
      const A P = coef * exp2_(row[n]) + (coef_column ? A(0.5) * coef_j[n] : coef) * exp2_(column[n]);
      if constexpr (Params) {
        Ps += P * s[n];
        Pss += P * s[n] * s[n];
      }
      s[n] = P * logit.derivative(s[n]) * r[n];  // G over s
    }
    write<W>(S + j, true, s);
  });

  if constexpr (Params) {
    Ps = block.sum(Ps);
    Pss = block.sum(Pss);
  }
  block.sync();  // the entry at the positive is written last
  if (block.index() != 0) return;
  const A P_pos = -coef * (sigmoid(l_neg - l_pos) + sigmoid(static_cast<const A*>(p.lneg_column)[i] - l_pos));
  const Logit<A> again = p.logit.logit<A>();  // asked for again, not kept in registers
  store(S[i], P_pos * again.positive_derivative(s_pos) * r2[i]);
  if constexpr (Params)
    if (p.dlogit) p.store_gradients(i, Pss, Ps, P_pos, s_pos);
}

template <class Run>
void columns_variant(const Contrastive& p, DType dtype, Run run) {
  with_type(dtype, [&](auto type) { with_flag(p.masked(), [&](auto masked) { run(type, masked); }); });
}

template <class Run>
void symmetric_variant(const Contrastive& p, DType dtype, Run run) {
  with_type(dtype, [&](auto type) {
    with_flag(p.dlogit != nullptr,
              [&](auto params) { with_flag(p.masked(), [&](auto masked) { run(type, params, masked); }); });
  });
}

}  // namespace pycse::cuda
