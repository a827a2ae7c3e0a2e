// Distillation, one row: the student's similarities s and the teachers' t, softmaxes, Group-P shuffle, divergence, gradient.
// The threads of a block share a row.
//
//   p_j = 2^(x_j - top) / z          x_j = s_j / (tau_s log 2), in bits; j over the row's columns but the diagonal
//   q_j = e_j / z_t                  e_j = 2^((t_j - max t) / (tau_t log 2)); shuffled inside its groups, or averaged
//   ce  L = -sum q log p             kl  L = ce - H(q)               dL/ds_j = (p_j - q_j) / tau_s
//   js  L = (KL(q | a) + KL(p | a)) / 2, a = (p + q) / 2             dL/ds_j = p_j (log(p_j / a_j) - KL(p | a)) / (2 tau_s)
//   G_j = coef_i dL/ds_j over s, 0 on the diagonal
//
// Groups without a sort (pycse/grouping.py defines them, common/groups.h says where they are cut):
//   bins      equal ranges of t, descending; a bin that no boundary cuts lies in one group as a whole
//   cut bins  each member counts those of its bin that rank before it (t descending, lower column first): the square of a
//             bin's members, so rows whose t are mostly equal cost B^2
//   slot      a group's name: the rank of its first member. Slots are the beginnings of the groups in any array by rank
//   sample    member n's key is a Philox word; keys are uniform, so slot + key count / 2^32 is a bucket of about one
//             member; the member at place n receives q of the one whose key ranks n-th, ties by column
//   expected  every member receives the group's mean q, summed in fixed point
// All that is added by many threads at once is an integer: no result depends on an order. Stored: G over S; seven integers
// a column, in shared memory while they fit. Traffic: T and S are read from memory once and G written once, the other
// visits find them in L2; q is made again from t in every visit, not stored.
#pragma once
#include "../common/philox.h"
#include "block.h"

namespace pycse::cuda {

constexpr int kFewestBins = 32, kMostBins = 1024;  // 17 KB of shared memory

struct Bins {
  unsigned long long before[kMostBins];  // mass, then the sum of the bins before
  int first[kMostBins];                  // members, then the rank of the first
  int next[kMostBins];                   // where a cut bin's next member goes
  bool cut[kMostBins];
};

// f(j) for every column but `skip`, shared out over the threads.
template <class Block, class F>
PYCSE_BODY void columns_but(Block block, int n, int skip, F f) {
  for (int j = block.index(); j < n; j += block.size())
    if (j != skip) f(j);
}

template <class Block, class A>
PYCSE_BODY void fill(Block block, A* x, int n, A value) {
  for (int j = block.index(); j < n; j += block.size()) x[j] = value;
}

// Running op over x, in place, each with itself or (exclusive) without. Returns op over all. `none` is op's neutral.
template <bool Exclusive, class Block, class A, class Op>
PYCSE_BODY A scan(Block block, A* x, int n, A none, Op op) {
  A so_far = none;
  for (int base = 0; base < n; base += block.size()) {
    const int j = base + block.index();
    A all, own = block.scan(j < n ? x[j] : none, op, all);
    if constexpr (Exclusive) {
      const A value = j < n ? x[j] : none;
      own -= value;  // of sums only
    }
    if (j < n) x[j] = op(so_far, own);
    so_far = op(so_far, all);
  }
  block.sync();
  return so_far;
}

// A row of teacher similarities: t in the accumulation type, and what follows from its extremes.
template <class A, class U>
struct TeacherRow {
  const U* T;
  A top, sharp, by_group, per_range;  // 1 / (tau log 2) of q and of the masses; bins per unit of t
  int bins;

  PYCSE_BODY A t(int j) const { return A(load(T[j])); }
  PYCSE_BODY A bits(int j) const { return sharp * (t(j) - top); }
  PYCSE_BODY A e(int j) const { return exp2_(bits(j)); }
  PYCSE_BODY int mass(A t) const { return int(exp2_(by_group * (t - top)) * A(kMassOne)); }
  PYCSE_BODY int bin(A t) const {
    const A x = (top - t) * per_range, last = A(bins - 1);
    return int(x < last ? x : last);
  }
};

// Memory for a row's groups, and where their results are.
struct Groups {
  int* slot;      // by column
  int* start;     // by rank: the slot; then members of the slot numbered so far; then the buckets' ends
  int* count;     // by slot: members
  int* id;        // by slot: the group as its definition counts, -1 stays in place; then columns by rank of their key
  int* list;      // by rank: members of cut bins; then of buckets
  int* position;  // by column: the slot plus the number of members before; then the column that q comes from
  uint32_t* key;  // by column
  unsigned long long* sum;  // by slot: of e in fixed point. Shares memory with position and key

  PYCSE_BODY Groups(int* memory, int B) {
    const int64_t n = scratch_width(B) / kGroupArrays;
    slot = memory, start = memory + n, count = memory + 2 * n, id = memory + 3 * n, list = memory + 4 * n;
    position = memory + 5 * n, key = reinterpret_cast<uint32_t*>(memory + 6 * n);
    sum = reinterpret_cast<unsigned long long*>(memory + 5 * n);
  }
};

// slot, and count and id of every slot, for the row's B columns but i.
template <class Block, class A, class U>
PYCSE_BODY void find_groups(Block block, const Grouping& cut, const TeacherRow<A, U>& row, int B, int i, Bins& bins,
                            const Groups& to) {
  const bool by_mass = cut.kind == GroupKind::mass;
  const int n = B - 1;
  const auto weight = [&](A t) { return by_mass ? row.mass(t) : 1; };

  block.sync();  // the row before is done with the memory
  fill(block, bins.before, row.bins, 0ull);
  fill(block, bins.first, row.bins, 0);
  fill(block, to.list, n, -1);
  fill(block, to.start, n, 0);  // the rank 0 begins the first group
  if (block.index() == 0) to.id[0] = int(cut.group(0));
  block.sync();
  columns_but(block, B, i, [&](int j) {
    const A t = row.t(j);
    const int b = row.bin(t);
    add(&bins.before[b], static_cast<unsigned long long>(weight(t)));
    add(&bins.first[b], 1);
  });
  block.sync();
  const unsigned long long all = scan<true>(block, bins.before, row.bins, 0ull, Add());
  const double total = double(all);
  scan<true>(block, bins.first, row.bins, 0, Add());
  for (int b = block.index(); b < row.bins; b += block.size()) {
    const unsigned long long after = b + 1 < row.bins ? bins.before[b + 1] : all;
    bins.cut[b] = cut.boundaries(double(bins.before[b]), total) != cut.boundaries(double(after), total);
    bins.next[b] = bins.first[b];
  }
  block.sync();

  columns_but(block, B, i, [&](int j) {
    const int b = row.bin(row.t(j));
    if (bins.cut[b]) to.list[add(&bins.next[b], 1)] = j;
  });
  block.sync();
  for (int x = block.index(); x < n; x += block.size()) {
    const int j = to.list[x];
    if (j < 0) continue;
    const A t = row.t(j);
    const int b = row.bin(t), end = b + 1 < row.bins ? bins.first[b + 1] : n;
    int rank = bins.first[b];
    unsigned long long so_far = bins.before[b];
    for (int y = rank; y < end; ++y) {
      const int other = to.list[y];
      const A u = row.t(other);
      if (u > t || (u == t && other < j)) {
        ++rank;
        so_far += weight(u);
      }
    }
    const int64_t boundaries = cut.boundaries(double(so_far + weight(t)), total);
    to.slot[j] = rank;
    if (boundaries != cut.boundaries(double(so_far), total)) {
      to.start[rank] = rank;
      to.id[rank] = int(cut.group(boundaries));
    }
  }
  block.sync();

  scan<false>(block, to.start, n, 0, Larger());
  columns_but(block, B, i, [&](int j) {
    const int b = row.bin(row.t(j));
    to.slot[j] = to.start[bins.cut[b] ? to.slot[j] : bins.first[b]];
  });
  for (int end = 1 + block.index(); end <= n; end += block.size())
    if (end == n || to.start[end] == end) to.count[to.start[end - 1]] = end - to.start[end - 1];
  block.sync();
}

PYCSE_BODY uint32_t word(const Philox& random, int k) {  // no index into registers
  const uint32_t low = k & 1 ? random.word[1] : random.word[0], high = k & 1 ? random.word[3] : random.word[2];
  return k & 2 ? high : low;
}

// position: the column that each column's q comes from.
template <class Block>
PYCSE_BODY void draw(Block block, uint64_t seed, int B, int i, const Groups& g) {
  const int n = B - 1;
  int *ends = g.start, *by_key = g.id;  // both done with when they are first written
  fill(block, g.start, n, 0);
  block.sync();
  block.number(B, i, g.slot, g.start, g.position);
  block.sync();
  fill(block, ends, n, 0);
  block.sync();
  columns_but(block, B, i, [&](int j) {
    const int slot = g.slot[j], member = g.position[j] - slot, id = g.id[slot];
    uint32_t key = 0;
    int bucket = g.position[j];  // of a member that stays in place: its own
    if (id >= 0) {
      key = word(Philox(seed, uint32_t(member) / 4, uint32_t(id), uint64_t(i)), member % 4);
      bucket = slot + int(uint64_t(key) * uint32_t(g.count[slot]) >> 32);
    }
    g.key[j] = key;
    g.slot[j] = bucket;
    add(&ends[bucket], 1);
  });
  block.sync();
  scan<true>(block, ends, n, 0, Add());
  columns_but(block, B, i, [&](int j) { g.list[add(&ends[g.slot[j]], 1)] = j; });  // beginnings become ends
  block.sync();
  columns_but(block, B, i, [&](int j) {
    const int bucket = g.slot[j], begin = bucket ? ends[bucket - 1] : 0;
    const uint32_t key = g.key[j];
    int rank = begin;
    for (int x = begin; x < ends[bucket]; ++x) {
      const int other = g.list[x];
      const uint32_t its = g.key[other];
      rank += its < key || (its == key && other < j);
    }
    by_key[rank] = j;
  });
  block.sync();
  columns_but(block, B, i, [&](int j) { g.position[j] = by_key[g.position[j]]; });
  block.sync();
}

// sum: of e over each slot's members in units of 2^-bits. Their B terms are at most 1, so they fit in 63 bits.
template <class Block, class A, class U>
PYCSE_BODY void add_up(Block block, const TeacherRow<A, U>& row, int B, int i, double one, const Groups& g) {
  fill(block, g.sum, B - 1, 0ull);
  block.sync();
  columns_but(block, B, i, [&](int j) {
    add(&g.sum[g.slot[j]], static_cast<unsigned long long>(double(row.e(j)) * one));
  });
  block.sync();
}

enum class Source : int { own, drawn, average };

// Row k of the panel, in S's type T; the teachers' in type U.
template <class T, class U, class Block>
PYCSE_BODY void distill_row(Block block, const Distill& d, const Panel& panel, const Teacher& teacher, int k, bool grad,
                            Bins& bins, int* memory) {
  using A = acc_t<T>;
  constexpr int V = kWidth<T>;
  const int B = d.B, i = panel.i0 + k;

  TeacherRow<A, U> row;
  row.T = static_cast<const U*>(teacher.T) + k * teacher.ld;
  row.sharp = A(d.inv_teacher * kLog2e), row.by_group = A(d.inv_group * kLog2e);
  A top = -infinity<A>(), low = top;  // low: of -t
  columns_but(block, B, i, [&](int j) {
    const A t = row.t(j);
    top = larger(top, t), low = larger(low, -t);
  });
  row.top = top = block.max(top);
  low = -block.max(low);
  A z_t = 0, dot_t = 0;
  columns_but(block, B, i, [&](int j) {
    const A bits = row.bits(j), e = exp2_(bits);
    z_t += e;
    dot_t += e == 0 ? A(0) : e * bits;
  });
  z_t = block.sum(z_t);
  dot_t = block.sum(dot_t);

  const Groups groups(memory, B);
  Source source = Source::own;
  double one = 0x1p62;  // of fixed point
  for (int n = B; n > 1; n /= 2) one /= 2;
  if (d.cut.kind != GroupKind::none && z_t > 0 && z_t < infinity<A>()) {  // a row with NaN stays as it is
    row.bins = kFewestBins;
    while (row.bins < kMostBins && row.bins <= B / 4) row.bins *= 2;
    const A range = top - low;
    row.per_range = range > 0 && range < infinity<A>() ? A(row.bins) / range : range > 0 ? A(row.bins) / 4 : A(0);
    find_groups(block, d.cut, row, B, i, bins, groups);
    source = d.sample ? Source::drawn : Source::average;
    if (d.sample) draw(block, d.seed_at ? *d.seed_at : d.seed, B, i, groups);
    else add_up(block, row, B, i, one, groups);
  }
  const auto q = [&](int j) {  // z_t q
    if (source == Source::drawn) return row.e(groups.position[j]);
    if (source == Source::own) return row.e(j);
    const int slot = groups.slot[j];
    return groups.id[slot] < 0 ? row.e(j) : A(double(groups.sum[slot]) / (one * groups.count[slot]));
  };

  T* S = static_cast<T*>(panel.S) + k * panel.ld;
  const int head = head_of(S);
  const A scale = A(d.inv_student * kLog2e);
  // f(j, x) for every column but the diagonal, x its logit in bits below the row's maximum; what f returns goes to S.
  A s_top = -infinity<A>();
  columns_but(block, B, i, [&](int j) { s_top = larger(s_top, A(load(S[j]))); });
  s_top = block.max(s_top);
  const auto visit = [&](auto writes, auto f) {
    each<V>(block, B, head, [&](int j, auto width) {
      constexpr int W = decltype(width)::value;
      A s[W];
      read<W>(S + j, true, s);
      PYCSE_UNROLL
      for (int n = 0; n < W; ++n) s[n] = j + n == i ? A(0) : f(j + n, scale * (s[n] - s_top));
      if constexpr (decltype(writes)::value) write<W>(S + j, true, s);
    });
  };

  A z = 0, dot = 0;
  visit(Flag<false>(), [&](int j, A x) {
    z += exp2_(x);
    dot += q(j) * x;
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
    visit(Flag<false>(), [&](int j, A x) {
      const A p = of_p * exp2_(x), its = of_q * q(j);
      kl_p += towards(p, its);
      kl_q += towards(its, p);
      return A(0);
    });
    kl_p = block.sum(kl_p);
    kl_q = block.sum(kl_q);
    loss = (kl_p + kl_q) / 2;
    const A factor = coef * A(kLn2 / 2);
    if (grad)
      visit(Flag<true>(), [&](int j, A x) {
        const A p = of_p * exp2_(x);
        return factor * (towards(p, of_q * q(j)) - p * kl_p);
      });
  } else {
    if (d.divergence == Divergence::kl) loss -= log2(z_t) - dot_t / z_t;
    if (grad) visit(Flag<true>(), [&](int j, A x) { return coef * (of_p * exp2_(x) - of_q * q(j)); });
  }
  if (block.index() == 0) static_cast<A*>(d.loss)[i] = loss * A(kLn2);
}

// Calls run(T(), U()) with values of the student's and the teachers' storage types.
template <class Run>
void distill_variant(DType dtype, DType teacher_type, Run run) {
  with_type(dtype, [&](auto type) {
    with_type(teacher_type, [&](auto teachers) { run(type, teachers); });
  });
}

}  // namespace pycse::cuda
