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

#include "contrastive.h"
#include "lanes.h"

namespace pycse::PYCSE_ISA {

#if defined(__AVX512F__)
constexpr int kTileTokens = 12, kTileVecs = 2, kOuterRows = 8;  // 24 of 32 registers accumulate; 16 in dW
#else
constexpr int kTileTokens = 6, kTileVecs = 2, kOuterRows = 4;   // 12 and 8 of 16
#endif
constexpr int64_t kPanelBytes = 512 << 10;   // of L2: a panel of tokens, read once for each block row
constexpr int64_t kOuterNumbers = 4096;       // of dW: of a block column of dy and of x, 2 x 16 KB in L1
constexpr int64_t kOuterColumns = 512;        // of the wider of dy and x, copied at a time: whole cache lines in a row
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

// out[c - c0][t][b] = x[t][c b : (c + 1) b] for n tokens, block columns [c0, c1); `tokens` is the panel's extent.
template <int b, class T, class A>
PYCSE_NOINLINE void copy_panel(const T* x, int64_t ld, int64_t n, int64_t c0, int64_t c1, int64_t tokens, A* out) {
  for (int64_t t = 0; t < n; ++t)
    for (int64_t c = c0; c < c1; ++c)
      for (int k = 0; k < b; k += kLanes<A>) store_lanes(out + ((c - c0) * tokens + t) * b + k, load_lanes(x + t * ld + c * b + k));
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
    const A* next = x + cols[j + (j + 1 < n)] * block_stride;
#pragma GCC unroll 32
    for (int i = 0; i < R * b; i += 64 / sizeof(A)) __builtin_prefetch(next + i);
#pragma GCC unroll 1
    for (int k = 0; k < b; ++k) {
      vec_a wv[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        wv[v] = load_lanes(w + k * V * kLanes<A> + v * kLanes<A>);
        __builtin_prefetch(w + b * b + (k * V + v) * kLanes<A>);
      }
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
    const int me = thread_index();
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

// out[0 : R, 0 : V lanes] (+)= sum_t dy[t] x[t] over n tokens; `next` is fetched meanwhile, `step` numbers a token.
template <int b, int R, int V, class A>
PYCSE_INLINE void outer_tile(const A* dy, const A* x, int64_t n, bool first, A* out, int64_t ld, const A* next) {
  constexpr int tiles = b / R * (b / (V * kLanes<A>)), step = b / tiles;
  vec_t<A> acc[R][V] = {};
  for (int i = 0; i < R; ++i) __builtin_prefetch(out + i * ld, 1), __builtin_prefetch(out + i * ld + V * kLanes<A> - 1, 1);
  for (int64_t t = 0; t < n; ++t) {
    vec_t<A> xv[V];
    __builtin_prefetch(next + t * step);
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
// next: n tokens of the block that follows.
template <int b, class A>
PYCSE_NOINLINE void outer_block(const A* dy, const A* x, int64_t n, bool first, A* out, int64_t ld, const A* next) {
  constexpr int V = std::min(kTileVecs, b / kLanes<A>), R = V == 1 ? 2 * kOuterRows : kOuterRows;
  constexpr int tiles = b / R * (b / (V * kLanes<A>)), step = b / tiles;
  for (int k = 0; k < b; k += V * kLanes<A>)
    for (int i = 0; i < b; i += R, next += n * step) outer_tile<b, R, V>(dy + i, x + k, n, first, out + i * ld + k, ld, next);
}

// Zeros in block row r of dW, beside its kept blocks.
template <int b, class T>
PYCSE_NOINLINE void clear_dropped(const SparsePattern& p, int64_t r, T* dw) {
  for (int i = 0; i < b; ++i) {
    T* row = dw + (r * b + i) * p.in;
    int64_t c = 0;
    for (int64_t j = p.ptr[r]; j <= p.ptr[r + 1]; ++j) {
      const int64_t kept = j < p.ptr[r + 1] ? p.cols[j] : p.in / b;
      std::memset(static_cast<void*>(row + c * b), 0, (kept - c) * b * sizeof(T));
      c = kept + 1;
    }
  }
}

// dW = dy^T x on the kept blocks, 0 elsewhere; dW is (out, in) contiguous. The narrower of dy and x is copied whole, in
// panels; the other some block columns at a time, by the thread that owns their part of dW.
template <int b, class T>
void block_outer(const SparsePattern& p, const T* dy, int64_t ldy, const T* x, int64_t ldx, T* dw, int64_t n, int threads) {
  using A = acc_t<T>;
  constexpr bool direct = std::is_same_v<A, T>;
  constexpr int64_t tokens = kOuterNumbers / b, group = kOuterColumns / b;
  const int64_t panels = (n + tokens - 1) / tokens;
  if (n == 0) {
    std::memset(static_cast<void*>(dw), 0, p.out * p.in * sizeof(T));
    return;
  }
  const bool by_rows = p.out >= p.in;
  const int32_t *ptr = by_rows ? p.ptr : p.t_ptr, *index = by_rows ? p.cols : p.t_rows;
  const T *whole = by_rows ? x : dy, *part = by_rows ? dy : x;
  const int64_t ld_whole = by_rows ? ldx : ldy, ld_part = by_rows ? ldy : ldx;
  const int64_t narrow = by_rows ? p.in : p.out, owners = (by_rows ? p.out : p.in) / b;
  Scratch<A> wholes(panels * tokens * narrow), parts(threads * group * tokens * b);
  Scratch<A> sums(direct ? 0 : int64_t(ptr[owners]) * b * b);
#pragma omp parallel num_threads(threads)
  {
    const int me = thread_index();
#pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < p.out / b; ++r) clear_dropped<b>(p, r, dw);
#pragma omp for schedule(static)
    for (int64_t k = 0; k < panels; ++k)
      copy_panel<b>(whole + k * tokens * ld_whole, ld_whole, std::min(tokens, n - k * tokens), 0, narrow / b, tokens,
                    wholes.get() + k * tokens * narrow);
    A* mine = parts.get() + me * group * tokens * b;
#pragma omp for schedule(dynamic)
    for (int64_t o0 = 0; o0 < owners; o0 += group) {
      const int64_t o1 = std::min(o0 + group, owners);
      for (int64_t k = 0; k < panels && ptr[o0] < ptr[o1]; ++k) {
        const int64_t nt = std::min(tokens, n - k * tokens);
        copy_panel<b>(part + k * tokens * ld_part, ld_part, nt, o0, o1, tokens, mine);
        for (int64_t o = o0; o < o1; ++o)
          for (int64_t j = ptr[o]; j < ptr[o + 1]; ++j) {
            const A *own = mine + (o - o0) * tokens * b, *panel = wholes.get() + k * narrow * tokens;
            const A *other = panel + index[j] * b * tokens, *next = panel + index[j + (j + 1 < ptr[o1])] * b * tokens;
            const int64_t r = by_rows ? o : index[j], c = by_rows ? index[j] : o;
            const A *dr = by_rows ? own : other, *xc = by_rows ? other : own;
            if constexpr (direct) outer_block<b>(dr, xc, nt, k == 0, dw + r * b * p.in + c * b, p.in, next);
            else outer_block<b>(dr, xc, nt, k == 0, sums.get() + j * b * b, b, next);
          }
      }
      if constexpr (!direct)
        for (int64_t o = o0; o < o1; ++o)
          for (int64_t j = ptr[o]; j < ptr[o + 1]; ++j) {
            const int64_t r = by_rows ? o : index[j], c = by_rows ? index[j] : o;
            for (int i = 0; i < b; ++i)
              for (int v = 0; v < b; v += kLanes<A>)
                store_lanes(dw + (r * b + i) * p.in + c * b + v, load_lanes(sums.get() + (j * b + i) * b + v));
          }
    }
  }
}

}  // namespace pycse::PYCSE_ISA
