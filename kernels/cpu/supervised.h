// The supervised contrastive loss, the row kernel: a panel of raw products becomes losses and gradients.
//
// Symbols (kernels/README.md). A panel holds c rows of S_ij = z1hat_i . z2_j; P the row's positives, the keys of its
// class but itself, n their number; N the others. Keys are listed by class, so that no id is compared.
//   s_ij = S_ij r_j,   l = b s,   e = exp(l - shift),   z_pos = sum_P e,   z_neg = sum_N e,   z = z_pos + z_neg
//   L_i  = log n + log(1 + z_neg / z_pos)                                  inside: -log(z_pos / (n z))
//   L_i  = the same + log(z_pos / n) - mean_P(l - shift)                   outside: log z - mean_P(l - shift)
// Every term is >= 0, so nothing cancels between them; the third, what the mean of logarithms lacks, is 0 for n = 1.
// Gradient, written over S in units of the row factor f_i = coef_i / z_i:
//   G_ij = e b r_j                                          negatives
//   G_ip = -(e_p / z_pos) z_neg b r_p                       positives, inside
//   G_ip = ((n e_p - z_pos) - z_neg) / n b r_p              outside: z (p - 1/n), whose difference would cancel
// Digits: a confident row (z_neg << z_pos) keeps those of z_neg: always inside, and outside where its positives are
// equally near (n = 1 among them: n e_p = z_pos exactly). Where they are not, n e_p - z_pos is the gradient, as well as
// their similarities' rounding leaves it.
// Positives have a shift of their own where the row's is its maximum: they may all be below what exp can say.
// dL/db = sum_j dL/dl_j s_j. Sums of a block in acc, of a row in double. A row without positives is 0.
// Stored: nothing but the panel and f; a positive's e stands in S until z is known. Memory: O(1) beyond.
#pragma once
#include <algorithm>

#include "problem.h"
#include "rows.h"

namespace pycse::PYCSE_ISA {

// What is added to the bits of a block's keys: -shift, and -inf while a key is none of those that are summed.
template <class A>
struct alignas(64) Masks {
  A values[kBlock];
  A offset = 0;
  void set(A value) {
    offset = value;
    for (int64_t k = 0; k < kBlock; ++k) values[k] = value;
  }
  void hide(int64_t k) { values[k] = A(-INFINITY); }
  void show(int64_t k) { values[k] = offset; }
};

// Runs body(a, n, padded, S, r2) over the row's keys [a, a + n); the ragged last lanes run on padded copies, whose
// masks are hidden meanwhile.
template <bool Writes, class T, class A, class F>
PYCSE_INLINE void over_keys(int64_t N, T* S, const A* r2, Masks<A>& masks, F body) {
  const int64_t whole = N / kLane * kLane;
  for (int64_t a = 0; a < whole; a += kBlock) {
    const int64_t n = std::min(kBlock, whole - a);
    body(a, n, n, S + a, r2 + a);
  }
  if (const int64_t n = N - whole; n > 0) {
    T tail[kLane] = {};
    A r_tail[kLane] = {};
    for (int64_t k = 0; k < n; ++k) {
      tail[k] = S[whole + k];
      r_tail[k] = r2[whole + k];
    }
    for (int64_t k = n; k < kLane; ++k) masks.hide(k);
    body(whole, n, kLane, tail, r_tail);
    for (int64_t k = n; k < kLane; ++k) masks.show(k);
    for (int64_t k = 0; Writes && k < n; ++k) S[whole + k] = tail[k];
  }
}

// Sums over the positives, in units of their own shift.
struct PositiveSums {
  double z = 0, kept = 0;  // of e, and of e as the panel keeps it
  double x = 0, s = 0, es = 0;  // of logits in bits; for the gradient of b: of s and e s
};

template <bool Grad, bool Params, class T>
PYCSE_INLINE acc_t<T> supervised_row(const Supervised& p, int64_t i, T* S, Masks<acc_t<T>>& masks) {
  using A = acc_t<T>;
  const A* r2 = static_cast<const A*>(p.r2);
  const int64_t *first = p.keys + p.ptr[p.classes[i]], *last = p.keys + p.ptr[p.classes[i] + 1];
  const int64_t itself = p.same ? i : -1, n = last - first - (p.same ? 1 : 0);
  if (n <= 0) {
    static_cast<A*>(p.loss)[i] = 0;
    if constexpr (Grad) std::fill(S, S + p.N, T{});
    if constexpr (Params) static_cast<A*>(p.dlogit)[i] = 0;
    return 0;
  }
  const A b = A(p.b);
  const Logit<A> logit{0, b, 0, 0, b, b, 0, 0};
  const Bits<A> bits(logit);

  double top_pos = p.shift * kLog2e;
  if (!p.fixed_shift) {
    masks.set(0);
    A top = -INFINITY, most = -INFINITY;
    over_keys<false>(p.N, S, r2, masks,
                     [&](int64_t a, int64_t count, int64_t padded, const T* s, const A* r)
                         __attribute__((always_inline)) {
                           const bool here = itself >= a && itself < a + count;
                           if (here) masks.hide(itself - a);
                           top = block_max(s, r, masks.values, padded, bits, top);
                           if (here) masks.show(itself - a);
                         });
    for (const int64_t* k = first; k < last; ++k) {
      const A x = bits(load(S[*k]) * r2[*k]);
      if (*k != itself && x > most) most = x;
    }
    top_pos = most;
    masks.set(-resolved(top));
  }

  Sums others;
  PositiveSums own;
  const int64_t* next = first;
  over_keys<Grad>(p.N, S, r2, masks,
                  [&](int64_t a, int64_t count, int64_t padded, T* s, const A* r) __attribute__((always_inline)) {
                    const int64_t* begin = next;
                    T kept[kBlock];
                    for (; next < last && *next < a + count; ++next) {
                      const int64_t k = *next - a;
                      masks.hide(k);
                      if (*next == itself) continue;
                      const A s_p = load(s[k]) * r[k];
                      const double x = double(bits.v) * s_p;
                      const A e = exp2_(A(x - top_pos));
                      store(kept[next - begin], e);
                      own.z += e;
                      own.kept += load(kept[next - begin]);
                      own.x += x;
                      own.s += s_p;
                      own.es += double(e) * s_p;
                    }
                    visit<Grad, Params>(s, r, masks.values, padded, logit, bits, others);
                    for (const int64_t* k = begin; k < next; ++k) {
                      masks.show(*k - a);
                      if constexpr (Grad) s[*k - a] = *k == itself ? T{} : kept[k - begin];
                    }
                  });

  const double z_neg = others.z, top = -double(masks.offset), scale = std::exp2(top_pos - top), z_pos = own.z * scale;
  const double ratio = z_neg / z_pos;
  double loss = std::log(double(n)) +
                (ratio > 1 ? (std::log2(z_neg) - std::log2(own.z) + (top - top_pos)) * kLn2 + std::log1p(z_pos / z_neg)
                           : std::log1p(ratio));
  if (!p.inside && n > 1) loss += (std::log2(own.z / n) + (top_pos - own.x / n)) * kLn2;
  static_cast<A*>(p.loss)[i] = A(loss);
  if constexpr (!Grad) return A(0);

  const double f = double(p.coefficient<A>(i)) / (z_neg + z_pos);
  for (const int64_t* k = first; k < last; ++k) {
    if (*k == itself) continue;
    const double e = load(S[*k]);
    const double G = p.inside ? -(e / own.kept) * z_neg : ((n * e - own.kept) * scale - z_neg) / n;
    store(S[*k], A(G * p.b) * r2[*k]);
  }
  if constexpr (Params) {
    const double Ps = p.inside ? -(own.es / own.z) * z_neg : ((n * own.es - own.z * own.s) * scale - z_neg * own.s) / n;
    static_cast<A*>(p.dlogit)[i] = A(f * (others.es + Ps));
  }
  return A(f);
}

template <bool Grad, bool Params, class T>
void supervised_panel(const Supervised& p, const Panel& panel) {
  using A = acc_t<T>;
#pragma omp parallel for num_threads(panel.threads) schedule(static)
  for (int t = 0; t < panel.threads; ++t) {
    Masks<A> masks;
    masks.set(A(-p.shift * kLog2e));
    const int64_t begin = panel.c * t / panel.threads, end = panel.c * (t + 1) / panel.threads;
    for (int64_t k = begin; k < end; ++k) {
      T* S = static_cast<T*>(panel.S) + k * panel.ld;
      const A f = supervised_row<Grad, Params, T>(p, panel.i0 + k, S, masks);
      if constexpr (Grad) static_cast<A*>(panel.f)[k] = f;
    }
  }
}

template <class T>
void supervised_dtype(const Supervised& p, const Panel& panel, bool grad) {
  if (!grad) supervised_panel<false, false, T>(p, panel);
  else if (p.dlogit) supervised_panel<true, true, T>(p, panel);
  else supervised_panel<true, false, T>(p, panel);
}

inline void supervised(const Supervised& p, const Panel& panel, bool grad) {
  switch (panel.dtype) {
    case DType::f32: return supervised_dtype<float>(p, panel, grad);
    case DType::bf16: return supervised_dtype<bf16>(p, panel, grad);
    case DType::f64: return supervised_dtype<double>(p, panel, grad);
  }
}

}  // namespace pycse::PYCSE_ISA
