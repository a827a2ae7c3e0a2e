// Tokens as lanes: panels of x stored [feature][token], and y brought back to rows, in squares of registers.
#pragma once
#include <utility>

#include "lanes.h"

namespace pycse::PYCSE_ISA {

// Rows i and i + s of a square of 2 s: lanes of a with bit s set change places with lanes of b without it.
template <int s, class A, int... l>
PYCSE_INLINE void exchange(vec_t<A>& a, vec_t<A>& b, std::integer_sequence<int, l...>) {
#if defined(__clang__) || __GNUC__ >= 12
  const vec_t<A> low = __builtin_shufflevector(a, b, ((l & s) ? kLanes<A> + l - s : l)...);
  const vec_t<A> high = __builtin_shufflevector(a, b, ((l & s) ? kLanes<A> + l : l + s)...);
#else
  using I = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  typedef I mask __attribute__((vector_size(kWidth * 4)));
  const vec_t<A> low = __builtin_shuffle(a, b, mask{((l & s) ? kLanes<A> + l - s : l)...});
  const vec_t<A> high = __builtin_shuffle(a, b, mask{((l & s) ? kLanes<A> + l : l + s)...});
#endif
  a = low, b = high;
}

template <class A, int s = kLanes<A> / 2>
PYCSE_INLINE void transpose(vec_t<A>* m) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<A>; ++i)
    if (!(i & s)) exchange<s, A>(m[i], m[i + s], std::make_integer_sequence<int, kLanes<A>>());
  if constexpr (s > 1) transpose<A, s / 2>(m);
}

// out[f][t] = x[t][f] for n tokens of `tokens` (the rest is 0; a multiple of the lanes) and `features` columns.
template <class T, class A>
PYCSE_NOINLINE void to_lanes(const T* x, int64_t ld, int64_t n, int64_t tokens, int64_t features, A* out) {
  constexpr int W = kLanes<A>;
  for (int64_t t = 0; t < tokens; t += W) {
    const int64_t here = std::max<int64_t>(0, std::min<int64_t>(W, n - t));
    int64_t f = 0;
    for (; f + W <= features; f += W) {
      vec_t<A> m[W];
      if (here == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) m[i] = load_lanes(x + (t + i) * ld + f);
      } else {
        for (int i = 0; i < W; ++i) m[i] = i < here ? load_lanes(x + (t + i) * ld + f) : vec_t<A>{};
      }
      transpose<A>(m);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store_lanes(out + (f + i) * tokens + t, m[i]);
    }
    for (; f < features; ++f)
      for (int i = 0; i < W; ++i) out[f * tokens + t + i] = i < here ? A(load(x[(t + i) * ld + f])) : A(0);
  }
}

// y[t][f] = in[f][t] for n tokens of `tokens` and `features` columns. Lines of y are asked for two squares ahead.
// (Stores past the caches take as long where y is in none, and 2.5 times as long where what was in its memory before
// still is.)
template <class T, class A>
PYCSE_NOINLINE void from_lanes(const A* in, int64_t tokens, int64_t n, int64_t features, T* y, int64_t ld) {
  constexpr int W = kLanes<A>;
  for (int64_t t = 0; t < n; t += W) {
    const int64_t here = std::min<int64_t>(W, n - t);
    int64_t f = 0;
    for (; f + W <= features; f += W) {
      vec_t<A> m[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) m[i] = load_lanes(in + (f + i) * tokens + t);
      transpose<A>(m);
      if (here == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          store_lanes(y + (t + i) * ld + f, m[i]);
          __builtin_prefetch(y + (t + i) * ld + f + 2 * W, 1);
        }
      } else {
        for (int i = 0; i < here; ++i) store_lanes(y + (t + i) * ld + f, m[i]);
      }
    }
    for (; f < features; ++f)
      for (int i = 0; i < here; ++i) store(y[(t + i) * ld + f], in[f * tokens + t + i]);
  }
}

}  // namespace pycse::PYCSE_ISA
