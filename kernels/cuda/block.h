// The threads that share one row. A kernel's body is a template over them: on the device a thread block, a warp or a
// slice of columns; on the host one thread or fibers, so that every line of a body runs where there is no GPU.
//
//   index(), size()     this thread among the threads of the row
//   sum(x), max(x)      over those threads, to all of them, in a fixed order
//   sync()              what was written before is read after
//   scan(x, op)         op over the threads up to this one, and through `all` over all of them
//   partition(...)      stable, by a digit
#pragma once
#include "../common/loss.h"
#include "contrastive.h"

#ifndef __CUDACC__
#include "fibers.h"
#endif

#ifdef __CUDACC__
#define PYCSE_BODY __device__ __forceinline__
#define PYCSE_UNROLL _Pragma("unroll")  // where an index at run time would put registers in local memory
#define PYCSE_ROLL _Pragma("unroll 1")
#else
#define PYCSE_BODY inline
#define PYCSE_UNROLL
#define PYCSE_ROLL
#endif

namespace pycse::cuda {

struct Add {
  template <class A> PYCSE_BODY A operator()(A x, A y) const { return x + y; }
};
struct Larger {
  template <class A> PYCSE_BODY A operator()(A x, A y) const { return larger(x, y); }
};

// The threads of a block: a GPU's, or fibers.
#ifdef __CUDACC__
#define PYCSE_SHARED __shared__
PYCSE_BODY int thread_index() { return threadIdx.x; }
PYCSE_BODY int thread_count() { return blockDim.x; }
PYCSE_BODY void sync_block() { __syncthreads(); }
PYCSE_BODY void sync_warp() { __syncwarp(); }
PYCSE_BODY unsigned ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
PYCSE_BODY int count_bits(unsigned x) { return __popc(x); }
template <class A> PYCSE_BODY A from_lane(A x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
template <class A> PYCSE_BODY A from_opposite(A x, int distance) { return __shfl_xor_sync(0xffffffffu, x, distance); }
template <class A> PYCSE_BODY A from_below(A x, int distance) { return __shfl_up_sync(0xffffffffu, x, distance); }
#else
#define PYCSE_SHARED static
inline int thread_index() { return Fibers::now().index(); }
inline int thread_count() { return Fibers::now().size(); }
inline void sync_block() { Fibers::now().sync(); }
inline void sync_warp() { Fibers::now().sync_warp(); }
inline int count_bits(unsigned x) { return __builtin_popcount(x); }
template <class A> A from_lane(A x, int lane) {
  return Fibers::now().meet(x, [=](const A* all) { return all[lane & 31]; });
}
template <class A> A from_opposite(A x, int distance) { return from_lane(x, thread_index() ^ distance); }
template <class A> A from_below(A x, int distance) {
  const int lane = thread_index() % 32;
  return from_lane(x, lane < distance ? lane : lane - distance);
}
inline unsigned ballot(bool x) {
  return Fibers::now().meet(x, [](const bool* all) {
    unsigned mask = 0;
    for (int lane = 0; lane < 32; ++lane) mask |= unsigned(all[lane]) << lane;
    return mask;
  });
}
#endif

template <class A, class Op>
PYCSE_BODY A warp_reduce(A x, Op op) {
  for (int distance = 16; distance; distance /= 2) x = op(x, from_opposite(x, distance));
  return x;
}

struct Warp {
  PYCSE_BODY int index() const { return thread_index() % 32; }
  PYCSE_BODY int size() const { return 32; }
  PYCSE_BODY void sync() const { sync_warp(); }
  template <class A> PYCSE_BODY A sum(A x) const { return warp_reduce(x, Add()); }
  template <class A> PYCSE_BODY A max(A x) const { return warp_reduce(x, Larger()); }
};

struct ThreadBlock {
  PYCSE_BODY int index() const { return thread_index(); }
  PYCSE_BODY int size() const { return thread_count(); }
  PYCSE_BODY void sync() const { sync_block(); }
  template <class A> PYCSE_BODY A sum(A x) const { return reduce(x, Add()); }
  template <class A> PYCSE_BODY A max(A x) const { return reduce(x, Larger()); }

  template <class A, class Op>
  PYCSE_BODY A scan(A x, Op op, A& all) const {
    PYCSE_SHARED A partial[32];
    const int lane = thread_index() % 32, own = thread_index() / 32;
    for (int distance = 1; distance < 32; distance *= 2) {
      const A left = from_below(x, distance);
      if (lane >= distance) x = op(left, x);
    }
    sync_block();  // what an earlier scan left here has been read
    if (lane == 31) partial[own] = x;
    sync_block();
    all = partial[0];
    A before = all;
    for (int warp = 1; warp < thread_count() / 32; ++warp) {
      if (warp == own) before = all;
      all = op(all, partial[warp]);
    }
    return own == 0 ? x : op(before, x);
  }

  // put(k, place) for k < n in stable order of digit(k), which is below 32; start (or null): where each digit begins,
  // and n.
  // counts: 1024. A warp has a stretch of k, and its lanes a digit each: the mask of a step's lanes that have it.
  template <class Digit, class Put>
  PYCSE_BODY void partition(int n, int* counts, Digit digit, Put put, uint32_t* start) const {
    const int lane = thread_index() % 32, warp = thread_index() / 32, warps = thread_count() / 32;
    const int steps = (n + 32 * warps - 1) / (32 * warps), begin = 32 * steps * warp;
    const int end = n < begin + 32 * steps ? n : begin + 32 * steps;
    const auto lanes_with = [&](int own) {  // this lane's digit; own: -1 behind the end
      unsigned mask = ballot(own >= 0);
      for (int bit = 0; bit < 5; ++bit) {
        const unsigned set = ballot(own >> bit & 1);
        mask &= lane >> bit & 1 ? set : ~set;
      }
      return mask;
    };
    int count = 0;
    for (int base = begin; base < end; base += 32)
      count += count_bits(lanes_with(base + lane < end ? digit(base + lane) : -1));
    counts[32 * warp + lane] = count;
    sync_block();
    if (warp == 0) {
      int all = 0;
      for (int w = 0; w < warps; ++w) all += counts[32 * w + lane];
      int through = all;
      for (int distance = 1; distance < 32; distance *= 2) {
        const int left = from_below(through, distance);
        if (lane >= distance) through += left;
      }
      int next = through - all;
      if (start) start[lane] = uint32_t(next);
      if (start && lane == 31) start[32] = uint32_t(through);
      for (int w = 0; w < warps; ++w) {
        const int its = counts[32 * w + lane];
        counts[32 * w + lane] = next;
        next += its;
      }
    }
    sync_block();
    int next = counts[32 * warp + lane];
    for (int base = begin; base < end; base += 32) {
      const int own = base + lane < end ? digit(base + lane) : -1, from = own < 0 ? 0 : own;
      const unsigned mask = lanes_with(own), same = from_lane(mask, from);
      const int place = from_lane(next, from);
      if (own >= 0) put(base + lane, place + count_bits(same & ((1u << lane) - 1)));
      next += count_bits(mask);
    }
  }

 private:
  template <class A, class Op>
  PYCSE_BODY A reduce(A x, Op op) const {
    PYCSE_SHARED A partial[32];
    x = warp_reduce(x, op);
    sync_block();  // what an earlier reduction left here has been read
    if (thread_index() % 32 == 0) partial[thread_index() / 32] = x;
    sync_block();
    x = partial[0];
    for (int warp = 1; warp < thread_count() / 32; ++warp) x = op(x, partial[warp]);
    return x;
  }
};

// The threads x, x + Columns, ... of a block: slices of one column.
template <int Columns, int Slices>
struct Slice {
  PYCSE_BODY int index() const { return thread_index() / Columns; }
  PYCSE_BODY int size() const { return Slices; }
  PYCSE_BODY void sync() const { sync_block(); }
  template <class A> PYCSE_BODY A sum(A x) const { return reduce(x, Add()); }
  template <class A> PYCSE_BODY A max(A x) const { return reduce(x, Larger()); }

 private:
  template <class A, class Op>
  PYCSE_BODY A reduce(A x, Op op) const {
    PYCSE_SHARED A partial[Slices][Columns];
    const int column = thread_index() % Columns;
    sync_block();
    partial[index()][column] = x;
    sync_block();
    x = partial[0][column];
    for (int slice = 1; slice < Slices; ++slice) x = op(x, partial[slice][column]);
    return x;
  }
};

// The host alone: one thread for a row.
struct OneThread {
  int index() const { return 0; }
  int size() const { return 1; }
  void sync() const {}
  template <class A> A sum(A x) const { return x; }
  template <class A> A max(A x) const { return x; }
  template <class A, class Op> A scan(A x, Op, A& all) const { return all = x; }
  template <class Digit, class Put>
  void partition(int n, int*, Digit digit, Put put, uint32_t* start) const {
    int next[33] = {};
    for (int k = 0; k < n; ++k) ++next[digit(k) + 1];
    for (int d = 0; d < 32; ++d) next[d + 1] += next[d];
    if (start)
      for (int d = 0; d <= 32; ++d) start[d] = uint32_t(next[d]);
    for (int k = 0; k < n; ++k) put(k, next[digit(k)]++);
  }
};

// *at += x by one of many threads, for integers: their sums do not depend on an order. Returns what was there.
template <class A>
PYCSE_BODY A add(A* at, A x) {
#ifdef __CUDACC__
  return atomicAdd(at, x);
#else
  const A before = *at;
  *at += x;
  return before;
#endif
}

template <int N> struct Count { static constexpr int value = N; };

// Shares out elements [0, n) of a row: f(j, Count<V>) for whole vectors from `head` on, f(j, Count<1>) before and
// after.
template <int V, class Block, class F>
PYCSE_BODY void each(Block block, int n, int head, F f) {
  head = head < n ? head : n;
  const int vectors = (n - head) / V, tail = head + vectors * V;
  for (int v = block.index(); v < vectors; v += block.size()) f(head + v * V, Count<V>());
  for (int j = block.index(); j < head; j += block.size()) f(j, Count<1>());
  for (int j = tail + block.index(); j < n; j += block.size()) f(j, Count<1>());
}

// Elements before the first that stands on a 16-byte boundary.
template <class T>
PYCSE_BODY int head_of(const T* row) {
  return int((0 - reinterpret_cast<uintptr_t>(row) / sizeof(T)) % unsigned(kWidth<T>));
}

// Calls run with a value of the storage type.
template <class Run>
void with_type(DType dtype, Run run) {
  switch (dtype) {
    case DType::f32: return run(float());
    case DType::bf16: return run(bf16());
    case DType::f64: return run(double());
  }
}

template <bool B> struct Flag { static constexpr bool value = B; };

template <class Run>
void with_flag(bool flag, Run run) {
  flag ? run(Flag<true>()) : run(Flag<false>());
}

}  // namespace pycse::cuda
