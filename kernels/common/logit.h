// The logit of InfoNCE and Focal-InfoNCE as one quadratic of the cosine similarity s, for host and device.
//
//   l(s)  = (q s + b) s / tau        l'(s) = (2 q s + b) / tau
//
//   Focal-InfoNCE  negative: q = 1, b = m      positive: q = 1, b = 0     (arXiv 2310.06918, eq. 5)
//   InfoNCE        negative: q = 0, b = 1      positive: q = 0, b = 1
#pragma once

#ifdef __CUDACC__
#define PYCSE_HD __host__ __device__ __forceinline__
#else
#define PYCSE_HD inline __attribute__((always_inline))
#endif

namespace pycse {

template <class A>
struct Logit {
  A q, b, inv_tau;
  PYCSE_HD A operator()(A s) const { return (q * s + b) * s * inv_tau; }
  // tau l'(s): the factor 1/tau is the same for a whole row and is applied once, with the row's other factors.
  PYCSE_HD A slope(A s) const { return 2 * q * s + b; }
};

template <class A>
PYCSE_HD Logit<A> negative_logit(bool focal, A m, A inv_tau) {
  return focal ? Logit<A>{1, m, inv_tau} : Logit<A>{0, 1, inv_tau};
}

template <class A>
PYCSE_HD Logit<A> positive_logit(bool focal, A inv_tau) {
  return focal ? Logit<A>{1, 0, inv_tau} : Logit<A>{0, 1, inv_tau};
}

}  // namespace pycse
