// The row kernel: one visit turns a panel of raw products into losses and gradients. The threads of a block share a
// row.
//
// Symbols (kernels/README.md). A panel holds c rows of S_ij = z1hat_i . z2_j; the keys' norms fold in here:
//   s_ij = S_ij r_j                  r_j = 1/|z2_j|
//   l_ij = (q s + b) s               common/logit.h; more for row i's own hard negatives
//   x_ij = l_ij / log 2              logits in bits
//   e_ij = 2^(x_ij - top)            top: a bound on the logits where the shift is fixed, else the row's maximum
//   L_i  = log(1 + sum_neg exp(l_ij - l_i,pos))
// Gradient, written over S in units of the row factor f_i = coef_i / z_i, which the driver applies to z1hat and g1:
//   G_ij = e_ij l'(s_ij) r_j         negatives
//   G_ip = -z_neg l'_pos(s_ip) r_p   the positive, last
//   of the logit's coefficients: f sum_neg e s^2, f sum_neg e s, and P s^2, P s, P of the positive, P = -f z_neg
// Stored: nothing but the panel and O(c). Traffic: S is read and (Grad) written once; without a fixed shift a visit for
// the maximum goes before, and the second one finds the row in L2.
#pragma once
#include "block.h"

namespace pycse::cuda {

// The positive of row i; -1 where positives[i] is no key, which gives a NaN row.
PYCSE_BODY int positive_of(const Contrastive& p, int i) {
  const int64_t positive = p.positives ? p.positives[i] : i;
  return positive >= 0 && positive < p.N ? int(positive) : -1;
}

template <bool Masked, class A>
PYCSE_BODY Negatives<A, Masked> negatives_of(const Contrastive& p, const Logit<A>& logit, int i, int positive,
                                             A s_pos) {
  return {positive,
          p.key_ids,
          p.query_ids ? p.query_ids[i] : 0,
          p.exclude.given,
          p.exclude.given ? p.exclude.of(i, s_pos) : A(0),
          logit.own_b * A(kLog2e),
          logit.own_c * A(kLog2e),
          i,
          p.B};
}

// Row k of the panel. Params: dlogit may be wanted. Masked: ids or a threshold, so that every key is looked at.
template <class T, bool Grad, bool Params, bool Masked, class Block>
PYCSE_BODY void row(Block block, const Contrastive& p, const Panel& panel, int k) {
  using A = acc_t<T>;
  constexpr int V = kWidth<T>;
  const int i = panel.i0 + k;
  T* S = static_cast<T*>(panel.S) + k * panel.ld;
  const A* r2 = static_cast<const A*>(p.r2);
  const Logit<A> logit = p.logit.logit<A>();
  const Bits<A> bits(logit);

  const int positive = positive_of(p, i);
  A s_pos = nan<A>(), r_pos = 0;
  if (positive >= 0) {
    r_pos = r2[positive];
    s_pos = p.s_pos ? static_cast<const A*>(p.s_pos)[i] : load(S[positive]) * r_pos;
  }
  const auto negatives = negatives_of<Masked>(p, logit, i, positive, s_pos);
  const int head = head_of(S);
  const bool wide = aligned(r2 + head);

  A top = A(p.shift * kLog2e);
  if (!p.fixed_shift) {
    A best = logit.positive(s_pos) * A(kLog2e);
    each<V>(block, p.N, head, [&](int j, auto width) {
      constexpr int W = decltype(width)::value;
      A s[W], r[W], x[W];
      read<W>(S + j, true, s);
      read<W>(r2 + j, wide, r);
      for (int n = 0; n < W; ++n) x[n] = bits(s[n] *= r[n]);
      negatives.template apply<W>(s, j, x);
      for (int n = 0; n < W; ++n) best = larger(best, x[n]);
    });
    top = resolved(block.max(best));
  }

  block.sync();  // every thread has read s_pos before one writes G over it
  A z_neg = 0, es = 0, ess = 0;
  each<V>(block, p.N, head, [&](int j, auto width) {
    constexpr int W = decltype(width)::value;
    A s[W], r[W], x[W];
    read<W>(S + j, true, s);
    read<W>(r2 + j, wide, r);
    for (int n = 0; n < W; ++n) x[n] = bits(s[n] *= r[n]) - top;
    negatives.template apply<W>(s, j, x);
    for (int n = 0; n < W; ++n) {
      const A e = exp2_(x[n]);
      z_neg += e;
      if constexpr (Params) {
        es += e * s[n];
        ess += e * s[n] * s[n];
      }
      if constexpr (Grad) s[n] = e * logit.derivative(s[n]) * r[n];  // G over s
    }
    if constexpr (Grad) write<W>(S + j, true, s);
  });

  z_neg = block.sum(z_neg);
  if constexpr (Params) {
    es = block.sum(es);
    ess = block.sum(ess);
  }
  block.sync();  // the entry at the positive is written last
  if (block.index() != 0) return;
  const Logit<A> again = p.logit.logit<A>();  // asked for again, not kept in registers
  const RowLoss<A> result(z_neg, top, s_pos, r_pos, again, p.coefficient<A>(i));
  static_cast<A*>(p.loss)[i] = result.loss;
  if (p.lpos) {
    static_cast<A*>(p.lpos)[i] = again.positive(s_pos);
    static_cast<A*>(p.lneg)[i] = (log2(z_neg) + top) * A(kLn2);
  }
  if constexpr (Grad) {
    if (positive >= 0) store(S[positive], result.g_pos);
    static_cast<A*>(panel.f)[k] = result.f;
  }
  if constexpr (Params)
    if (p.dlogit) p.store_gradients(i, result.f * ess, result.f * es, -result.f * z_neg, s_pos);
}

// Calls run(T(), Flag<Grad>, Flag<Params>, Flag<Masked>) for what a call needs.
template <class Run>
void rows_variant(const Contrastive& p, DType dtype, bool grad, Run run) {
  with_type(dtype, [&](auto type) {
    with_flag(p.masked(), [&](auto masked) {
      if (!grad) run(type, Flag<false>(), Flag<false>(), masked);
      else with_flag(p.dlogit != nullptr, [&](auto params) { run(type, Flag<true>(), params, masked); });
    });
  });
}

}  // namespace pycse::cuda
