// Uniformity, the row kernel: similarities to exponentials of distances. The threads of a block share a row.
//
//   E_kj = 2^(u S_kj + bias_k + bias_j), 0 at j = k     exp(-t |zhat_k - zhat_j|^2) times a constant; u = 2 t / log 2
//   sums_k = sum_{j < c} E_kj + 2 sum_{j >= c} E_kj     keys behind the panel's c rows stand for their mirror images
// Panel: rows [i0, i0 + c), keys [i0, i0 + n). Stored: sums; E over S with Grad. Traffic: the panel, read and written
// once.
#pragma once
#include "block.h"

namespace pycse::cuda {

template <class T, bool Grad, class Block>
PYCSE_BODY void uniformity_row(Block block, const Uniformity& p, const Panel& panel, int n, int k) {
  using A = acc_t<T>;
  constexpr int V = kWidth<T>;
  T* S = static_cast<T*>(panel.S) + k * panel.ld;
  const A* bias = static_cast<const A*>(p.bias) + panel.i0;
  const A own = bias[k], u = A(p.u);
  const int head = head_of(S);
  const bool wide = aligned(bias + head);
  A total = 0;
  each<V>(block, n, head, [&](int j, auto width) {
    constexpr int W = decltype(width)::value;
    A s[W], b[W];
    read<W>(S + j, true, s);
    read<W>(bias + j, wide, b);
    for (int x = 0; x < W; ++x) {
      s[x] = j + x == k ? A(0) : exp2_(u * s[x] + (b[x] + own));
      total += j + x < panel.c ? s[x] : 2 * s[x];
    }
    if constexpr (Grad) write<W>(S + j, true, s);
  });
  total = block.sum(total);
  if (block.index() == 0) static_cast<A*>(p.sums)[panel.i0 + k] = total;
}

// Calls run(T(), Flag<Grad>).
template <class Run>
void uniformity_variant(DType dtype, bool grad, Run run) {
  with_type(dtype, [&](auto type) { with_flag(grad, [&](auto grad) { run(type, grad); }); });
}

}  // namespace pycse::cuda
