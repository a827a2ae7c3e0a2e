// Distillation, one row: the student's similarities s and the teachers' t, softmaxes, Group-P shuffle, divergence,
// gradient.
//
//   p_j = exp(s_j / tau_s) / z     q_j = exp(t_j / tau_t) / z_t      j over the row's columns but the diagonal
//   q shuffled inside its groups (shuffle.h), or averaged over them
//   ce  L = -sum q log p             kl  L = ce - H(q)               dL/ds_j = (p_j - q_j) / tau_s
//   js  L = (KL(q | a) + KL(p | a)) / 2, a = (p + q) / 2             dL/ds_j = p_j (log(p_j / a_j) - KL(p | a)) / (2 tau_s)
//   G_j = coef_i dL/ds_j over s, 0 on the diagonal
// Logits are in bits (log 2) where they meet the exponential. Stored: G over S; O(B) scratch a thread.
#pragma once
#include "../common/groups.h"
#include "shuffle.h"
#include "simd.h"
#include "threads.h"

namespace pycse::PYCSE_ISA {

// log2 x for x > 0 (about -127 for 0, NaN for NaN): 2 atanh(f) / log 2 with f = (m - 1) / (m + 1), |f| < 0.172.
// Relative error 1e-7.
PYCSE_INLINE float log2_(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const int32_t exponent = int32_t(bits - 0x3f3504f3u) >> 23;
  const float m = __builtin_bit_cast(float, bits - (uint32_t(exponent) << 23));
  const float f = (m - 1) / (m + 1), w = f * f;
  float y = 0.32059889f;  // 2 / (9 log 2)
  y = y * w + 0.41219858f;
  y = y * w + 0.57707802f;
  y = y * w + 0.96179669f;
  y = y * w + 2.88539008f;
  return x == x ? float(exponent) + f * y : x;
}
PYCSE_INLINE double log2_(double x) { return std::log2(x <= 0 ? 1e-300 : x); }

// out_k = x_k but for the diagonal, in the accumulation type; returns the largest, and through `least` the smallest.
template <class T, class A>
PYCSE_NOINLINE A gather(const T* x, int64_t n, A* out, A largest, A& least) {
  A top = largest, low = least;
#pragma omp simd reduction(max : top) reduction(min : low)
  for (int64_t k = 0; k < n; ++k) {
    const A v = A(load(x[k]));
    out[k] = v;
    top = v > top ? v : top;
    low = v < low ? v : low;
  }
  least = low;
  return top;
}

// out = 2^(scale (x - top)); returns the sum, and through `dot` the sum of out scale (x - top).
template <class A>
PYCSE_NOINLINE double exponentials(const A* x, A top, A scale, A* out, int64_t n, double& dot) {
  A sum = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, weighted)
  for (int64_t k = 0; k < n; ++k) {
    const A bits = scale * (x[k] - top), e = exp2_(bits);
    out[k] = e;
    sum += e;
    weighted += e * (bits < A(-1000) ? A(-1000) : bits);  // 0 and not 0 * -inf
  }
  dot = double(weighted);
  return double(sum);
}

// s becomes e = 2^(scale (s - top)); returns the sum of e, and through `dot` the sum of q scale (s - top).
template <class A>
PYCSE_NOINLINE double student(A* s, const A* q, A top, A scale, int64_t n, double& dot) {
  A sum = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, weighted)
  for (int64_t k = 0; k < n; ++k) {
    const A bits = scale * (s[k] - top), e = exp2_(bits);
    s[k] = e;
    sum += e;
    weighted += q[k] * bits;
  }
  dot = double(weighted);
  return double(sum);
}

template <class A, class T>
PYCSE_NOINLINE void difference(const A* e, const A* q, A of_e, A of_q, T* G, int64_t n) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) store(G[k], of_e * e[k] - of_q * q[k]);
}

// p and q come unnormalised, as e and q; e becomes p log2(p / a). Returns KL(p | a), and KL(q | a) through `kl_q`, in
// bits.
template <class A>
PYCSE_NOINLINE double jensen_shannon(A* e, const A* q_, A of_e, A of_q, A* p_, int64_t n, double& kl_q) {
  A sum_p = 0, sum_q = 0;
#pragma omp simd reduction(+ : sum_p, sum_q)
  for (int64_t k = 0; k < n; ++k) {
    const A p = of_e * e[k], q = of_q * q_[k], twice = 2 / (p + q + A(1e-37));
    const A term = p * log2_(p * twice);
    p_[k] = p;
    e[k] = term;
    sum_p += term;
    sum_q += q * log2_(q * twice);
  }
  kl_q = double(sum_q);
  return double(sum_p);
}

// A thread's scratch.
template <class A>
struct DistillScratch {
  std::vector<A> t, q, shuffled, s;
  Shuffle<A> shuffle;
  explicit DistillScratch(int64_t n) : t(n), q(n), shuffled(n), s(n), shuffle(n) {}
};
template <class A>
std::vector<DistillScratch<A>> scratch_of(int threads, int64_t B) {
  std::vector<DistillScratch<A>> scratch;
  scratch.reserve(threads);
  for (int t = 0; t < threads; ++t) scratch.emplace_back(B);
  return scratch;
}

// Row i: S (B) -> G, T (B) the teachers'.
template <class T, class U>
void distill_row(const Distill& d, int64_t i, T* S, const U* teacher, bool grad, DistillScratch<acc_t<T>>& w) {
  using A = acc_t<T>;
  const int64_t n = d.B - 1;
  A low = INFINITY, unused = INFINITY;
  A top = gather(teacher, i, w.t.data(), A(-INFINITY), low);
  top = gather(teacher + i + 1, n - i, w.t.data() + i, top, low);
  double dot_t, dot;
  const double z_t = exponentials(w.t.data(), top, A(d.inv_teacher * kLog2e), w.q.data(), n, dot_t);
  const A* q = w.q.data();
  if (d.cut.kind != GroupKind::none && z_t > 0 && z_t < INFINITY) {  // a row with NaN stays as it is
    w.shuffle.run(d, i, w.t.data(), top, low, q, w.shuffled.data(), n);
    q = w.shuffled.data();
  }
  A* s = w.s.data();
  top = gather(S, i, s, A(-INFINITY), unused);
  top = gather(S + i + 1, n - i, s + i, top, unused);
  const double z = student(s, q, top, A(d.inv_student * kLog2e), n, dot);
  const double coef = (d.coef ? double(static_cast<const A*>(d.coef)[i]) : d.coef_all) * d.inv_student;

  double loss = std::log2(z) - dot / z_t;  // ce, in bits
  if (d.divergence == Divergence::kl) loss -= std::log2(z_t) - dot_t / z_t;
  if (d.divergence == Divergence::js) {
    double kl_q;
    const double kl_p = jensen_shannon(s, q, A(1 / z), A(1 / z_t), w.t.data(), n, kl_q);
    loss = (kl_p + kl_q) / 2;
    if (grad) {
      difference(s, w.t.data(), A(coef * kLn2 / 2), A(coef * kLn2 / 2 * kl_p), S, i);
      difference(s + i, w.t.data() + i, A(coef * kLn2 / 2), A(coef * kLn2 / 2 * kl_p), S + i + 1, n - i);
    }
  } else if (grad) {
    difference(s, q, A(coef / z), A(coef / z_t), S, i);
    difference(s + i, q + i, A(coef / z), A(coef / z_t), S + i + 1, n - i);
  }
  if (grad) store(S[i], A(0));
  static_cast<A*>(d.loss)[i] = A(loss * kLn2);
}

template <class T, class U>
void distill_panel(const Distill& d, const Panel& panel, const void* teachers, int64_t ld, bool grad) {
  auto scratch = scratch_of<acc_t<T>>(panel.threads, d.B);
#pragma omp parallel for num_threads(panel.threads) schedule(static)
  for (int64_t k = 0; k < panel.c; ++k)
    distill_row(d, panel.i0 + k, static_cast<T*>(panel.S) + k * panel.ld, static_cast<const U*>(teachers) + k * ld,
                grad, scratch[thread_index()]);
}

template <class T>
void distill_student(const Distill& d, const Panel& panel, DType type, const void* teachers, int64_t ld, bool grad) {
  switch (type) {
    case DType::f32: return distill_panel<T, float>(d, panel, teachers, ld, grad);
    case DType::bf16: return distill_panel<T, bf16>(d, panel, teachers, ld, grad);
    case DType::f64: return distill_panel<T, double>(d, panel, teachers, ld, grad);
  }
}

inline void distill(const Distill& d, const Panel& panel, DType type, const void* teachers, int64_t ld, bool grad) {
  switch (panel.dtype) {
    case DType::f32: return distill_student<float>(d, panel, type, teachers, ld, grad);
    case DType::bf16: return distill_student<bf16>(d, panel, type, teachers, ld, grad);
    case DType::f64: return distill_student<double>(d, panel, type, teachers, ld, grad);
  }
}

}  // namespace pycse::PYCSE_ISA
