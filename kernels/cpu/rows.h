// The row kernel: one visit turns a panel of raw products into losses and gradients.
//
// Symbols (kernels/README.md). A panel holds c rows of S_ij = z1hat_i . z2_j; the keys' norms fold in here:
//   s_ij = S_ij r_j                 r_j = 1/|z2_j|
//   l_ij = (q s + b) s              common/logit.h; more for row i's own hard negatives
//   L_i  = log(1 + sum_neg exp(l_ij - l_i,pos))
// Gradient, written over S in units of the row factor f_i = coef_i / z_i, which the driver applies to z1hat and g1:
//   G_ij = e_ij l'(s_ij) r_j                      negatives
//   G_ip = -z_neg l'_pos(s_ip) r_p                the positive: from the negatives' sum, so that a confident row
//          (p -> 1) keeps its digits; p - 1 would cancel.
// Stored: nothing but the panel and f. Memory: O(c) beyond it.
#pragma once
#include <algorithm>

#include "problem.h"
#include "simd.h"

namespace pycse::PYCSE_ISA {

constexpr int64_t kBlock = 256;  // keys visited at a time: the additive bias of a block stays in L1
constexpr int64_t kLane = 16;  // floats of the widest vector: a ragged tail is padded to this, never run as scalars

// What is added to the bits of a key: offset (minus the row's shift) for a negative, -inf for a key that is none, and
// what one of the row's own hard negatives has more.
template <class A>
struct alignas(64) Bias {
  A values[kBlock];
  A plain[kBlock];  // offset everywhere: most blocks
  A offset = 0;
  void set(A value) {
    offset = value;
    for (int64_t k = 0; k < kBlock; ++k) plain[k] = value;
  }
};

// A row's similarities by a guide, and the bound above which a key is no negative.
struct GuideRow {
  const void* T = nullptr;
  DType dtype = DType::f32;
  double bound = 0;

  GuideRow() = default;
  GuideRow(const Contrastive& p, const Panel& panel, int64_t i, int64_t positive) : dtype(panel.dtype_T) {
    if (!p.guide.given) return;
    const int64_t size = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
    T = static_cast<const char*>(panel.T) + (i - panel.i0) * panel.ld_T * size;
    with([&](const auto* t) { bound = p.guide.of(i, load(t[positive])); });
  }
  template <class F>
  void with(F run) const {
    if (dtype == DType::f64) run(static_cast<const double*>(T));
    else if (dtype == DType::f32) run(static_cast<const float*>(T));
    else run(static_cast<const bf16*>(T));
  }
};

// The bias of row i's keys [a, a + n); no negatives are the positive, a key with the row's id, a key above the
// threshold or, by a guide, above its own, and the padding [n, padded).
template <class T, class A>
PYCSE_INLINE const A* bias_of(const Contrastive& p, int64_t i, int64_t positive, const T* S, const A* r2, A threshold,
                              int64_t a, int64_t n, int64_t padded, const Logit<A>& logit, const GuideRow& guide,
                              Bias<A>& bias) {
  const A minus_inf = -INFINITY;
  int64_t hard = p.N;  // the first own hard negative at or after a: kB + i with k >= 1
  if (logit.has_own()) hard = std::max<int64_t>(1, (a - i + p.B - 1) / p.B) * p.B + i;
  const bool has_positive = positive >= a && positive < a + n;
  if (!p.masked() && n == padded && !has_positive && hard >= a + n) return bias.plain;

  A* v = bias.values;
  for (int64_t k = 0; k < padded; ++k) v[k] = bias.offset;
  if (p.query_ids) {
    const int64_t id = p.query_ids[i];
    const int64_t* ids = p.key_ids + a;
    for (int64_t k = 0; k < n; ++k) v[k] = ids[k] == id ? minus_inf : v[k];
  }
  if (p.exclude.given)
    for (int64_t k = 0; k < n; ++k) v[k] = load(S[k]) * r2[k] > threshold ? minus_inf : v[k];
  if (guide.T)
    guide.with([&](const auto* t) {
      using U = decltype(load(*t));
      const U bound = U(guide.bound);
      for (int64_t k = 0; k < n; ++k) v[k] = load(t[a + k]) > bound ? minus_inf : v[k];
    });
  for (; hard < a + n; hard += p.B) v[hard - a] += logit.own(load(S[hard - a]) * r2[hard - a]) * A(kLog2e);
  if (has_positive) v[positive - a] = minus_inf;
  for (int64_t k = n; k < padded; ++k) v[k] = minus_inf;
  return v;
}

struct Sums {
  double z = 0, ess = 0, es = 0;  // over the negatives: e, e s^2 and e s (the last two for the coefficients' gradients)
};

// Not inlined: inside a larger body GCC keeps these loops scalar, ten times slower; a call for each block is free.
template <bool Grad, bool Params, class T, class A>
PYCSE_NOINLINE void visit(T* S, const A* r2, const A* bias, int64_t n, Logit<A> logit, Bits<A> bits, Sums& sums) {
  A z = 0, ess = 0, es = 0;
#pragma omp simd reduction(+ : z, ess, es)
  for (int64_t k = 0; k < n; ++k) {
    A r = r2[k];
    A s = load(S[k]) * r;
    A e = exp2_((bits.u * s + bits.v) * s + bias[k]);
    z += e;
    if constexpr (Params) {
      ess += e * s * s;
      es += e * s;
    }
    if constexpr (Grad) store(S[k], e * logit.derivative(s) * r);
  }
  sums.z += z;
  sums.ess += ess;
  sums.es += es;
}

template <class T, class A>
PYCSE_NOINLINE A block_max(const T* S, const A* r2, const A* bias, int64_t n, Bits<A> bits, A best) {
#pragma omp simd reduction(max : best)
  for (int64_t k = 0; k < n; ++k) {
    A s = load(S[k]) * r2[k];
    A x = (bits.u * s + bits.v) * s + bias[k];
    best = x > best ? x : best;
  }
  return best;
}

// Runs body(n, S, r2, bias) over the row's keys in blocks whose length is a multiple of kLane; the ragged last lanes
// run on padded copies. Writes: to S.
template <bool Writes, class T, class A, class F>
PYCSE_INLINE void over_blocks(const Contrastive& p, int64_t i, int64_t positive, T* S, const A* r2, A threshold,
                              const Logit<A>& logit, const GuideRow& guide, Bias<A>& bias, F body) {
  const int64_t whole = p.N / kLane * kLane;
  for (int64_t a = 0; a < whole; a += kBlock) {
    int64_t n = std::min(kBlock, whole - a);
    body(n, S + a, r2 + a, bias_of(p, i, positive, S + a, r2 + a, threshold, a, n, n, logit, guide, bias));
  }
  if (int64_t n = p.N - whole; n > 0) {
    T tail[kLane] = {};
    A r_tail[kLane] = {};
    for (int64_t k = 0; k < n; ++k) {
      tail[k] = S[whole + k];
      r_tail[k] = r2[whole + k];
    }
    body(kLane, tail, r_tail, bias_of(p, i, positive, tail, r_tail, threshold, whole, n, kLane, logit, guide, bias));
    for (int64_t k = 0; Writes && k < n; ++k) S[whole + k] = tail[k];
  }
}

// One row: the loss (through p), and with Grad G in place of S; returns the row's factor f. bias.offset is -shift in
// bits where the shift is fixed.
template <bool Grad, bool Params, class T>
PYCSE_INLINE acc_t<T> row(const Contrastive& p, const Panel& panel, int64_t i, T* S, Bias<acc_t<T>>& bias) {
  using A = acc_t<T>;
  const A* r2 = static_cast<const A*>(p.r2);
  const Logit<A> logit = p.logit.logit<A>();
  const Bits<A> bits(logit);
  const int64_t pos = p.positives ? p.positives[i] : i;
  const A s_pos = p.s_pos ? static_cast<const A*>(p.s_pos)[i] : load(S[pos]) * r2[pos];
  const A threshold = p.exclude.of(i, s_pos);
  const GuideRow guide(p, panel, i, pos);

  if (!p.fixed_shift) {
    bias.set(0);
    A top = logit.positive(s_pos) * A(kLog2e);
    over_blocks<false>(p, i, pos, S, r2, threshold, logit, guide, bias,
                       [&](int64_t n, const T* s, const A* r, const A* b)
                           __attribute__((always_inline)) { top = block_max(s, r, b, n, bits, top); });
    bias.set(-resolved(top));
  }

  Sums sums;
  over_blocks<Grad>(p, i, pos, S, r2, threshold, logit, guide, bias,
                    [&](int64_t n, T* s, const A* r, const A* b)
                        __attribute__((always_inline)) { visit<Grad, Params>(s, r, b, n, logit, bits, sums); });

  const RowLoss<double> result(sums.z, -double(bias.offset), s_pos, r2[pos], p.logit.logit<double>(),
                               p.coefficient<A>(i));
  if (p.loss) static_cast<A*>(p.loss)[i] = A(sums.z == 0 ? 0 : result.loss);
  if (p.lpos) static_cast<double*>(p.lpos)[i] = result.x_pos * kLn2;
  if (p.lneg) static_cast<double*>(p.lneg)[i] = (std::log2(sums.z) - double(bias.offset)) * kLn2;
  if constexpr (!Grad) return A(0);
  store(S[pos], A(result.g_pos));
  if constexpr (Params)
    p.store_gradients(i, A(result.f * sums.ess), A(result.f * sums.es), A(-result.f * sums.z), s_pos);
  return A(result.f);
}

template <bool Grad, bool Params, class T>
void rows_of(const Contrastive& p, const Panel& panel) {
  using A = acc_t<T>;
#pragma omp parallel for num_threads(panel.threads) schedule(static)
  for (int t = 0; t < panel.threads; ++t) {
    Bias<A> bias;
    bias.set(A(-p.shift * kLog2e));
    const int64_t begin = panel.c * t / panel.threads, end = panel.c * (t + 1) / panel.threads;
    for (int64_t k = begin; k < end; ++k) {
      const A f = row<Grad, Params, T>(p, panel, panel.i0 + k, static_cast<T*>(panel.S) + k * panel.ld, bias);
      if constexpr (Grad) static_cast<A*>(panel.f)[k] = f;
    }
  }
}

template <class T>
void rows_dtype(const Contrastive& p, const Panel& panel, bool grad) {
  if (!grad) rows_of<false, false, T>(p, panel);
  else if (p.dlogit) rows_of<true, true, T>(p, panel);
  else rows_of<true, false, T>(p, panel);
}

inline void rows(const Contrastive& p, const Panel& panel, bool grad) {
  switch (panel.dtype) {
    case DType::f32: return rows_dtype<float>(p, panel, grad);
    case DType::bf16: return rows_dtype<bf16>(p, panel, grad);
    case DType::f64: return rows_dtype<double>(p, panel, grad);
  }
}

}  // namespace pycse::PYCSE_ISA
