// One row of the loss, for host and device: which keys count, and what follows from the sums over them.
//
//   x_ij  = l_ij / log 2          logits in bits, so that exponentials are powers of two: e = 2^(x - top)
//   L     = log(1 + z_neg / e_pos),   z_neg = sum_neg e,   e_pos = 2^(x_pos - top)
//   f     = coef / (z_neg + e_pos)            the row's factor: G_ij = f e l' r_j over the negatives
//   G_pos = -f z_neg l'_pos r_pos             from the negatives' sum: a confident row (p -> 1) keeps its digits
#pragma once
#include <math.h>  // not cmath: ::exp and the like with their float overloads, on the host as on the device

#include "problem.h"

namespace pycse {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class A> PYCSE_HD A smaller(A x, A most) { return x > most ? most : x; }  // NaN stays NaN

PYCSE_HD double exp2_(double x) { return ::exp2(x); }
PYCSE_HD float exp2_(float x) {
#ifdef __CUDA_ARCH__
  float y;  // one instruction: relative error 2^-22, results below 2^-126 become 0
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return ::exp2f(x);
#endif
}

template <class A> PYCSE_HD A infinity() { return A(HUGE_VAL); }
template <class A> PYCSE_HD A nan() { return infinity<A>() - infinity<A>(); }
template <class A> PYCSE_HD A larger(A x, A y) { return x > y ? x : y; }

// A row's largest logit, in bits; NaN where it is so large that its own rounding decides the row.
template <class A> constexpr A kResolved = A(0x1p29);
template <> constexpr double kResolved<double> = 0x1p58;
template <class A> PYCSE_HD A resolved(A top) { return top > kResolved<A> || top < -kResolved<A> ? nan<A>() : top; }

// log(exp(x) + exp(y)), y finite.
template <class A>
PYCSE_HD A log_add(A x, A y) {
  return x > y ? x + log1p(exp(y - x)) : y + log1p(exp(x - y));
}

template <class A> PYCSE_HD A sigmoid(A x) { return 1 / (1 + exp(-x)); }

// A negative's logit in bits: x(s) = (u s + v) s.
template <class A>
struct Bits {
  A u, v;
  PYCSE_HD explicit Bits(const Logit<A>& l) : u(l.q * A(kLog2e)), v(l.b * A(kLog2e)) {}
  PYCSE_HD A operator()(A s) const { return (u * s + v) * s; }
};

// Which keys j are negatives of row i. In a symmetric loss also which rows are negatives of a column, roles swapped.
// Masked: ids or a threshold are given, and every key has to be asked.
template <class A, bool Masked>
struct Negatives {
  int positive;                // the row's positive
  const int64_t* ids;          // of the keys, or null
  int64_t id;                  // the row's
  bool exclude;                // keys with s > threshold
  A threshold;
  A own_b, own_c;              // in bits: what the row's own hard negatives, keys k B + i with k >= 1, have more
  int i, B;

  PYCSE_HD bool owns() const { return own_b != 0 || own_c != 0; }

  PYCSE_HD bool has(A s, int j) const {
    if constexpr (Masked)
      if ((ids && ids[j] == id) || (exclude && s > threshold)) return false;
    return j != positive;
  }
  // The first own hard negative from key j on, as a distance.
  PYCSE_HD int until_own(int j) const {
    if (j < B) return B + i - j;
    const int ahead = i - j % B;
    return ahead < 0 ? ahead + B : ahead;
  }
  // Whether one of the keys [j, j + W) is the positive or an own hard negative.
  template <int W>
  PYCSE_HD bool special(int j) const {
    return unsigned(positive - j) < unsigned(W) || (owns() && until_own(j) < W);
  }
  // The logits x of keys [j, j + W) as they count among the negatives: -inf where a key is none.
  template <int W>
  PYCSE_HD void apply(const A* s, int j, A* x) const {
    if (!Masked && !special<W>(j)) return;
    unsigned own = 0;
    if (owns())
      for (int k = until_own(j); k < W; k += B) own |= 1u << k;
    for (int k = 0; k < W; ++k)
      x[k] = has(s[k], j + k) ? x[k] + (own >> k & 1 ? own_b * s[k] + own_c : A(0)) : -infinity<A>();
  }
};

template <class A>
struct RowLoss {
  A x_pos, loss, f, g_pos;  // g_pos in units of f

  PYCSE_HD RowLoss(A z_neg, A top, A s_pos, A r_pos, const Logit<A>& logit, A coef) {
    x_pos = logit.positive(s_pos) * A(kLog2e);
    const A e_pos = exp2_(x_pos - top), ratio = z_neg / e_pos;
    loss = ratio > 1 ? (log2(z_neg) + (top - x_pos)) * A(kLn2) + log1p(e_pos / z_neg)  // the ratio may overflow
                     : log1p(ratio);
    f = coef / (z_neg + e_pos);
    g_pos = -z_neg * logit.positive_derivative(s_pos) * r_pos;
  }
};

}  // namespace pycse
