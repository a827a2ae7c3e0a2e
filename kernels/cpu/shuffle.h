// Group-P in a row without a sort of it: membership from a histogram of mass, the shuffle by a bucket sort of Philox
// keys.
//
//   bins     equal ranges of t, descending; a bin that no group boundary cuts lies in one group as a whole
//   cut bins their few members are ranked exactly (t descending, lower column first)
//   groups   numbered densely as they occur; members in column order
//   sample   member n's key is a Philox word (common/philox.h); the member at place n receives q of the member whose key
//            ranks n-th, ties by column
//   expected every member receives the group's mean q
// O(n) for any P. pycse/grouping.py defines the result.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "../common/groups.h"
#include "../common/philox.h"
#include "problem.h"
#include "simd.h"

namespace pycse::PYCSE_ISA {

constexpr int64_t kMostBins = 2048, kFewestBins = 32;  // 16 and 8 KB of mass and count: they stay in L1
constexpr int kCounted = 32;  // up to this many keys are sorted by counting the smaller ones

template <class A>
PYCSE_NOINLINE int64_t masses(const A* t, A top, A scale, int32_t* mass, int64_t n) {
  int64_t total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t k = 0; k < n; ++k) {
    mass[k] = int32_t(exp2_(scale * (t[k] - top)) * A(kMassOne));
    total += mass[k];
  }
  return total;
}

template <class A>
PYCSE_NOINLINE void bins_of(const A* t, A top, A scale, A last, int32_t* bin, int64_t n) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const A x = (top - t[k]) * scale;
    bin[k] = int32_t(x < last ? x : last);
  }
}

// Words of the blocks (block_k, group_k) of a row: word w of block k at words[w * stride + k].
PYCSE_NOINLINE void philox_words(uint64_t seed, uint64_t row, const uint32_t* block, const uint32_t* group, int64_t n,
                                 uint32_t* words, int64_t stride) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const Philox random(seed, block[k], group[k], row);
    words[k] = random.word[0];
    words[stride + k] = random.word[1];
    words[2 * stride + k] = random.word[2];
    words[3 * stride + k] = random.word[3];
  }
}

// sorted: (key, column) of n <= kCounted members, each where the number of smaller ones says. No branch depends on a
// key.
PYCSE_NOINLINE void count_smaller(const uint32_t* key, const int32_t* member, int32_t n, uint64_t* sorted) {
  alignas(64) uint64_t x[kCounted];
  for (int32_t k = 0; k < kCounted; ++k) x[k] = k < n ? uint64_t(key[k]) << 32 | uint32_t(member[k]) : ~uint64_t(0);
  const int32_t padded = (n + 7) / 8 * 8;
  for (int32_t k = 0; k < n; ++k) {
    uint64_t smaller = 0;
#pragma omp simd reduction(+ : smaller)
    for (int32_t j = 0; j < padded; ++j) smaller += x[j] < x[k];
    sorted[smaller] = x[k];
  }
}

template <class A>
class Shuffle {
 public:
  explicit Shuffle(int64_t n)
      : mass_(n),
        bin_(n),
        group_(n),
        ranked_(n + 1),
        cut_group_(n),
        member_(n),
        bucket_(2 * n),
        sorted_(n),
        key_(n),
        block_(n),
        block_group_(n),
        words_(4 * n),
        groups_(n + 1) {}

  // out: q shuffled or averaged. t, q of the n columns but the diagonal; top and low bound t.
  void run(const Distill& d, int64_t row, const A* t, A top, A low, const A* q, A* out, int64_t n) {
    const int64_t groups = find_groups(d, t, top, low, n);
    place_members(groups, n);
    if (d.sample) sample(d.seed, row, groups, q, out);
    else average(groups, q, out);
  }

 private:
  struct Group {
    int64_t id;  // as the definition counts; -1: stays in place
    int32_t begin, count, next;
  };

  // group_[k] of every column; returns how many there are, described in groups_.
  int64_t find_groups(const Distill& d, const A* t, A top, A low, int64_t n) {
    const bool by_mass = d.cut.kind == GroupKind::mass;
    const double total = by_mass ? double(masses(t, top, A(d.inv_group * kLog2e), mass_.data(), n)) : double(n);
    const int64_t bins =
        std::clamp<int64_t>(1ll << (63 - __builtin_clzll(uint64_t(n / 2) | 1)), kFewestBins, kMostBins);
    const A range = top - low;
    const A scale = range > 0 && range < A(INFINITY) ? A(bins) / range : range > 0 ? A(bins) / 4 : A(0);
    bins_of(t, top, scale, A(bins - 1), bin_.data(), n);

    int64_t bin_mass[kMostBins];
    int32_t bin_count[kMostBins], label[kMostBins];
    std::fill_n(bin_mass, bins, 0);
    std::fill_n(bin_count, bins, 0);
    if (by_mass)
      for (int64_t k = 0; k < n; ++k) {
        bin_mass[bin_[k]] += mass_[k];
        ++bin_count[bin_[k]];
      }
    else {
      for (int64_t k = 0; k < n; ++k) ++bin_count[bin_[k]];
      std::copy_n(bin_count, bins, bin_mass);
    }

    // Which bins a boundary cuts, and where their members go.
    int64_t so_far = 0, cut_members = 0, g = 0;
    double limit = d.cut.limit(0, total);
    int32_t cut_begin[kMostBins], next[kMostBins], is_cut[kMostBins];
    for (int64_t b = 0; b < bins; ++b) {
      so_far += bin_mass[b];
      is_cut[b] = double(so_far) >= limit;
      if (!is_cut[b]) continue;
      g = d.cut.boundaries(double(so_far), total);
      limit = d.cut.limit(g, total);
      cut_begin[b] = next[b] = int32_t(cut_members);
      cut_members += bin_count[b];
    }
    for (int64_t b = 0; b < bins; ++b)
      if (!is_cut[b]) next[b] = int32_t(cut_members);
    for (int64_t k = 0; k < n; ++k) {  // no branch: members of whole bins are written past the end, again and again
      const int32_t b = bin_[k];
      ranked_[next[b]] = int32_t(k);
      next[b] += is_cut[b];
    }

    // Groups in rank order.
    int64_t count = 0;
    so_far = 0, g = -1;
    limit = -1;
    const auto advance = [&](int64_t mass) {  // to the rank or bin that ends at so_far + mass; its dense group
      so_far += mass;
      if (double(so_far) >= limit) {
        const int64_t boundaries = d.cut.boundaries(double(so_far), total);
        limit = d.cut.limit(boundaries, total);
        if (boundaries != g) groups_[count++] = {d.cut.group(g = boundaries), 0, 0, 0};
      }
      return int32_t(count - 1);
    };
    for (int64_t b = 0; b < bins; ++b) {
      if (bin_count[b] == 0) continue;
      if (!is_cut[b]) {
        label[b] = advance(bin_mass[b]);
        continue;
      }
      int32_t *begin = ranked_.data() + cut_begin[b], *end = begin + bin_count[b];
      std::sort(begin, end, [t](int32_t x, int32_t y) { return t[x] > t[y] || (t[x] == t[y] && x < y); });
      for (int32_t k = 0; k < bin_count[b]; ++k) cut_group_[cut_begin[b] + k] = advance(by_mass ? mass_[begin[k]] : 1);
    }
    for (int64_t k = 0; k < n; ++k) group_[k] = label[bin_[k]];
    for (int64_t k = 0; k < cut_members; ++k) group_[ranked_[k]] = cut_group_[k];
    return count;
  }

  // member_: each group's members in column order.
  void place_members(int64_t groups, int64_t n) {
    for (int64_t k = 0; k < n; ++k) ++groups_[group_[k]].count;
    int32_t begin = 0;
    for (int64_t g = 0; g < groups; ++g) {
      groups_[g].begin = groups_[g].next = begin;
      begin += groups_[g].count;
    }
    for (int64_t k = 0; k < n; ++k) member_[groups_[group_[k]].next++] = int32_t(k);
  }

  void average(int64_t groups, const A* q, A* out) {
    for (int64_t g = 0; g < groups; ++g) {
      const int32_t* member = member_.data() + groups_[g].begin;
      const int32_t n = groups_[g].count;
      double sum = 0;
      for (int32_t k = 0; k < n; ++k) sum += double(q[member[k]]);
      for (int32_t k = 0; k < n; ++k) out[member[k]] = groups_[g].id < 0 ? q[member[k]] : A(sum / n);
    }
  }

  void sample(uint64_t seed, int64_t row, int64_t groups, const A* q, A* out) {
    int64_t blocks = 0;
    for (int64_t g = 0; g < groups; ++g) {
      Group& of = groups_[g];
      of.next = int32_t(blocks);
      if (of.id < 0 || of.count < 2) continue;
      for (int32_t b = 0; b < (of.count + 3) / 4; ++b) {
        block_[blocks] = uint32_t(b);
        block_group_[blocks++] = uint32_t(of.id);
      }
    }
    const int64_t stride = int64_t(block_.size());
    philox_words(seed, uint64_t(row), block_.data(), block_group_.data(), blocks, words_.data(), stride);
    for (int64_t g = 0; g < groups; ++g) {
      const Group& of = groups_[g];
      const int32_t* member = member_.data() + of.begin;
      if (of.id < 0 || of.count < 2) {
        for (int32_t k = 0; k < of.count; ++k) out[member[k]] = q[member[k]];
        continue;
      }
      for (int32_t k = 0; k < of.count; ++k) key_[k] = words_[(k & 3) * stride + of.next + (k >> 2)];
      sort_members(member, of.count);
      for (int32_t k = 0; k < of.count; ++k) out[member[k]] = q[uint32_t(sorted_[k])];
    }
  }

  // sorted_: (key, column) of the group's members, ascending. Keys are uniform: buckets of half a member, then
  // insertion.
  void sort_members(const int32_t* member, int32_t n) {
    if (n <= kCounted) return count_smaller(key_.data(), member, n, sorted_.data());
    const uint32_t buckets = 2 * uint32_t(n);
    std::fill_n(bucket_.data(), buckets, 0);
    for (int32_t k = 0; k < n; ++k) ++bucket_[uint64_t(key_[k]) * buckets >> 32];
    int32_t begin = 0;
    for (uint32_t b = 0; b < buckets; ++b) begin += std::exchange(bucket_[b], begin);
    for (int32_t k = 0; k < n; ++k)
      sorted_[bucket_[uint64_t(key_[k]) * buckets >> 32]++] = uint64_t(key_[k]) << 32 | uint32_t(member[k]);
    for (int32_t k = 1; k < n; ++k) {
      const uint64_t x = sorted_[k];
      int32_t at = k;
      for (; at > 0 && sorted_[at - 1] > x; --at) sorted_[at] = sorted_[at - 1];
      sorted_[at] = x;
    }
  }

  std::vector<int32_t> mass_, bin_, group_, ranked_, cut_group_, member_, bucket_;
  std::vector<uint64_t> sorted_;
  std::vector<uint32_t> key_, block_, block_group_, words_;
  std::vector<Group> groups_;
};

}  // namespace pycse::PYCSE_ISA
