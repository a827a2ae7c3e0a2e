// Group-P in one row, for the distillation kernel: groups of the columns, and the column that each column's q comes
// from. The algorithm stands in distill.h, the definition in pycse/grouping.py and common/groups.h.
#pragma once
#include "../common/philox.h"
#include "block.h"

namespace pycse::cuda {

constexpr int kDigit = 32;  // values of a digit
constexpr int kPartitionWarps = 32;
constexpr int kMostNarrow = 65535;  // columns up to which indices of 16 bits do
constexpr int kFewestBins = 32, kMostBins = 8192;

// Groups of a row of B columns are numbered below this; the partition takes up to kDigit at once.
PYCSE_HD double most_groups(const Grouping& cut, int B) {
  if (cut.kind == GroupKind::span) return 3;
  return cut.kind == GroupKind::mass ? ceil(1 / cut.value) : ceil(double(B) / cut.value);
}
PYCSE_HD bool few_groups(const Grouping& cut, int B) { return most_groups(cut, B) <= kDigit; }

PYCSE_HD constexpr int bins_for(int B) {
  int bins = kFewestBins;
  while (bins < kMostBins && bins <= B / 4) bins *= 2;
  return bins;
}

// Where a row's arrays stand in its memory, in bytes: 14 B for fp32 with 16-bit indices and few groups.
struct RowLayout {
  int64_t q, column, sorted, ends, tables, bytes;

  PYCSE_HD RowLayout(int B, int acc, int index, bool few) {
    const auto up = [](int64_t n) { return (n + 15) / 16 * 16; };
    const int64_t value = up(int64_t(acc) * B + 16), indices = up(int64_t(index) * B);  // 16: see shifted()
    q = value, column = q + value, sorted = column + indices, ends = sorted + indices;
    const int64_t counts = 4 * kDigit * kPartitionWarps, bins = 8 * int64_t(bins_for(B)) - indices;
    const int64_t last = indices > counts ? indices : counts;
    tables = ends + up(last > bins ? last : bins);
    bytes = tables + (few ? 0 : 3 * up(4 * (int64_t(B) + 1)));
  }
};

// x so that x + head stands at a 16-byte boundary, as a row does that is read in vectors from `head` on.
template <class A>
PYCSE_BODY A* shifted(A* x, int head) {
  constexpr int V = kAccess / int(sizeof(A));
  return x + (V - head % V) % V;
}

// What a thread block keeps besides, for few groups.
struct RowTables {
  double limit[kDigit];
  unsigned long long before[kDigit];
  int bin[kDigit];
  int begin[kDigit + 1], next[kDigit];  // of the list of a cut bin's members
  int listed;
  uint32_t start[kDigit + 1], id[kDigit + 1], block[kDigit + 1];
};

// Counters that many threads advance. 16 bits: two to a word, since there are no atomics of 16 bits in shared memory.
template <class Index>
struct Counters {
  Index* at;
  PYCSE_BODY uint32_t advance(int k) const {
    if constexpr (sizeof(Index) == 2) {
      const int shift = 16 * (k % 2);
      return add(reinterpret_cast<uint32_t*>(at) + k / 2, 1u << shift) >> shift & 0xffffu;
    } else {
      return add(at + k, Index(1));
    }
  }
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

// Sums so far of value(k), k < n, without value(k) itself: put(k, sum). Returns the sum of all.
template <class A, class Block, class Value, class Put>
PYCSE_BODY A sums_before(Block block, int n, Value value, Put put) {
  A so_far = 0;
  PYCSE_ROLL
  for (int base = 0; base < n; base += block.size()) {
    const int k = base + block.index();
    const A own = k < n ? value(k) : A(0);
    A all;
    const A through = block.scan(own, Add(), all);
    if (k < n) put(k, so_far + through - own);
    so_far += all;
  }
  block.sync();
  return so_far;
}

// The last k < n with x[k] <= value; x ascends and x[0] <= value.
template <class A>
PYCSE_BODY int last_not_above(const A* x, int n, A value) {
  int low = 0;
  for (int high = n; high - low > 1;) {
    const int middle = low + (high - low) / 2;
    (x[middle] <= value ? low : high) = middle;
  }
  return low;
}

// t in an order of unsigned integers, largest t first; -0 is 0.
PYCSE_BODY uint32_t descending(float t) {
  const uint32_t u = bit_cast<uint32_t>(t == 0 ? 0.0f : t);
  return u >> 31 ? u : ~(u | 0x80000000u);
}
PYCSE_BODY uint64_t descending(double t) {
  const uint64_t u = bit_cast<uint64_t>(t == 0 ? 0.0 : t);
  return u >> 63 ? u : ~(u | uint64_t(1) << 63);
}

// The groups of one row. A: accumulation type. Index: of a column or a rank.
template <class A, class Index>
struct RowGroups {
  const Grouping& cut;
  int B, i, n;  // columns, the row's own, those without it
  A top, by_group, per_range;  // 1 / (group temperature log 2); bins per unit of t
  const A* t;  // by column
  uint32_t* group;  // by column: boundaries before it. Then the keys, by place
  Index *column, *sorted, *ends;
  char* memory;
  RowTables& few;
  // By group: first rank, what the definition calls it (-1 stays in place), first block of four keys; and how many
  // there are.
  uint32_t *start, *id, *block_at;
  int groups;

  PYCSE_BODY RowGroups(const Grouping& cut, int B, int i, A top, A low, A by_group, const A* t, void* q, char* memory,
                       const RowLayout& layout, RowTables& few)
      : cut(cut),
        B(B),
        i(i),
        n(B - 1),
        top(top),
        by_group(by_group),
        t(t),
        group(static_cast<uint32_t*>(q)),
        column(reinterpret_cast<Index*>(memory + layout.column)),
        sorted(reinterpret_cast<Index*>(memory + layout.sorted)),
        ends(reinterpret_cast<Index*>(memory + layout.ends)),
        memory(memory),
        few(few),
        start(few.start),
        id(few.id),
        block_at(few.block),
        groups(0) {
    const A range = top - low;
    const int bins = bins_for(B);
    per_range = range > 0 && range < infinity<A>() ? A(bins) / range : range > 0 ? A(bins) / 4 : A(0);
    if (!few_groups(cut, B)) {
      start = reinterpret_cast<uint32_t*>(memory + layout.tables);
      id = start + (B + 4) / 4 * 4, block_at = id + (B + 4) / 4 * 4;
    }
  }

  PYCSE_BODY uint32_t mass(A x) const {
    return cut.kind == GroupKind::mass ? uint32_t(exp2_(by_group * (x - top)) * A(kMassOne)) : 1u;
  }
  PYCSE_BODY int bin(A x) const {
    const A place = (top - x) * per_range, last = A(bins_for(B) - 1);
    return int(place < last ? place : last);
  }

  // `column`: the row's columns but i by group, then column. start, id, block_at and groups.
  template <class Block> PYCSE_BODY void find(Block block) {
    const bool few_of_them = few_groups(cut, B);
    if (!few_of_them || !by_bins(block)) by_sorting(block);
    int* counts = reinterpret_cast<int*>(ends);
    const auto own = [&](int k) { return k + (k >= i); };  // the k-th column but i
    if (few_of_them) {
      block.partition(
          n, counts, [&](int k) { return int(group[own(k)]); }, [&](int k, int to) { column[to] = Index(own(k)); },
          start);
      groups = kDigit;
      block.sync();
      for (int g = block.index(); g < kDigit; g += block.size()) id[g] = uint32_t(int(cut.group(g)));
    } else {
      order_by(block, counts, own, 32, [&](int j) { return group[j]; });
      const auto first = [&](int k) { return k == 0 || group[column[k]] != group[column[k - 1]]; };
      groups = int(sums_before<int>(
          block, n, [&](int k) { return int(first(k)); },
          [&](int k, int g) {
            if (!first(k)) return;
            start[g] = uint32_t(k);
            id[g] = uint32_t(int(cut.group(int64_t(group[column[k]]))));
          }));
      if (block.index() == 0) start[groups] = uint32_t(n);
    }
    block.sync();
    const uint32_t blocks = sums_before<uint32_t>(
        block, groups, [&](int g) { return (start[g + 1] - start[g] + 3) / 4; },
        [&](int g, uint32_t at) { block_at[g] = at; });
    if (block.index() == 0) block_at[groups] = blocks;
    block.sync();
  }

  // The rank, in `column`, that each rank's q comes from. `group` has served.
  template <class Block> PYCSE_BODY const Index* draw(Block block, uint64_t seed) {
    uint32_t* key = group;
    const Counters<Index> counters = {ends};
    // f(rank, bucket, key) for every member.
    const auto members = [&](auto f) {
      const int blocks = int(block_at[groups]);
      PYCSE_ROLL
      for (int b = block.index(); b < blocks; b += block.size()) {
        const int g = last_not_above(block_at, groups, uint32_t(b)), quad = b - int(block_at[g]);
        const uint32_t begin = start[g], count = start[g + 1] - begin;
        const bool stays = int(id[g]) < 0;
        const Philox random(seed, uint32_t(quad), id[g], uint64_t(i));
        PYCSE_UNROLL
        for (int k = 0; k < 4; ++k) {
          const uint32_t member = 4 * uint32_t(quad) + k;
          if (member >= count) continue;
          const uint32_t place = stays ? member : uint32_t(uint64_t(random.word[k]) * count >> 32);
          f(int(begin + member), int(begin + place), random.word[k]);
        }
      }
    };
    fill(block, ends, n + n % 2, Index(0));  // whole words
    block.sync();
    members([&](int, int bucket, uint32_t) { counters.advance(bucket); });
    block.sync();
    sums_before<uint32_t>(
        block, n, [&](int k) { return uint32_t(ends[k]); }, [&](int k, uint32_t at) { ends[k] = Index(at); });
    members([&](int rank, int bucket, uint32_t own) {
      const uint32_t to = counters.advance(bucket);
      key[to] = own;
      sorted[to] = Index(rank);
    });
    block.sync();
    Index* from = ends;
    for (int x = block.index(); x < n; x += block.size()) {
      const int g = last_not_above(start, groups, uint32_t(x));
      const int begin = int(start[g]), end = int(start[g + 1]);
      if (int(id[g]) < 0) {
        from[x] = Index(x);
        continue;
      }
      const uint32_t own = key[x], count = uint32_t(end - begin), rank = sorted[x];
      const auto bucket = [&](uint32_t k) { return uint32_t(uint64_t(k) * count >> 32); };
      const auto smaller = [&](int y) { return key[y] < own || (key[y] == own && sorted[y] < rank); };
      int to = x;
      for (int y = x - 1; y >= begin && bucket(key[y]) == bucket(own); --y) to -= !smaller(y);
      for (int y = x + 1; y < end && bucket(key[y]) == bucket(own); ++y) to += smaller(y);
      from[to] = Index(rank);
    }
    block.sync();
    return from;
  }

 private:
  // `group` of every column, or false where the cut bins have so many members that sorting all is quicker.
  template <class Block> PYCSE_BODY bool by_bins(Block block) {
    const int bins = bins_for(B), boundaries = int(most_groups(cut, B)) - 1;
    uint32_t* low = reinterpret_cast<uint32_t*>(sorted);  // with the high half behind it; then the sum of both
    unsigned long long* through = reinterpret_cast<unsigned long long*>(sorted);
    fill(block, low, 2 * bins, 0u);
    if (block.index() == 0) few.listed = 0;
    block.sync();
    if (B <= 1 << 18) {  // sums of 2^14 each fit in 32 bits
      columns_but(block, B, i, [&](int j) {
        const uint32_t own = mass(t[j]), at = 2 * bin(t[j]);
        add(&low[at], own & 0x3fffu);
        if (own >> 14) add(&low[at + 1], own >> 14);
      });
      block.sync();
      for (int b = block.index(); b < bins; b += block.size())
        through[b] = low[2 * b] + (static_cast<unsigned long long>(low[2 * b + 1]) << 14);
    } else {
      columns_but(block, B, i, [&](int j) { add(&through[bin(t[j])], static_cast<unsigned long long>(mass(t[j]))); });
    }
    block.sync();
    const double total = double(sums_before<unsigned long long>(
        block, bins, [&](int b) { return through[b]; }, [&](int b, unsigned long long at) { through[b] += at; }));

    // Boundary g falls into the first bin that reaches it, or none.
    for (int g = block.index(); g < boundaries; g += block.size()) {
      const double limit = cut.limit(g, total);
      int first = 0;
      for (int left = bins; left > 0;) {
        const int half = left / 2;
        if (double(through[first + half]) >= limit) left = half;
        else first += half + 1, left -= half + 1;
      }
      few.limit[g] = limit, few.bin[g] = first, few.before[g] = first ? through[first - 1] : 0;
    }
    fill(block, few.next, kDigit, 0);
    block.sync();
    const auto before = [&](int b) {  // boundaries in bins before b
      int g = 0;
      while (g < boundaries && few.bin[g] < b) ++g;
      return g;
    };
    columns_but(block, B, i, [&](int j) {
      const int b = bin(t[j]), g = before(b);
      group[j] = uint32_t(g);
      if (g < boundaries && few.bin[g] == b) {  // the bin's members go by its first boundary
        add(&few.next[g], 1);
        column[add(&few.listed, 1)] = Index(j);
      }
    });
    block.sync();
    const int listed = few.listed;
    double pairs = 0;
    int so_far = 0;
    for (int g = 0; g < boundaries; ++g) {
      const int members = few.next[g];
      pairs += double(members) * members;
      if (block.index() == 0) few.begin[g] = so_far;
      so_far += members;
    }
    block.sync();
    if (pairs > 32.0 * n) return false;
    for (int g = block.index(); g < boundaries; g += block.size()) few.next[g] = few.begin[g];
    block.sync();
    Index* list = sorted;  // the bins have served
    for (int x = block.index(); x < listed; x += block.size()) {
      const int j = column[x];
      list[add(&few.next[group[j]], 1)] = Index(j);
    }
    block.sync();
    for (int x = block.index(); x < listed; x += block.size()) {
      const int j = list[x], first = int(group[j]);
      const A own = t[j];
      unsigned long long so_far = few.before[first] + mass(own);
      for (int y = few.begin[first]; y < few.next[first]; ++y) {
        const int other = list[y];
        const A its = t[other];
        if (its > own || (its == own && other < j)) so_far += mass(its);
      }
      int g = first;
      while (g < boundaries && few.limit[g] <= double(so_far)) ++g;
      group[j] = uint32_t(g);
    }
    block.sync();
    return true;
  }

  // The same from the columns sorted by t.
  template <class Block> PYCSE_BODY void by_sorting(Block block) {
    block.sync();
    const auto own = [&](int k) { return k + (k >= i); };
    order_by(block, reinterpret_cast<int*>(ends), own, 8 * int(sizeof(A)), [&](int j) { return descending(t[j]); });
    unsigned long long all = 0;
    columns_but(block, B, i, [&](int j) { all += mass(t[j]); });
    const double total = double(block.sum(all));
    sums_before<unsigned long long>(
        block, n, [&](int k) { return static_cast<unsigned long long>(mass(t[column[k]])); },
        [&](int k, unsigned long long so_far) {
          const int j = column[k];
          group[j] = uint32_t(cut.boundaries(double(so_far + mass(t[j])), total));
        });
  }

  // `column`: own(0 ... n - 1) in ascending order of value(j), whose low `bits` count; stable.
  template <class Block, class Own, class Value>
  PYCSE_BODY void order_by(Block block, int* counts, Own own, int bits, Value value) {
    const int passes = (bits + 4) / 5;
    Index *in = passes % 2 ? sorted : column, *out = passes % 2 ? column : sorted;
    for (int k = block.index(); k < n; k += block.size()) in[k] = Index(own(k));
    block.sync();
    PYCSE_ROLL
    for (int pass = 0; pass < passes; ++pass) {
      block.partition(
          n, counts, [&](int k) { return int(value(in[k]) >> 5 * pass & 31u); },
          [&](int k, int to) { out[to] = in[k]; }, static_cast<uint32_t*>(nullptr));
      block.sync();
      Index* other = in;
      in = out, out = other;
    }
  }
};

}  // namespace pycse::cuda
