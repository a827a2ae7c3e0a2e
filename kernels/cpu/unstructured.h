// A linear layer of which single weights are kept, listed by rows and by columns.
//
//   y = x W^T + bias        dx = dy W        dW = dy^T x at the kept weights, 0 elsewhere
//
// Tokens are lanes: a panel of kTokens<A> tokens is stored [feature][token], and a kept weight is one broadcast times V
// vectors. The features are taken in chunks that stay in L1, the next on its way to L2. The kept weights are first
// copied in the order of their use, chunk by chunk and in each result by result, results with equally many together:
// the innermost loop then ends where the processor expects it (random lengths cost as much in mispredicted branches as
// in arithmetic). That order is listed once for a mask (pycse/backends/cpu/sparse.py). One panel alone reads weights
// where they are. dx is the same product by the transposed list. dW sums dots over panels of tokens. Scratch: kept
// weights, and a chunk of x and a panel of y for each thread. Everything is summed in a fixed order.
#pragma once
#include "block_sparse.h"
#include "transpose.h"

namespace pycse::PYCSE_ISA {

#if defined(__AVX512F__)
constexpr int kSparseVecs = 4, kDotVecs = 16;
#else
constexpr int kSparseVecs = 4, kDotVecs = 8;
#endif
constexpr int64_t kPanelBytes = 512 << 10;  // of L2: a panel of x, in dW
template <class A> constexpr int64_t kTokens = kSparseVecs * kLanes<A>;

// The order in which the kept weights are used: Pattern.plan, which pycse/backends/cpu/sparse.py makes.
struct Plan {
  int64_t results, features, nnz, chunks;
  const int32_t* lengths;  // (chunks, kSparseChunk + 1): how many results have so many kept weights in a chunk
  const int32_t* order;  // (chunks, results)
  const int32_t* source;  // (nnz): where each kept weight stands in the list by rows
  const uint16_t* ats;  // (nnz): kAtStep times its feature inside the chunk

  Plan(const SparsePattern& p, bool transposed)
      : results(transposed ? p.in : p.out),
        features(transposed ? p.out : p.in),
        nnz(p.ptr[p.out]),
        chunks(std::max<int64_t>(1, (features + kSparseChunk - 1) / kSparseChunk)),
        lengths(transposed ? p.t_plan : p.plan),
        order(lengths + chunks * (kSparseChunk + 1)),
        source(order + chunks * results),
        ats(reinterpret_cast<const uint16_t*>(source + nnz)) {}

  int64_t chunk(int64_t q) const { return std::min(kSparseChunk, features - q * kSparseChunk); }
};

// ws = the kept weights in that order, by way of the order in which W stores them. Called by every thread of a parallel
// region.
template <class T, class A>
void pack(const SparsePattern& p, const Plan& plan, const T* w, int64_t ldw, A* stored, A* ws) {
#pragma omp for schedule(static)
  for (int64_t o = 0; o < p.out; ++o) {
    const T *row = w + o * ldw, *next = row + (o + 1 < p.out) * ldw;
    for (int64_t c = 0; c < p.in; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(next + c, 0, 2);
    for (int64_t j = p.ptr[o]; j < p.ptr[o + 1]; ++j) stored[j] = load(row[p.cols[j]]);
  }
#pragma omp for schedule(static)
  for (int64_t k = 0; k < plan.nnz; ++k) ws[k] = stored[plan.source[k]];
}

// packed: what unstructured_product reads of W where it is not transposed; (nnz) of acc.
template <class T>
void unstructured_pack(const SparsePattern& p, const T* w, int64_t ldw, acc_t<T>* packed, int threads) {
  const Plan plan(p, false);
  Scratch<acc_t<T>> stored(plan.nnz);
#pragma omp parallel num_threads(threads)
  pack(p, plan, w, ldw, stored.get(), packed);
}

// The next chunk of x on its way to L2, `rows` tokens of it a cache line at a time.
template <class T>
struct Coming {
  const T* line;
  int64_t ld, rows, left, row = 0;
  Coming(const T* x, int64_t ld_, int64_t rows_, int64_t features)
      : line(x), ld(ld_), rows(rows_), left(rows * ((features * int64_t(sizeof(T)) + 63) / 64)) {}
};
template <class T>
PYCSE_INLINE void fetch(Coming<T>& coming) {
  if (coming.left <= 0) return;
  __builtin_prefetch(coming.line, 0, 2);
  coming.line += coming.ld, --coming.left;
  if (++coming.row == coming.rows) coming.row = 0, coming.line += 64 / int64_t(sizeof(T)) - coming.rows * coming.ld;
}

// y[o] (+)= sum_k w_k x[at_k] for the results of one chunk; x is [feature][V vectors], y [result][V vectors]. The first
// chunk starts from the bias. Kept weights are taken from k0 on; returns where the next chunk's begin.
template <int V, bool first, class T, class A>
PYCSE_NOINLINE int64_t unstructured_chunk(const Plan& plan, const A* ws, int64_t q, int64_t k0, const A* x,
                                          const T* bias, A* y, Coming<T> coming) {
  constexpr int64_t width = V * kLanes<A>, ahead = 4;
  const int32_t *length = plan.lengths + q * (kSparseChunk + 1), *o = plan.order + q * plan.results;
  const uint16_t* at = plan.ats + k0;
  const A* w = ws + k0;
  const int32_t* last = o + plan.results - 1;
  if constexpr (!first) o += length[0];
  for (int64_t n = first ? 0 : 1; n <= kSparseChunk; ++n)
    for (int32_t i = 0; i < length[n]; ++i, ++o, at += n, w += n) {
      A *yo = y + *o * width, *next = y + o[std::min<int64_t>(ahead, last - o)] * width;  // y is in L2
      fetch(coming);
      vec_t<A> acc[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        acc[v] = first ? vec_t<A>{} + (bias ? A(load(bias[*o])) : A(0)) : load_lanes(yo + v * kLanes<A>);
        __builtin_prefetch(next + v * kLanes<A>, 1);
      }
      const auto add = [&](int64_t k) __attribute__((always_inline)) {
        const A* xk =
            reinterpret_cast<const A*>(reinterpret_cast<const char*>(x) + at[k] * int(width * sizeof(A)) / kAtStep);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[v] += w[k] * load_lanes(xk + v * kLanes<A>);
      };
      int64_t k = 0;
      for (; k + 4 <= n; k += 4)
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) add(k + u);
      for (; k < n; ++k) add(k);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store_lanes(yo + v * kLanes<A>, acc[v]);
    }
  return at - plan.ats;
}

// n tokens of y; `next` holds those that likely come after them in this thread.
template <int V, class T, class A>
PYCSE_INLINE void unstructured_panel(const Plan& plan, const A* ws, const T* x, int64_t ldx, int64_t n, const T* next,
                                     int64_t n_next, const T* bias, T* y, int64_t ldy, A* xs, A* ys) {
  constexpr int64_t tokens = V * kLanes<A>;
  for (int64_t q = 0, k = 0; q < plan.chunks; ++q) {
    to_lanes(x + q * kSparseChunk, ldx, n, tokens, plan.chunk(q), xs);
    const Coming<T> coming = q + 1 < plan.chunks ? Coming<T>(x + (q + 1) * kSparseChunk, ldx, n, plan.chunk(q + 1))
                                                 : Coming<T>(next, ldx, n_next, plan.chunk(0));
    k = q == 0 ? unstructured_chunk<V, true>(plan, ws, q, k, xs, bias, ys, coming)
               : unstructured_chunk<V, false>(plan, ws, q, k, xs, bias, ys, coming);
  }
  from_lanes(ys, tokens, n, plan.results, y, ldy);
}

// y = start + sum_j w_j x[index_j] over a result's kept weights, read where they are, `step` apart; x is [feature][V
// vectors].
template <int V, class T, class A>
PYCSE_INLINE void unstructured_result(const A* x, const int32_t* index, int64_t n, const T* w, int64_t step, A start,
                                      A* y) {
  constexpr int64_t width = V * kLanes<A>;
  constexpr int U = kSparseVecs / V;  // chains of additions, to hide their latency
  vec_t<A> acc[U][V] = {};
  const auto add = [&](int u, int64_t j) __attribute__((always_inline)) {
    const A wj = load(w[index[j] * step]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[u][v] += wj * load_lanes(x + index[j] * width + v * kLanes<A>);
  };
  int64_t j = 0;
  for (; j + U <= n; j += U)
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) add(u, j + u);
  for (; j < n; ++j) add(0, j);
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 8
    for (int u = 1; u < U; ++u) acc[0][v] += acc[u][v];
    store_lanes(y + v * kLanes<A>, acc[0][v] + start);
  }
}

// At most one panel of tokens, for which copying the weights would cost more than the product: threads share out the
// results.
template <int V, class T>
void unstructured_few(const SparsePattern& p, const T* x, int64_t ldx, const T* w, int64_t ldw, const T* bias, T* y,
                      int64_t n, bool transposed, int threads) {
  using A = acc_t<T>;
  constexpr int64_t tokens = V * kLanes<A>, group = 64 / sizeof(T);  // of results: a cache line of y
  const int32_t *ptr = transposed ? p.t_ptr : p.ptr, *index = transposed ? p.t_rows : p.cols;
  const int64_t features = transposed ? p.out : p.in, results = transposed ? p.in : p.out;
  Scratch<A> xs(tokens * features), scratch(threads * group * tokens);
#pragma omp parallel num_threads(threads)
  {
    A* ys = scratch.get() + thread_index() * group * tokens;
#pragma omp for schedule(static)
    for (int64_t f = 0; f < features; f += group)
      to_lanes(x + f, ldx, n, tokens, std::min(group, features - f), xs.get() + f * tokens);
#pragma omp for schedule(dynamic)
    for (int64_t o0 = 0; o0 < results; o0 += group) {
      const int64_t o1 = std::min(o0 + group, results);
      for (int64_t o = o0; o < o1; ++o)
        unstructured_result<V>(xs.get(), index + ptr[o], ptr[o + 1] - ptr[o], transposed ? w + o : w + o * ldw,
                               transposed ? ldw : 1, bias ? A(load(bias[o])) : A(0), ys + (o - o0) * tokens);
      from_lanes(ys, tokens, n, o1 - o0, y + o0, results);
    }
  }
}

// y = x W^T + bias, or with `transposed` dx = dy W.
template <class T>
void unstructured_product(const SparsePattern& p, const T* x, int64_t ldx, const T* w, int64_t ldw, const T* bias, T* y,
                          int64_t n, bool transposed, int threads) {
  using A = acc_t<T>;
  constexpr int64_t tokens = kTokens<A>;
  if (n <= tokens / 4) return unstructured_few<kSparseVecs / 4>(p, x, ldx, w, ldw, bias, y, n, transposed, threads);
  if (n <= tokens / 2) return unstructured_few<kSparseVecs / 2>(p, x, ldx, w, ldw, bias, y, n, transposed, threads);
  if (n <= tokens) return unstructured_few<kSparseVecs>(p, x, ldx, w, ldw, bias, y, n, transposed, threads);
  const Plan plan(p, transposed);
  const A* packed = transposed ? nullptr : static_cast<const A*>(p.packed);
  const int64_t results = plan.results, scratch_size = tokens * (kSparseChunk + results);
  Scratch<A> scratch(threads * scratch_size), own(packed ? 0 : 2 * plan.nnz);
#pragma omp parallel num_threads(threads)
  {
    A *xs = scratch.get() + thread_index() * scratch_size, *ys = xs + tokens * kSparseChunk;
    if (!packed) pack(p, plan, w, ldw, own.get() + plan.nnz, own.get());
    // The last panel as narrow as its tokens allow.
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < n; t += tokens) {
      const int64_t nt = std::min(tokens, n - t),
                    t_next = std::min(n, t + threads * tokens);  // most likely this thread's
      auto run = [&](auto panel) {
        panel(plan, packed ? packed : own.get(), x + t * ldx, ldx, nt, x + t_next * ldx, std::min(tokens, n - t_next),
              bias, y + t * results, results, xs, ys);
      };
      if (nt > tokens / 2) run([](auto&&... a) { unstructured_panel<kSparseVecs>(a...); });
      else if (nt > tokens / 4) run([](auto&&... a) { unstructured_panel<kSparseVecs / 2>(a...); });
      else run([](auto&&... a) { unstructured_panel<kSparseVecs / 4>(a...); });
    }
  }
}

// sums[j] (+)= dy_o . x_c over the V vectors of a panel, for one row's kept weights; x is [feature][V vectors].
template <int V, class A>
PYCSE_INLINE void unstructured_dots(const A* dy, const A* x, const int32_t* cols, int64_t n, bool first, A* sums) {
  constexpr int64_t width = V * kLanes<A>;
  vec_t<A> d[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) d[v] = load_lanes(dy + v * kLanes<A>);
  for (int64_t j = 0; j < n; ++j) {
    const A *xc = x + cols[j] * width, *next = x + cols[std::min(j + 4, n - 1)] * width;
    vec_t<A> acc[2] = {};
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      __builtin_prefetch(next + v * kLanes<A>);
      acc[v % 2] += d[v] * load_lanes(xc + v * kLanes<A>);
    }
    const A sum = total(acc[0] + acc[1]);
    sums[j] = first ? sum : sums[j] + sum;
  }
}

// dW = dy^T x at the kept weights, 0 elsewhere; dW is (out, in) contiguous.
template <int V, class T>
void unstructured_outer_of(const SparsePattern& p, const T* dy, int64_t ldy, const T* x, int64_t ldx, T* dw, int64_t n,
                           int threads) {
  using A = acc_t<T>;
  constexpr int64_t tokens = V * kLanes<A>, group = 64 / sizeof(T);
  Scratch<A> xs(p.in * tokens), scratch(threads * group * tokens), sums(p.ptr[p.out]);
#pragma omp parallel num_threads(threads)
  {
    const int me = thread_index();
    A* d = scratch.get() + me * group * tokens;
    for (int64_t t = 0; t < n; t += tokens) {
      const int64_t nt = std::min(tokens, n - t);
#pragma omp for schedule(static)
      for (int64_t f = 0; f < p.in; f += group)
        to_lanes(x + t * ldx + f, ldx, nt, tokens, std::min(group, p.in - f), xs.get() + f * tokens);
#pragma omp for schedule(dynamic)
      for (int64_t o0 = 0; o0 < p.out; o0 += group) {
        const int64_t o1 = std::min(o0 + group, p.out);
        if (p.ptr[o0] == p.ptr[o1]) continue;
        to_lanes(dy + t * ldy + o0, ldy, nt, tokens, o1 - o0, d);
        for (int64_t o = o0; o < o1; ++o)
          unstructured_dots<V>(d + (o - o0) * tokens, xs.get(), p.cols + p.ptr[o], p.ptr[o + 1] - p.ptr[o], t == 0,
                               sums.get() + p.ptr[o]);
      }
    }
#pragma omp for schedule(static)
    for (int64_t o = 0; o < p.out; ++o) {
      T* out = dw + o * p.in;
      std::memset(static_cast<void*>(out), 0, p.in * sizeof(T));
      for (int64_t j = p.ptr[o]; j < p.ptr[o + 1] && n > 0; ++j) store(out[p.cols[j]], sums.get()[j]);
    }
  }
}
template <class T>
void unstructured_outer(const SparsePattern& p, const T* dy, int64_t ldy, const T* x, int64_t ldx, T* dw, int64_t n,
                        int threads) {
  using A = acc_t<T>;
  // Panels of x that stay in L2.
  if (p.in * kDotVecs * kLanes<A> * int64_t(sizeof(A)) <= kPanelBytes)
    return unstructured_outer_of<kDotVecs>(p, dy, ldy, x, ldx, dw, n, threads);
  return unstructured_outer_of<kDotVecs / 2>(p, dy, ldy, x, ldx, dw, n, threads);
}

}  // namespace pycse::PYCSE_ISA
