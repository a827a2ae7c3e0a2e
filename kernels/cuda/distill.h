// Distillation, one row: the student's similarities s and the teachers' t, softmaxes, Group-P shuffle, divergence,
// gradient. The threads of a block share a row.
//
//   p_j = 2^(x_j - top) / z          x_j = s_j / (tau_s log 2), in bits; j over the row's columns but the diagonal
//   q_j = e_j / z_t                  e_j = 2^((t_j - max t) / (tau_t log 2)); shuffled inside its groups, or averaged
//   ce  L = -sum q log p             kl  L = ce - H(q)               dL/ds_j = (p_j - q_j) / tau_s
//   js  L = (KL(q | a) + KL(p | a)) / 2, a = (p + q) / 2             dL/ds_j = p_j (log(p_j / a_j) - KL(p | a)) / (2 tau_s)
//   G_j = coef_i dL/ds_j over s, 0 on the diagonal
//
// Groups in O(B), for up to 32 of them:
//   bins      equal ranges of t, descending, with their mass: a bin that no boundary cuts lies in one group as a whole
//   cut bins  each member counts those of its bin that rank before it (t descending, lower column first)
//   order     columns by group, then column: one stable partition by a digit of 5 bits
// With more groups, or where ties fill a cut bin, t is sorted by the same partition, a digit at a time (groups.h).
//   sample    member n's key is a Philox word; keys are uniform, so start + key count / 2^32 is a bucket of about one
//             member. Members go to their buckets, and each counts the smaller keys among its neighbours there; the member
//             at place n receives q of the one whose key ranks n-th, ties by column
//   expected  every member receives the group's mean q
// All that is added by many threads at once is an integer of 32 bits (a 64-bit sum in shared memory is a loop around a
// compare-and-swap): no result depends on an order. Stored: G over S; t and q of a row and three indices a column, in
// shared memory while they fit. Traffic: T is read from memory once where there are groups, S and G as in rows.h.
#pragma once
#include "row_groups.h"

namespace pycse::cuda {

enum class Source : int { own, drawn, average };

// q of the columns that find() has put in order, from e(t): drawn, or each group's mean.
template <class A, class Index, class Block, class E>
PYCSE_BODY void spread(Block block, RowGroups<A, Index>& groups, bool sample, uint64_t seed, A* q, E e) {
  const A* t = groups.t;
  const Index* column = groups.column;
  if (sample) {
    const Index* from = groups.draw(block, seed);
    for (int k = block.index(); k < groups.n; k += block.size()) q[column[k]] = e(t[column[from[k]]]);
  } else {
    const bool together =
        groups.groups <= kDigit;  // the block takes one group after the other; else each thread its own
    for (int g = together ? 0 : block.index(); g < groups.groups; g += together ? 1 : block.size()) {
      const int begin = int(groups.start[g]), end = int(groups.start[g + 1]);
      const int first = begin + (together ? block.index() : 0), step = together ? block.size() : 1;
      A sum = 0;
      for (int k = first; k < end; k += step) sum += e(t[column[k]]);
      if (together) sum = block.sum(sum);
      for (int k = first; k < end; k += step)
        q[column[k]] = int(groups.id[g]) < 0 ? e(t[column[k]]) : sum / A(end - begin);
    }
  }
  block.sync();
}

// Row k of the panel, in S's type T; the teachers' in type U. memory: the row's arrays, where there are groups.
template <class T, class U, class Index, class Block>
PYCSE_BODY void distill_row(Block block, const Distill& d, const Panel& panel, const Teacher& teacher, int k, bool grad,
                            RowTables& few, char* memory) {
  using A = acc_t<T>;
  constexpr int V = kWidth<T>;
  const int B = d.B, i = panel.i0 + k;
  T* S = static_cast<T*>(panel.S) + k * panel.ld;
  const U* row = static_cast<const U*>(teacher.T) + k * teacher.ld;
  const int head = head_of(S), head_t = head_of(row);
  const bool grouped = d.cut.kind != GroupKind::none, wide = aligned(row + head);
  const RowLayout layout(B, sizeof(A), sizeof(Index), few_groups(d.cut, B));
  A* t = shifted(reinterpret_cast<A*>(memory), head_t);

  block.sync();  // the row before is done with the memory
  A top = -infinity<A>(), low = top;  // low: of -t
  each<kWidth<U>>(block, B, head_t, [&](int j, auto width) {
    constexpr int W = decltype(width)::value;
    acc_t<U> x[W];
    A y[W];
    read<W>(row + j, true, x);
    PYCSE_UNROLL
    for (int n = 0; n < W; ++n) {
      y[n] = A(x[n]);
      if (j + n != i) top = larger(top, y[n]), low = larger(low, -y[n]);
    }
    if (grouped) write<W>(t + j, true, y);
  });
  top = block.max(top);
  low = -block.max(low);
  const A sharp = A(d.inv_teacher * kLog2e);
  const auto bits_of = [&](A x) { return sharp * (x - top); };
  const auto e_of = [&](A x) { return exp2_(bits_of(x)); };
  A z_t = 0, dot_t = 0;
  each<kWidth<U>>(block, B, head_t, [&](int j, auto width) {
    constexpr int W = decltype(width)::value;
    acc_t<U> x[W];
    read<W>(row + j, true, x);
    PYCSE_UNROLL
    for (int n = 0; n < W; ++n) {
      if (j + n == i) continue;
      const A bits = bits_of(A(x[n])), e = exp2_(bits);
      z_t += e;
      dot_t += e == 0 ? A(0) : e * bits;
    }
  });
  z_t = block.sum(z_t);
  dot_t = block.sum(dot_t);

  Source source = Source::own;
  A* q = nullptr;
  if (grouped && z_t > 0 && z_t < infinity<A>()) {  // a row with NaN stays as it is
    RowGroups<A, Index> groups(d.cut, B, i, top, low, A(d.inv_group * kLog2e), t, memory + layout.q, memory, layout,
                               few);
    groups.find(block);
    q = shifted(reinterpret_cast<A*>(memory + layout.q), head);
    spread(block, groups, d.sample, d.seed_at ? *d.seed_at : d.seed, q, e_of);
    source = d.sample ? Source::drawn : Source::average;
  }

  const A scale = A(d.inv_student * kLog2e);
  A s_top = -infinity<A>();
  each<V>(block, B, head, [&](int j, auto width) {
    constexpr int W = decltype(width)::value;
    A s[W];
    read<W>(S + j, true, s);
    PYCSE_UNROLL
    for (int n = 0; n < W; ++n)
      if (j + n != i) s_top = larger(s_top, s[n]);
  });
  s_top = block.max(s_top);
  // f(x, z_t q) for every column but the diagonal, x its logit in bits below the row's maximum; what f returns goes to
  // S.
  const auto visit = [&](auto writes, auto f) {
    each<V>(block, B, head, [&](int j, auto width) {
      constexpr int W = decltype(width)::value;
      A s[W], its[W];
      read<W>(S + j, true, s);
      if (source == Source::own) {
        acc_t<U> x[W];
        read<W>(row + j, wide, x);
        PYCSE_UNROLL
        for (int n = 0; n < W; ++n) its[n] = e_of(A(x[n]));
      } else {
        read<W>(q + j, true, its);
      }
      PYCSE_UNROLL
      for (int n = 0; n < W; ++n) s[n] = j + n == i ? A(0) : f(scale * (s[n] - s_top), its[n]);
      if constexpr (decltype(writes)::value) write<W>(S + j, true, s);
    });
  };

  A z = 0, dot = 0;
  visit(Flag<false>(), [&](A x, A its) {
    z += exp2_(x);
    dot += its * x;
    return A(0);
  });
  z = block.sum(z);
  dot = block.sum(dot);
  const A coef = (d.coef ? static_cast<const A*>(d.coef)[i] : A(d.coef_all)) * A(d.inv_student);
  A loss = log2(z) - dot / z_t;  // ce, in bits
  const A of_p = 1 / z, of_q = 1 / z_t;
  if (d.divergence == Divergence::js) {
    const auto towards = [](A p, A q) { return p == 0 ? A(0) : p * log2(2 * (p / (p + q))); };  // p log2(p / a)
    A kl_p = 0, kl_q = 0;
    visit(Flag<false>(), [&](A x, A its) {
      const A p = of_p * exp2_(x), q = of_q * its;
      kl_p += towards(p, q);
      kl_q += towards(q, p);
      return A(0);
    });
    kl_p = block.sum(kl_p);
    kl_q = block.sum(kl_q);
    loss = (kl_p + kl_q) / 2;
    const A factor = coef * A(kLn2 / 2);
    if (grad)
      visit(Flag<true>(), [&](A x, A its) {
        const A p = of_p * exp2_(x);
        return factor * (towards(p, of_q * its) - p * kl_p);
      });
  } else {
    if (d.divergence == Divergence::kl) loss -= log2(z_t) - dot_t / z_t;
    if (grad) visit(Flag<true>(), [&](A x, A its) { return coef * (of_p * exp2_(x) - of_q * its); });
  }
  if (block.index() == 0) static_cast<A*>(d.loss)[i] = loss * A(kLn2);
}

// Bytes of a row's arrays with indices of so many bytes; 0 without groups.
inline int64_t row_bytes(const Distill& d, DType dtype, int index) {
  if (d.cut.kind == GroupKind::none) return 0;
  return RowLayout(d.B, dtype == DType::f64 ? 8 : 4, index, few_groups(d.cut, d.B)).bytes;
}

// Calls run(T(), U(), Index()) with values of the student's and the teachers' storage types, and of an index.
template <class Run>
void distill_variant(DType dtype, DType teacher_type, bool wide_index, Run run) {
  with_type(dtype, [&](auto type) {
    with_type(teacher_type, [&](auto teachers) {
      if (wide_index) run(type, teachers, uint32_t());
      else run(type, teachers, uint16_t());
    });
  });
}

}  // namespace pycse::cuda
