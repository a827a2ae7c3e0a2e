// The row kernels of a loss at several lengths: panels of the raw products of blocks of features, whose sums up to
// block k are the products of length k, become losses and gradients of all lengths in two visits.
//
// Symbols (kernels/README.md), of length k: the blocks b <= k are its features, rho_i and r_j its inverse norms of rows
// (of z1hat, that is) and keys, P_ij = coef_i dL_i/dl_ij, which holds the length's weight.
//   s_ij = rho_i r_j sum_{b <= k} S^b_ij                      l, masks and losses as in rows.h
//   G^k_ij = P_ij l'(s_ij) rho_i r_j                          dL/d of the raw product, over its negatives; the positive's
//   S^b_ij becomes sum_{k >= b} G^k_ij                        as there
// Norms of prefixes take sums over rows and over keys, of what the projections need:
//   t^k_i = sum_j P_ij l'(s_ij) s_ij,   columns^k_j = sum_i P_ij l'(s_ij) s_ij
// Stored: nothing beyond the panels; exponentials are made twice, for a third array of panels would cost more.
// Memory: K blocks of a row a thread, and columns for each thread.
#pragma once
#include <algorithm>

#include "rows.h"
#include "threads.h"

namespace pycse::PYCSE_ISA {

// acc += S, and r = r_j rho, for n keys; the rest up to padded is 0.
template <class T, class A>
PYCSE_NOINLINE void add_block(const T* S, const A* r2, A rho, int64_t n, int64_t padded, A* acc, A* r) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    acc[k] += load(S[k]);
    r[k] = r2[k] * rho;
  }
  for (int64_t k = n; k < padded; ++k) acc[k] = r[k] = 0;
}

// G to the units of the loss, and the keys' sums.
template <class A>
PYCSE_NOINLINE void add_columns(A* G, const A* acc, A f, int64_t n, A* columns) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    G[k] *= f;
    columns[k] += G[k] * acc[k];
  }
}

template <class T, class A>
PYCSE_NOINLINE void add_suffix(const A* G, int64_t n, A* suffix, T* S) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    suffix[k] += G[k];
    store(S[k], suffix[k]);
  }
}

// What a row has at one length.
template <class A>
struct Length {
  const Contrastive* p;
  const A* r2;
  Logit<A> logit;
  Bias<A> bias;
  A rho, s_pos, r_pos, threshold, f, G_pos;  // f: coef / z; G_pos with f in it
  GuideRow guide;
  Sums sums;
};

// body(k, n, similarities' sums, r, bias) for blocks of keys and each length k in turn.
template <class T, class A, class F, class G>
PYCSE_INLINE void over_lengths(const Prefixes& p, const Panel& panel, Length<A>* lengths, int64_t row, int64_t pos,
                               A* acc, A* r, F body, G after) {
  const int64_t N = p.of[0]->N;
  for (int64_t a = 0; a < N; a += kBlock) {
    const int64_t n = std::min(kBlock, N - a), padded = (n + kLane - 1) / kLane * kLane;
    std::fill(acc, acc + padded, A(0));
    for (int k = 0; k < p.lengths; ++k) {
      Length<A>& of = lengths[k];
      add_block(static_cast<const T*>(panel.S) + k * p.step + row * panel.ld + a, of.r2 + a, of.rho, n, padded, acc, r);
      body(k, a, padded,
           bias_of(*of.p, panel.i0 + row, pos, acc, r, of.threshold, a, n, padded, of.logit, of.guide, of.bias));
    }
    after(a, n);
  }
}

template <bool Grad, class T>
PYCSE_INLINE void prefix_row(const Prefixes& p, const Panel& panel, int64_t row, Length<acc_t<T>>* lengths,
                             acc_t<T>* columns, acc_t<T>* buffers) {
  using A = acc_t<T>;
  const int64_t i = panel.i0 + row, N = p.of[0]->N;
  const int64_t pos = p.of[0]->positives ? p.of[0]->positives[i] : i;
  A *acc = buffers, *r = acc + kBlock, *suffix = r + kBlock, *G = suffix + kBlock;
  const auto nothing = [](int64_t, int64_t) {};
  A raw_pos = 0;
  for (int k = 0; k < p.lengths; ++k) {
    Length<A>& of = lengths[k];
    of.rho = static_cast<const A*>(p.rho)[k * panel.c + row];
    raw_pos += load((static_cast<const T*>(panel.S) + k * p.step + row * panel.ld)[pos]);
    of.r_pos = of.r2[pos] * of.rho;
    of.s_pos = of.p->s_pos ? static_cast<const A*>(of.p->s_pos)[i] : raw_pos * of.r_pos;
    of.threshold = of.p->exclude.of(i, of.s_pos);
    of.guide = GuideRow(*of.p, panel, i, pos);
    of.sums = Sums();
  }
  if (!p.of[0]->fixed_shift) {
    A top[kMostLengths];
    for (int k = 0; k < p.lengths; ++k) {
      lengths[k].bias.set(0);
      top[k] = lengths[k].logit.positive(lengths[k].s_pos) * A(kLog2e);
    }
    over_lengths<T>(
        p, panel, lengths, row, pos, acc, r,
        [&](int k, int64_t, int64_t n, const A* bias) {
          top[k] = block_max(acc, r, bias, n, Bits<A>(lengths[k].logit), top[k]);
        },
        nothing);
    for (int k = 0; k < p.lengths; ++k) lengths[k].bias.set(-resolved(top[k]));
  }
  over_lengths<T>(
      p, panel, lengths, row, pos, acc, r,
      [&](int k, int64_t, int64_t n, const A* bias) {
        Length<A>& of = lengths[k];
        visit<false, true>(acc, r, bias, n, of.logit, Bits<A>(of.logit), of.sums);
      },
      nothing);
  for (int k = 0; k < p.lengths; ++k) {
    Length<A>& of = lengths[k];
    const Contrastive& one = *of.p;
    const Logit<double> logit = one.logit.logit<double>();
    const RowLoss<double> result(of.sums.z, -double(of.bias.offset), of.s_pos, of.r_pos, logit, one.coefficient<A>(i));
    static_cast<A*>(one.loss)[i] = A(of.sums.z == 0 ? 0 : result.loss);
    if constexpr (Grad) {
      of.f = A(result.f), of.G_pos = A(result.f * result.g_pos);
      const double P_pos = -result.f * of.sums.z, ss = result.f * of.sums.ess, s = result.f * of.sums.es;
      static_cast<A*>(p.t)[k * panel.c + row] =
          A(2 * logit.q * ss + logit.slope * s + P_pos * logit.positive_derivative(of.s_pos) * of.s_pos);
      if (one.dlogit) one.store_gradients(i, A(ss), A(s), A(P_pos), of.s_pos);
    }
  }
  if constexpr (Grad)
    over_lengths<T>(
        p, panel, lengths, row, pos, acc, r,
        [&](int k, int64_t a, int64_t n, const A* bias) {
          Length<A>& of = lengths[k];
          A *g = G + k * kBlock, *keys = columns + k * N + a;
          Sums unused;
          std::copy(acc, acc + n, g);
          visit<true, false>(g, r, bias, n, of.logit, Bits<A>(of.logit), unused);
          const int64_t real = std::min(n, N - a), at = pos - a;
          add_columns(g, acc, of.f, real, keys);
          if (at >= 0 && at < real) g[at] = of.G_pos, keys[at] += of.G_pos * acc[at];
        },
        [&](int64_t a, int64_t n) {
          std::fill(suffix, suffix + n, A(0));
          for (int k = p.lengths - 1; k >= 0; --k)
            add_suffix(G + k * kBlock, n, suffix, static_cast<T*>(panel.S) + k * p.step + row * panel.ld + a);
        });
}

template <bool Grad, class T>
void prefixes_of(const Prefixes& p, const Panel& panel) {
  using A = acc_t<T>;
  const int64_t size = p.lengths * p.of[0]->N, each = (3 + p.lengths) * kBlock;
  Scratch<A> columns(Grad ? panel.threads * size : 0), buffers(panel.threads * each);
  Scratch<Length<A>> lengths(int64_t(panel.threads) * p.lengths);
#pragma omp parallel for num_threads(panel.threads) schedule(static)
  for (int t = 0; t < panel.threads; ++t) {
    Length<A>* of = lengths.get() + int64_t(t) * p.lengths;
    for (int k = 0; k < p.lengths; ++k) {
      new (of + k) Length<A>{};
      of[k].p = p.of[k], of[k].r2 = static_cast<const A*>(p.of[k]->r2), of[k].logit = p.of[k]->logit.logit<A>();
      of[k].bias.set(A(-p.of[k]->shift * kLog2e));
    }
    A* mine = columns.get() + t * size;
    if (Grad) std::fill(mine, mine + size, A(0));
    const int64_t begin = panel.c * t / panel.threads, end = panel.c * (t + 1) / panel.threads;
    for (int64_t row = begin; row < end; ++row) prefix_row<Grad, T>(p, panel, row, of, mine, buffers.get() + t * each);
  }
  if (!Grad) return;
  A* total = static_cast<A*>(p.columns);
  for (int t = 0; t < panel.threads; ++t)  // in their order: the same sum each time
    for (int64_t j = 0; j < size; ++j) total[j] += columns.get()[t * size + j];
}

template <class T>
void prefixes_dtype(const Prefixes& p, const Panel& panel, bool grad) {
  grad ? prefixes_of<true, T>(p, panel) : prefixes_of<false, T>(p, panel);
}

inline void prefixes(const Prefixes& p, const Panel& panel, bool grad) {
  switch (panel.dtype) {
    case DType::f32: return prefixes_dtype<float>(p, panel, grad);
    case DType::bf16: return prefixes_dtype<bf16>(p, panel, grad);
    case DType::f64: return prefixes_dtype<double>(p, panel, grad);
  }
}

}  // namespace pycse::PYCSE_ISA
