// A logit as data: quadratics of the cosine similarity s, for host and device. pycse/logits.py says which loss has which
// numbers; 1/temperature is in them, and no kernel knows a loss by name.
//
//   positive             l = (pos_q s + pos_b) s + pos_c              l' = 2 pos_q s + pos_b
//   negative             l = (q s + b) s                              l' = 2 q s + slope
//   own hard negative    l = (q s + b) s + own_b s + own_c            l' = 2 q s + slope
//
// slope differs from b where a part of the value is not differentiated (hardness weighting). Gradients are given for the
// first kGradients coefficients, summed over what a row has: dL/dq = sum P s^2, dL/db = sum P s with P = dL/dl over the
// negatives, and P s^2, P s, P of the positive.
#pragma once
#include "target.h"

namespace pycse {

constexpr int kCoefficients = 8, kGradients = 5;

template <class A>
struct Logit {
  A pos_q, pos_b, pos_c, q, b, slope, own_b, own_c;

  PYCSE_HD A operator()(A s) const { return (q * s + b) * s; }
  PYCSE_HD A derivative(A s) const { return 2 * q * s + slope; }
  PYCSE_HD A positive(A s) const { return (pos_q * s + pos_b) * s + pos_c; }
  PYCSE_HD A positive_derivative(A s) const { return 2 * pos_q * s + pos_b; }
  PYCSE_HD A own(A s) const { return own_b * s + own_c; }  // what an own hard negative has more
  PYCSE_HD bool has_own() const { return own_b != 0 || own_c != 0; }
};

// The coefficients in this order, or where they stand in a device's memory (acc), which no host reads.
struct Coefficients {
  double value[kCoefficients] = {0, 20, 0, 0, 20, 20, 0, 0};
  const void* at = nullptr;

  template <class A>
  PYCSE_HD Logit<A> logit() const {
    const A* x = static_cast<const A*>(at);
    const auto number = [&](int k) { return x ? x[k] : A(value[k]); };
    return {number(0), number(1), number(2), number(3), number(4), number(5), number(6), number(7)};
  }
};

}  // namespace pycse
