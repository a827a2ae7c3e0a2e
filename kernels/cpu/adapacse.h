// The row kernel of AdapACSE, an adaptive angular margin: a panel of raw products becomes losses and gradients.
//
// Symbols (kernels/README.md). A panel holds c rows of S_ij = z1hat_i . z2_j, and beside it T_ij, a teacher's averaged
// cosines, of which alpha_ij are those within [-1, 1]:
//   s_ij = S_ij r_j = cos(theta_ij),    u_ij = m (1 - alpha_ij) / 2 in [0, pi/2],    b = 1/temperature
//   c_ij = cos(theta_ij - 2 u_ij)       where theta_ij > m, which is s_ij < cos(m); else s_ij
//   L_i  = log(1 + sum_neg exp(b (c_ij - s_ip)))
// In the half angle u nothing is lost where the margin is small, and none of it is left where m = 0:
//   c    = s + 2 sin(u) sin(theta - u)  sin(theta - u) = sqrt(1 - s^2) cos(u) - s sin(u)
//   c'   = 1 - 2 sin(u) (sin(u) + s cos(u) / rho)       dc/ds, rho = max(sqrt(1 - s^2), kLeastSine)
// c' has a bound only because rho has: |c'| <= 1 + sin(2 u) / kLeastSine, at theta = pi.
// Gradient, written over S in units of the row factor f_i = coef_i / z_i, which the driver applies to z1hat and g1:
//   G_ij = e_ij b c'_ij r_j             negatives; e = exp(b c - shift)
//   G_ip = -z_neg b r_p                 the positive: from the negatives' sum, as in rows.h
// dL/db = f (sum_neg e c - z_neg s_ip). A key that is no negative has u = 0: what the teacher says of it is not read.
// Stored: nothing but the panel and f. Memory: O(1) beyond it.
#pragma once
#include <algorithm>

#include "problem.h"
#include "rows.h"
#include "simd.h"

namespace pycse::PYCSE_ISA {

constexpr double kLeastSine = 0x1p-10;  // pycse/problem.py has it for all backends

template <class A>
struct HalfAngle {
  A sin, cos;
};
// Of u in [0, pi/2]: minimax polynomials in u^2 of u (1 + ..) and 1 + .., relative error 5e-9 of the sine, 2.5e-10 of
// the cosine, and in float 1.3e-7 both.
PYCSE_INLINE HalfAngle<float> half_angle(float u) {
  const float v = u * u;
  float y = 2.6089039693e-6f;
  y = y * v - 1.9811101083e-4f;
  y = y * v + 8.3330878988e-3f;
  y = y * v - 1.6666659713e-1f;
  float x = -2.6076816084e-7f;
  x = x * v + 2.4761870009e-5f;
  x = x * v - 1.3888403773e-3f;
  x = x * v + 4.1666641831e-2f;
  x = x * v - 0.5f;
  return {u + u * (v * y), 1 + v * x};
}
PYCSE_INLINE HalfAngle<double> half_angle(double u) { return {std::sin(u), std::cos(u)}; }

// c and c' of one pair.
template <class A>
struct Turned {
  A c, slope;

  static inline __attribute__((always_inline)) Turned of(A s, A u, A cos_m) {
    const HalfAngle<A> half = half_angle(u);
    const A inside = (1 - s) * (1 + s);  // above 1 by rounding: 0
    const A sine = std::sqrt(inside > 0 ? inside : A(0)), rho = sine > A(kLeastSine) ? sine : A(kLeastSine);
    const A twice = s < cos_m ? 2 * half.sin : A(0);
    return {s + twice * (sine * half.cos - s * half.sin), 1 - twice * (half.sin + s / rho * half.cos)};
  }
};

// What rows have in common.
template <class A>
struct Margin {
  A half, cos_m, b, bits;  // m/2; 1/temperature, and that of logits in bits
  Margin(double m, double b) : half(A(m / 2)), cos_m(A(std::cos(m))), b(A(b)), bits(A(b * kLog2e)) {}
};

// u of keys [a, a + n), padded with 0. Not inlined, as the visits below: see rows.h.
template <class U, class A>
PYCSE_NOINLINE void half_margins(const U* t, const A* bias, int64_t n, int64_t padded, A half, A* u) {
  const A none = -INFINITY;
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    A alpha = A(load(t[k]));
    alpha = alpha > 1 ? A(1) : alpha;
    alpha = alpha < -1 ? A(-1) : alpha;
    const A angle = half * (1 - alpha);
    u[k] = bias[k] == none ? A(0) : angle;
  }
  for (int64_t k = n; k < padded; ++k) u[k] = 0;
}

template <class T, class A>
PYCSE_NOINLINE A largest_turned(const T* S, const A* r2, const A* bias, const A* u, int64_t n, const Margin<A>& margin,
                                A best) {
  const A cos_m = margin.cos_m, bits = margin.bits;
#pragma omp simd reduction(max : best)
  for (int64_t k = 0; k < n; ++k) {
    const A x = bits * Turned<A>::of(load(S[k]) * r2[k], u[k], cos_m).c + bias[k];
    best = x > best ? x : best;
  }
  return best;
}

struct TurnedSums {
  double z = 0, ec = 0;  // over the negatives: e, and for the gradient of b e c
};

template <bool Grad, bool Params, class T, class A>
PYCSE_NOINLINE void visit_turned(T* S, const A* r2, const A* bias, const A* u, int64_t n, const Margin<A>& margin,
                                 TurnedSums& sums) {
  const A cos_m = margin.cos_m, b = margin.b, bits = margin.bits;
  A z = 0, ec = 0;
#pragma omp simd reduction(+ : z, ec)
  for (int64_t k = 0; k < n; ++k) {
    const A r = r2[k];
    const Turned<A> at = Turned<A>::of(load(S[k]) * r, u[k], cos_m);
    const A e = exp2_(bits * at.c + bias[k]);
    z += e;
    if constexpr (Params) ec += e * at.c;
    if constexpr (Grad) store(S[k], e * (b * at.slope) * r);
  }
  sums.z += z;
  sums.ec += ec;
}

// Runs body(n, S, r2, bias, u) over the row's keys in blocks, as over_blocks in rows.h.
template <bool Writes, class T, class A, class F>
PYCSE_INLINE void over_turned(const Contrastive& p, int64_t i, int64_t positive, T* S, const A* r2,
                              const Logit<A>& logit, const GuideRow& teacher, A half, Bias<A>& bias, A* u, F body) {
  const auto block = [&](T* s, const A* r, int64_t a, int64_t n, int64_t padded) {
    const A* counts = bias_of(p, i, positive, s, r, A(0), a, n, padded, logit, GuideRow(), bias);
    teacher.with([&](const auto* t) { half_margins(t + a, counts, n, padded, half, u); });
    body(padded, s, r, counts, u);
  };
  const int64_t whole = p.N / kLane * kLane;
  for (int64_t a = 0; a < whole; a += kBlock) {
    const int64_t n = std::min(kBlock, whole - a);
    block(S + a, r2 + a, a, n, n);
  }
  if (const int64_t n = p.N - whole; n > 0) {
    T tail[kLane] = {};
    A r_tail[kLane] = {};
    for (int64_t k = 0; k < n; ++k) tail[k] = S[whole + k], r_tail[k] = r2[whole + k];
    block(tail, r_tail, whole, n, kLane);
    for (int64_t k = 0; Writes && k < n; ++k) S[whole + k] = tail[k];
  }
}

template <bool Grad, bool Params, class T>
PYCSE_INLINE acc_t<T> turned_row(const Contrastive& p, const Margin<acc_t<T>>& margin, const Panel& panel, int64_t i,
                                 T* S, Bias<acc_t<T>>& bias, acc_t<T>* u) {
  using A = acc_t<T>;
  const A* r2 = static_cast<const A*>(p.r2);
  const Logit<A> logit = p.logit.logit<A>();
  const int64_t pos = p.positives ? p.positives[i] : i;
  const A s_pos = p.s_pos ? static_cast<const A*>(p.s_pos)[i] : load(S[pos]) * r2[pos];
  GuideRow teacher;
  teacher.dtype = panel.dtype_T;
  const int64_t size = panel.dtype_T == DType::f64 ? 8 : panel.dtype_T == DType::f32 ? 4 : 2;
  teacher.T = static_cast<const char*>(panel.T) + (i - panel.i0) * panel.ld_T * size;

  if (!p.fixed_shift) {
    bias.set(0);
    A top = s_pos * margin.bits;
    over_turned<false>(p, i, pos, S, r2, logit, teacher, margin.half, bias, u,
                       [&](int64_t n, const T* s, const A* r, const A* b, const A* v)
                           __attribute__((always_inline)) { top = largest_turned(s, r, b, v, n, margin, top); });
    bias.set(-resolved(top));
  }

  TurnedSums sums;
  over_turned<Grad>(p, i, pos, S, r2, logit, teacher, margin.half, bias, u,
                    [&](int64_t n, T* s, const A* r, const A* b, const A* v)
                        __attribute__((always_inline)) { visit_turned<Grad, Params>(s, r, b, v, n, margin, sums); });

  const RowLoss<double> result(sums.z, -double(bias.offset), s_pos, r2[pos], p.logit.logit<double>(),
                               p.coefficient<A>(i));
  static_cast<A*>(p.loss)[i] = A(sums.z == 0 ? 0 : result.loss);
  if constexpr (!Grad) return A(0);
  store(S[pos], A(result.g_pos));
  if constexpr (Params) static_cast<A*>(p.dlogit)[i] = A(result.f * (sums.ec - sums.z * double(s_pos)));
  return A(result.f);
}

template <bool Grad, bool Params, class T>
void turned_panel(const Contrastive& p, double m, const Panel& panel) {
  using A = acc_t<T>;
  const Margin<A> margin(m, p.logit.logit<double>().b);
#pragma omp parallel for num_threads(panel.threads) schedule(static)
  for (int t = 0; t < panel.threads; ++t) {
    Bias<A> bias;
    alignas(64) A u[kBlock];
    bias.set(A(-p.shift * kLog2e));
    const int64_t begin = panel.c * t / panel.threads, end = panel.c * (t + 1) / panel.threads;
    for (int64_t k = begin; k < end; ++k) {
      T* S = static_cast<T*>(panel.S) + k * panel.ld;
      const A f = turned_row<Grad, Params, T>(p, margin, panel, panel.i0 + k, S, bias, u);
      if constexpr (Grad) static_cast<A*>(panel.f)[k] = f;
    }
  }
}

template <class T>
void turned_dtype(const Contrastive& p, double m, const Panel& panel, bool grad) {
  if (!grad) turned_panel<false, false, T>(p, m, panel);
  else if (p.dlogit) turned_panel<true, true, T>(p, m, panel);
  else turned_panel<true, false, T>(p, m, panel);
}

// p: InfoNCE's problem (b = 1/temperature), with dlogit (B), of b.
inline void adapacse(const Contrastive& p, double m, const Panel& panel, bool grad) {
  switch (panel.dtype) {
    case DType::f32: return turned_dtype<float>(p, m, panel, grad);
    case DType::bf16: return turned_dtype<bf16>(p, m, panel, grad);
    case DType::f64: return turned_dtype<double>(p, m, panel, grad);
  }
}

}  // namespace pycse::PYCSE_ISA
