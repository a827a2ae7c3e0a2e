// A linear layer whose weight keeps whole b x b blocks (b = 16, 32, 64), listed by block rows and by block columns.
//
//   y = x W^T + bias        dx = dy W        dW = dy^T x on the kept blocks, 0 elsewhere
//
// y and dx are one product: a panel of tokens is copied block column by block column, [c][t][b], so a tile of tokens reads
// it at constant offsets; the kept blocks are copied once in the order that the product visits them, [k][b]. A tile of y
// stays in registers over its whole block row. dW sums panels of tokens into the output (16-bit: into fp32 blocks, rounded
// once). Scratch: kept weights, and a panel for each thread. Everything is summed in a fixed order.
#pragma once
#include <algorithm>
#include <memory>
#include <new>
#include <type_traits>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "contrastive.h"
#include "lanes.h"

namespace pycse::PYCSE_ISA {

#if defined(__AVX512F__)
constexpr int kTileTokens = 12, kTileVecs = 2, kOuterRows = 8;  // 24 of 32 registers accumulate; 16 in dW
#else
constexpr int kTileTokens = 6, kTileVecs = 2, kOuterRows = 4;   // 12 and 8 of 16
#endif
constexpr int64_t kPanelBytes = 1 << 20;   // of L2: a panel of tokens, read once for each block row
#ifndef OT
#define OT 128
#endif
#ifndef OC
#define OC 128
#endif
constexpr int64_t kOuterTokens = OT;      // of dW: this many tokens of a block row and a block column in L1
constexpr int kOuterColumns = OC;          // of dy, copied at a time: whole cache lines in a row
constexpr int64_t kStreamBytes = 16 << 20; // results from this size on are stored past the caches

// Scratch that starts on a cache line.
template <class A>
struct Scratch {
  struct Free { void operator()(A* p) const { ::operator delete[](p, std::align_val_t(64)); } };
  std::unique_ptr<A[], Free> memory;
  explicit Scratch(int64_t n) : memory(static_cast<A*>(::operator new[](std::max<int64_t>(n, 1) * sizeof(A), std::align_val_t(64)))) {}
  A* get() const { return memory.get(); }
};

// Tokens of a panel over `features` columns: a multiple of every tile.
template <class A>
int64_t panel_tokens(int64_t features, int64_t T) {
  constexpr int64_t step = 2 * kTileTokens;
  const int64_t fit = std::max<int64_t>(step, kPanelBytes / int64_t(sizeof(A)) / std::max<int64_t>(1, features) / step * step);
  return std::min(std::min<int64_t>(fit, 20 * step), (T + step - 1) / step * step);
}

// out[c][t][b] = x[t][c b : (c + 1) b] for n tokens, block columns [c0, c1); `tokens` is the panel's extent.
template <int b, class T, class A>
PYCSE_NOINLINE void copy_panel(const T* x, int64_t ld, int64_t n, int64_t c0, int64_t c1, int64_t tokens, A* out) {
  for (int64_t t = 0; t < n; ++t)
    for (int64_t c = c0; c < c1; ++c)
      for (int k = 0; k < b; k += kLanes<A>) store_lanes(out + (c * tokens + t) * b + k, load_lanes(x + t * ld + c * b + k));
}

// y[i0 : i0 + R, j : j + V lanes] over the blocks [begin, end) of a block row, whose weights start at w.
template <int b, int R, int V, bool stream, class A, class T>
PYCSE_INLINE void product_tile(const A* x, int64_t block_stride, const int32_t* cols, int64_t n, const A* w, const T* bias, T* y,
                               int64_t ldy) {
  using vec_a = vec_t<A>;
  vec_a acc[R][V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const vec_a start = bias ? load_lanes(bias + v * kLanes<A>) : vec_a{};
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i) acc[i][v] = start;
  }
  if constexpr (!stream)  // y's lines come while the tile is summed
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i) __builtin_prefetch(y + i * ldy, 1), __builtin_prefetch(y + i * ldy + V * kLanes<A> - 1, 1);
  for (int64_t j = 0; j < n; ++j, w += b * b) {
    const A* xc = x + cols[j] * block_stride;
#pragma GCC unroll 1
    for (int k = 0; k < b; ++k) {
      vec_a wv[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) wv[v] = load_lanes(w + k * V * kLanes<A> + v * kLanes<A>);
#pragma GCC unroll 32
      for (int i = 0; i < R; ++i) {
        const A xi = xc[i * b + k];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[i][v] += xi * wv[v];
      }
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      if constexpr (stream) stream_lanes(y + i * ldy + v * kLanes<A>, acc[i][v]);
      else store_lanes(y + i * ldy + v * kLanes<A>, acc[i][v]);
    }
}

// A block row for the n tokens of a panel. w: kept blocks as [part][k][V lanes], so that a tile reads them in order.
template <int b, bool stream, class A, class T>
PYCSE_NOINLINE void product_rows(const A* panel, int64_t tokens, int64_t n, const int32_t* cols, int64_t blocks, const A* w,
                                 const T* bias, T* y, int64_t ldy) {
  constexpr int V = std::min(kTileVecs, b / kLanes<A>), width = V * kLanes<A>;
  constexpr int R = V == 1 ? 2 * kTileTokens : kTileTokens;
  for (int part = 0; part < b / width; ++part) {
    const A* wp = w + part * b * width;
    const T* bp = bias ? bias + part * width : nullptr;
    T* yp = y + part * width;
    int64_t t = 0;
    for (; t + R <= n; t += R) product_tile<b, R, V, stream>(panel + t * b, tokens * b, cols, blocks, wp, bp, yp + t * ldy, ldy);
    for (; t + 4 <= n; t += 4) product_tile<b, 4, V, stream>(panel + t * b, tokens * b, cols, blocks, wp, bp, yp + t * ldy, ldy);
    for (; t < n; ++t) product_tile<b, 1, V, stream>(panel + t * b, tokens * b, cols, blocks, wp, bp, yp + t * ldy, ldy);
  }
}

// Kept blocks for y: packed[part][k][o] = W[r b + part width + o][c b + k].
template <int b, class T, class A>
PYCSE_NOINLINE void pack_transposed(const T* w, int64_t ld, A* packed) {
  constexpr int width = std::min(kTileVecs * kLanes<A>, b);
  for (int part = 0; part < b; part += width)
    for (int k = 0; k < b; ++k)
      for (int o = 0; o < width; ++o) *packed++ = load(w[(part + o) * ld + k]);
}
// And for dx: packed[part][k][i] = W[r b + k][c b + part width + i].
template <int b, class T, class A>
PYCSE_NOINLINE void pack_straight(const T* w, int64_t ld, A* packed) {
  constexpr int width = std::min(kTileVecs * kLanes<A>, b);
  for (int part = 0; part < b; part += width)
    for (int k = 0; k < b; ++k, packed += width)
      for (int v = 0; v < width; v += kLanes<A>) store_lanes(packed + v, load_lanes(w + k * ld + part + v));
}

// y = x W^T + bias, or with `transposed` dx = dy W: block rows are then the pattern's block columns.
template <int b, class T>
void block_product(const SparsePattern& p, const T* x, int64_t ldx, const T* w, int64_t ldw, const T* bias, T* y, int64_t n,
                   bool transposed, int threads) {
  using A = acc_t<T>;
  const int32_t *ptr = transposed ? p.t_ptr : p.ptr, *cols = transposed ? p.t_rows : p.cols;
  const int64_t features = transposed ? p.out : p.in, results = transposed ? p.in : p.out, rows = results / b;
  if (n == 0 || rows == 0) return;
  const int64_t tokens = panel_tokens<A>(features, n), panels = (n + tokens - 1) / tokens;
  // Few panels: their block rows are shared out too.
  const int64_t parts = std::min(rows, std::max<int64_t>(1, 4 * threads / panels)), tasks = panels * parts;
  constexpr bool can_stream = std::is_same_v<A, T>;  // whole cache lines
  const bool stream = can_stream && n * results * int64_t(sizeof(T)) >= kStreamBytes && reinterpret_cast<std::uintptr_t>(y) % 64 == 0;
  Scratch<A> packed(int64_t(ptr[rows]) * b * b), scratch(threads * tokens * features);
#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    const int me = omp_get_thread_num();
#else
    const int me = 0;
#endif
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = ptr[r]; j < ptr[r + 1]; ++j) {
        if (transposed) pack_straight<b>(w + cols[j] * b * ldw + r * b, ldw, packed.get() + j * b * b);
        else pack_transposed<b>(w + r * b * ldw + cols[j] * b, ldw, packed.get() + j * b * b);
      }
    A* panel = scratch.get() + me * tokens * features;
    int64_t held = -1;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t t0 = task / parts * tokens, nt = std::min(tokens, n - t0), part = task % parts;
      if (held != t0) copy_panel<b>(x + t0 * ldx, ldx, nt, 0, features / b, tokens, panel), held = t0;
      for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r)
        (stream ? product_rows<b, can_stream, A, T> : product_rows<b, false, A, T>)(
            panel, tokens, nt, cols + ptr[r], ptr[r + 1] - ptr[r], packed.get() + int64_t(ptr[r]) * b * b,
            bias ? bias + r * b : nullptr, y + t0 * results + r * b, results);
    }
    stores_done();
  }
}

// out[i0 : i0 + R, v] (+)= sum_t dy[t][i0 + i] x[t][v] over n tokens.
template <int b, int R, int V, class A>
PYCSE_INLINE void outer_tile(const A* dy, const A* x, int64_t n, bool first, A* out, int64_t ld) {
  vec_t<A> acc[R][V] = {};
  for (int i = 0; i < R; ++i) __builtin_prefetch(out + i * ld, 1), __builtin_prefetch(out + i * ld + V * kLanes<A> - 1, 1);
  for (int64_t t = 0; t < n; ++t) {
    vec_t<A> xv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) xv[v] = load_lanes(x + t * b + v * kLanes<A>);
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i) {
      const A di = dy[t * b + i];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[i][v] += di * xv[v];
    }
  }
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v) {
      A* o = out + i * ld + v * kLanes<A>;
      store_lanes(o, first ? acc[i][v] : acc[i][v] + load_lanes(o));
    }
}
template <int b, class A>
PYCSE_NOINLINE void outer_block(const A* dy, const A* x, int64_t n, bool first, A* out, int64_t ld) {
  constexpr int V = std::min(kTileVecs, b / kLanes<A>), R = V == 1 ? 2 * kOuterRows : kOuterRows;
  for (int k = 0; k < b; k += V * kLanes<A>)
    for (int i = 0; i < b; i += R) outer_tile<b, R, V>(dy + i, x + k, n, first, out + i * ld + k, ld);
}

// dW = dy^T x on the kept blocks, 0 elsewhere; dW is (out, in) contiguous.
template <int b, class T>
void block_outer(const SparsePattern& p, const T* dy, int64_t ldy, const T* x, int64_t ldx, T* dw, int64_t n, int threads) {
  using A = acc_t<T>;
  constexpr bool direct = std::is_same_v<A, T>;
  constexpr int64_t tokens = kOuterTokens, group = std::max(1, kOuterColumns / b);
  const int64_t rows = p.out / b, columns = p.in / b, panels = (n + tokens - 1) / tokens;
  Scratch<A> xs(panels * tokens * p.in), dys(threads * group * tokens * b);
  Scratch<A> sums(direct ? 0 : int64_t(p.ptr[rows]) * b * b);
#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    const int me = omp_get_thread_num();
#else
    const int me = 0;
#endif
#pragma omp for schedule(static)
    for (int64_t k = 0; k < panels; ++k)
      copy_panel<b>(x + k * tokens * ldx, ldx, std::min(tokens, n - k * tokens), 0, columns, tokens, xs.get() + k * tokens * p.in);
    A* d = dys.get() + me * group * tokens * b;
#pragma omp for schedule(dynamic)
    for (int64_t r0 = 0; r0 < rows; r0 += group) {
      const int64_t r1 = std::min(r0 + group, rows);
      std::memset(static_cast<void*>(dw + r0 * b * p.in), 0, (r1 - r0) * b * p.in * sizeof(T));
      for (int64_t k = 0; k < panels && p.ptr[r0] < p.ptr[r1]; ++k) {
        const int64_t nt = std::min(tokens, n - k * tokens);
        copy_panel<b>(dy + k * tokens * ldy + r0 * b, ldy, nt, 0, r1 - r0, tokens, d);
        for (int64_t r = r0; r < r1; ++r)
          for (int64_t j = p.ptr[r]; j < p.ptr[r + 1]; ++j) {
            const A *dr = d + (r - r0) * tokens * b, *xc = xs.get() + (k * p.in + p.cols[j] * b) * tokens;
            if constexpr (direct) outer_block<b>(dr, xc, nt, k == 0, dw + r * b * p.in + p.cols[j] * b, p.in);
            else outer_block<b>(dr, xc, nt, k == 0, sums.get() + j * b * b, b);
          }
      }
      if constexpr (!direct)
        for (int64_t r = r0; r < r1; ++r)
          for (int64_t j = p.ptr[r]; j < p.ptr[r + 1] && n > 0; ++j)
            for (int i = 0; i < b; ++i)
              for (int v = 0; v < b; v += kLanes<A>)
                store_lanes(dw + (r * b + i) * p.in + p.cols[j] * b + v, load_lanes(sums.get() + (j * b + i) * b + v));
    }
  }
}

}  // namespace pycse::PYCSE_ISA
