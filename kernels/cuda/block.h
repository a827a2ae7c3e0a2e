// The threads that share one row. A kernel's body is a template over them: on the device a thread block, a warp or a
// slice of columns; on the host one thread, so that every line of a body runs where there is no GPU.
//
//   index(), size()     this thread among the threads of the row
//   sum(x), max(x)      over those threads, to all of them, in a fixed order
//   sync()              what was written before is read after
//   scan(x, op)         op over the threads up to this one, and through `all` over all of them
//   number(...)         counts in the order of columns
#pragma once
#include "../common/loss.h"
#include "contrastive.h"

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

#ifdef __CUDACC__

template <class A, class Op>
__device__ __forceinline__ A warp_reduce(A x, Op op) {
  for (int distance = 16; distance; distance /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}

struct Warp {
  __device__ int index() const { return threadIdx.x % 32; }
  __device__ int size() const { return 32; }
  __device__ void sync() const { __syncwarp(); }
  template <class A> __device__ A sum(A x) const { return warp_reduce(x, Add()); }
  template <class A> __device__ A max(A x) const { return warp_reduce(x, Larger()); }
};

struct ThreadBlock {
  __device__ int index() const { return threadIdx.x; }
  __device__ int size() const { return blockDim.x; }
  __device__ void sync() const { __syncthreads(); }
  template <class A> __device__ A sum(A x) const { return reduce(x, Add()); }
  template <class A> __device__ A max(A x) const { return reduce(x, Larger()); }

  template <class A, class Op>
  __device__ A scan(A x, Op op, A& all) const {
    __shared__ A partial[32];
    const int lane = threadIdx.x % 32, own = threadIdx.x / 32;
    for (int distance = 1; distance < 32; distance *= 2) {
      const A left = __shfl_up_sync(0xffffffffu, x, distance);
      if (lane >= distance) x = op(left, x);
    }
    __syncthreads();  // what an earlier scan left here has been read
    if (lane == 31) partial[own] = x;
    __syncthreads();
    all = partial[0];
    A before = all;
    for (int warp = 1; warp < blockDim.x / 32; ++warp) {
      if (warp == own) before = all;
      all = op(all, partial[warp]);
    }
    return own == 0 ? x : op(before, x);
  }

  // position[j] = slot[j] + how many columns before j have that slot; `skip` is left out. next: 0 at every slot. One warp:
  // it is a chain through memory, 32 columns a link.
  __device__ void number(int n, int skip, const int* slot, int* next, int* position) const {
    if (threadIdx.x >= 32) return;
    for (int base = 0; base < n; base += 32) {
      const int j = base + threadIdx.x;
      const int own = j < n && j != skip ? slot[j] : -1;
      const unsigned same = __match_any_sync(0xffffffffu, own);
      const int rank = __popc(same & ((1u << threadIdx.x) - 1));
      const int before = own < 0 ? 0 : next[own];
      __syncwarp();
      if (own >= 0) {
        position[j] = own + before + rank;
        if (same >> threadIdx.x == 1) next[own] = before + rank + 1;
      }
      __syncwarp();
    }
  }

 private:
  template <class A, class Op>
  __device__ A reduce(A x, Op op) const {
    __shared__ A partial[32];
    x = warp_reduce(x, op);
    __syncthreads();  // what an earlier reduction left here has been read
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    x = partial[0];
    for (int warp = 1; warp < blockDim.x / 32; ++warp) x = op(x, partial[warp]);
    return x;
  }
};

// The threads x, x + Columns, ... of a block: slices of one column.
template <int Columns, int Slices>
struct Slice {
  __device__ int index() const { return threadIdx.x / Columns; }
  __device__ int size() const { return Slices; }
  __device__ void sync() const { __syncthreads(); }
  template <class A> __device__ A sum(A x) const { return reduce(x, Add()); }
  template <class A> __device__ A max(A x) const { return reduce(x, Larger()); }

 private:
  template <class A, class Op>
  __device__ A reduce(A x, Op op) const {
    __shared__ A partial[Slices][Columns];
    const int column = threadIdx.x % Columns;
    __syncthreads();
    partial[index()][column] = x;
    __syncthreads();
    x = partial[0][column];
    for (int slice = 1; slice < Slices; ++slice) x = op(x, partial[slice][column]);
    return x;
  }
};

#else

struct OneThread {
  int index() const { return 0; }
  int size() const { return 1; }
  void sync() const {}
  template <class A> A sum(A x) const { return x; }
  template <class A> A max(A x) const { return x; }
  template <class A, class Op> A scan(A x, Op, A& all) const { return all = x; }
  void number(int n, int skip, const int* slot, int* next, int* position) const {
    for (int j = 0; j < n; ++j)
      if (j != skip) position[j] = slot[j] + next[slot[j]]++;
  }
};

#endif

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

// Shares out elements [0, n) of a row: f(j, Count<V>) for whole vectors from `head` on, f(j, Count<1>) before and after.
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

template <class A>
PYCSE_BODY A number(const Number& n) {
  return n.at ? *static_cast<const A*>(n.at) : A(n.value);
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
