// A linear layer of which single weights are kept, listed by rows and by columns.
//
//   y = x W^T + bias        dx = dy W        dW = dy^T x at the kept weights, 0 elsewhere
//
// Tokens are lanes: a panel of kTokens<A> tokens is stored [feature][token], and a kept weight is one broadcast times V vectors. The
// features are taken in chunks that stay in L1; in each, the kept weights are first copied in the order of their use, result
// by result, results with equally many together: the innermost loop then ends where the processor expects it (random lengths
// cost as much in mispredicted branches as in arithmetic). One panel alone reads the weights where they are. dx is the same
// product by the transposed list. dW sums dots over panels of tokens. Scratch: kept weights, and panels of x and y for each
// thread. Everything is summed in a fixed order.
#pragma once
#include "block_sparse.h"
#include "transpose.h"

namespace pycse::PYCSE_ISA {

#if defined(__AVX512F__)
constexpr int kSparseVecs = 4, kDotVecs = 16;
#else
constexpr int kSparseVecs = 4, kDotVecs = 8;
#endif
constexpr int64_t kChunkBytes = 32 << 10;  // of L1: the chunk of x that a result's kept weights choose from
constexpr int64_t kPanelBytes = 512 << 10;  // of L2: a panel of x, in dW
template <class A> constexpr int64_t kTokens = kSparseVecs * kLanes<A>;

// The kept weights in the order of their use: chunk by chunk, in each by how many a result has, then by result.
template <class A>
struct Plan {
  int64_t results, chunk, chunks;
  Scratch<A> values;           // by rows of W
  Scratch<int32_t> first;      // (chunks + 1, results): where a result's kept weights of a chunk begin in the list
  Scratch<int32_t> lengths;    // (chunks, chunk + 1): how many results have so many
  Scratch<int32_t> order;      // (chunks, results)
  Scratch<int64_t> base;       // (chunks + 1) of kept
  Scratch<uint8_t> ats;        // of each kept weight: its feature inside the chunk
  Scratch<A> ws;

  Plan(int64_t results_, int64_t features, int64_t nnz)
      : results(results_), chunk(std::min<int64_t>(256, kChunkBytes / int64_t(sizeof(A)) / kTokens<A>)),
        chunks(std::max<int64_t>(1, (features + chunk - 1) / chunk)), values(nnz), first((chunks + 1) * results),
        lengths(chunks * (chunk + 1)), order(chunks * results), base(chunks + 1), ats(nnz), ws(nnz) {}

  // Called by every thread of a parallel region.
  template <class T>
  void fill(const SparsePattern& p, const T* w, int64_t ldw, bool transposed) {
    const int32_t *ptr = transposed ? p.t_ptr : p.ptr, *index = transposed ? p.t_rows : p.cols;
#pragma omp for schedule(static) nowait
    for (int64_t o = 0; o < p.out; ++o)
      for (int64_t j = p.ptr[o]; j < p.ptr[o + 1]; ++j) values.get()[j] = load(w[o * ldw + p.cols[j]]);
#pragma omp for schedule(static)
    for (int64_t o = 0; o < results; ++o) {
      int64_t j = ptr[o];
      for (int64_t q = 0; q < chunks; ++q) {
        first.get()[q * results + o] = int32_t(j);
        while (j < ptr[o + 1] && index[j] < (q + 1) * chunk) ++j;
      }
      first.get()[chunks * results + o] = int32_t(j);
    }
#pragma omp single
    {
      base.get()[0] = 0;
      for (int64_t q = 0; q < chunks; ++q) {
        const int32_t *begin = first.get() + q * results, *end = begin + results;
        int64_t n = 0;
        for (int64_t o = 0; o < results; ++o) n += end[o] - begin[o];
        base.get()[q + 1] = base.get()[q] + n;
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t q = 0; q < chunks; ++q) {
      const int32_t *begin = first.get() + q * results, *end = begin + results;
      int32_t *length = lengths.get() + q * (chunk + 1), *o_of = order.get() + q * results;
      std::fill(length, length + chunk + 1, 0);
      for (int64_t o = 0; o < results; ++o) ++length[end[o] - begin[o]];
      int32_t at = 0;
      for (int64_t n = 0; n <= chunk; ++n) at += length[n], length[n] = at - length[n];  // where each length starts
      for (int64_t o = 0; o < results; ++o) o_of[length[end[o] - begin[o]]++] = int32_t(o);
      for (int64_t n = chunk; n > 0; --n) length[n] -= length[n - 1];  // ends, and back to how many
      int64_t k = base.get()[q];
      for (int64_t i = 0; i < results; ++i)
        for (int64_t j = begin[o_of[i]]; j < end[o_of[i]]; ++j, ++k) {
          ats.get()[k] = uint8_t(index[j] - q * chunk);
          ws.get()[k] = values.get()[transposed ? p.t_at[j] : j];
        }
    }
  }
};

// y[o] (+)= sum_k w_k x[at_k] for the results of one chunk; x is [feature][V vectors], y [result][V vectors]. The first chunk
// starts from the bias.
template <int V, bool first, class T, class A>
PYCSE_NOINLINE void unstructured_chunk(const Plan<A>& plan, int64_t q, const A* x, const T* bias, A* y) {
  constexpr int64_t width = V * kLanes<A>, ahead = 4;
  const int32_t *length = plan.lengths.get() + q * (plan.chunk + 1), *o = plan.order.get() + q * plan.results;
  const uint8_t* at = plan.ats.get() + plan.base.get()[q];
  const A* w = plan.ws.get() + plan.base.get()[q];
  const int32_t* last = o + plan.results - 1;
  if constexpr (!first) o += length[0];
  for (int64_t n = first ? 0 : 1; n <= plan.chunk; ++n)
    for (int32_t i = 0; i < length[n]; ++i, ++o, at += n, w += n) {
      A *yo = y + *o * width, *next = y + o[std::min<int64_t>(ahead, last - o)] * width;  // y is in L2
      vec_t<A> acc[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        acc[v] = first ? vec_t<A>{} + (bias ? A(load(bias[*o])) : A(0)) : load_lanes(yo + v * kLanes<A>);
        __builtin_prefetch(next + v * kLanes<A>, 1);
      }
      auto add = [&](uint32_t c, A wk) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[v] += wk * load_lanes(x + c * width + v * kLanes<A>);
      };
      int64_t k = 0;
      for (; k + 4 <= n; k += 4) {  // the loads are the limit: four features in one
        uint32_t four;
        std::memcpy(&four, at + k, 4);
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u, four >>= 8) add(four & 255u, w[k + u]);
      }
      for (; k < n; ++k) add(at[k], w[k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store_lanes(yo + v * kLanes<A>, acc[v]);
    }
}

template <int V, class T, class A>
PYCSE_INLINE void unstructured_panel(const Plan<A>& plan, const T* x, int64_t ldx, int64_t n, int64_t features, const T* bias, T* y,
                               int64_t ldy, bool stream, A* xs, A* ys) {
  constexpr int64_t tokens = V * kLanes<A>;
  to_lanes(x, ldx, n, tokens, features, xs);
  unstructured_chunk<V, true>(plan, 0, xs, bias, ys);
  for (int64_t q = 1; q < plan.chunks; ++q) unstructured_chunk<V, false>(plan, q, xs + q * plan.chunk * tokens, bias, ys);
  (stream ? from_lanes<std::is_same_v<A, T>, T, A> : from_lanes<false, T, A>)(ys, tokens, n, plan.results, y, ldy);
}

// y = start + sum_j w_j x[index_j] over a result's kept weights, read where they are, `step` apart; x is [feature][V vectors].
template <int V, class T, class A>
PYCSE_INLINE void unstructured_result(const A* x, const int32_t* index, int64_t n, const T* w, int64_t step, A start, A* y) {
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

// At most one panel of tokens, for which copying the weights would cost more than the product: threads share out the results.
template <int V, class T>
void unstructured_few(const SparsePattern& p, const T* x, int64_t ldx, const T* w, int64_t ldw, const T* bias, T* y, int64_t n,
                      bool transposed, int threads) {
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
        unstructured_result<V>(xs.get(), index + ptr[o], ptr[o + 1] - ptr[o], transposed ? w + o : w + o * ldw, transposed ? ldw : 1,
                               bias ? A(load(bias[o])) : A(0), ys + (o - o0) * tokens);
      from_lanes<false>(ys, tokens, n, o1 - o0, y + o0, results);
    }
  }
}

// y = x W^T + bias, or with `transposed` dx = dy W.
template <class T>
void unstructured_product(const SparsePattern& p, const T* x, int64_t ldx, const T* w, int64_t ldw, const T* bias, T* y, int64_t n,
                    bool transposed, int threads) {
  using A = acc_t<T>;
  constexpr int64_t tokens = kTokens<A>;
  if (n <= tokens / 4) return unstructured_few<kSparseVecs / 4>(p, x, ldx, w, ldw, bias, y, n, transposed, threads);
  if (n <= tokens / 2) return unstructured_few<kSparseVecs / 2>(p, x, ldx, w, ldw, bias, y, n, transposed, threads);
  if (n <= tokens) return unstructured_few<kSparseVecs>(p, x, ldx, w, ldw, bias, y, n, transposed, threads);
  const int64_t features = transposed ? p.out : p.in, results = transposed ? p.in : p.out;
  const bool stream = std::is_same_v<A, T> && n * results * int64_t(sizeof(T)) >= kStreamBytes &&
                      results * sizeof(T) % 64 == 0 && reinterpret_cast<std::uintptr_t>(y) % 64 == 0;
  Plan<A> plan(results, features, p.ptr[p.out]);
  Scratch<A> scratch(threads * tokens * (features + results));
#pragma omp parallel num_threads(threads)
  {
    const int me = thread_index();
    A *xs = scratch.get() + me * tokens * (features + results), *ys = xs + tokens * features;
    plan.fill(p, w, ldw, transposed);
    // The last panel as narrow as its tokens allow.
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < n; t += tokens) {
      const int64_t nt = std::min(tokens, n - t);
      auto run = [&](auto panel) { panel(plan, x + t * ldx, ldx, nt, features, bias, y + t * results, results, stream, xs, ys); };
      if (nt > tokens / 2) run([](auto&&... a) { unstructured_panel<kSparseVecs>(a...); });
      else if (nt > tokens / 4) run([](auto&&... a) { unstructured_panel<kSparseVecs / 2>(a...); });
      else run([](auto&&... a) { unstructured_panel<kSparseVecs / 4>(a...); });
    }
    stores_done();
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
void unstructured_outer_of(const SparsePattern& p, const T* dy, int64_t ldy, const T* x, int64_t ldx, T* dw, int64_t n, int threads) {
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
void unstructured_outer(const SparsePattern& p, const T* dy, int64_t ldy, const T* x, int64_t ldx, T* dw, int64_t n, int threads) {
  using A = acc_t<T>;
  // Panels of x that stay in L2.
  if (p.in * kDotVecs * kLanes<A> * int64_t(sizeof(A)) <= kPanelBytes) return unstructured_outer_of<kDotVecs>(p, dy, ldy, x, ldx, dw, n, threads);
  return unstructured_outer_of<kDotVecs / 2>(p, dy, ldy, x, ldx, dw, n, threads);
}

}  // namespace pycse::PYCSE_ISA
