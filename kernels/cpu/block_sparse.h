// A linear layer whose weight keeps whole b x b blocks (b = 16, 32, 64), listed by block rows and by block columns.
//
//   y = x W^T + bias        dx = dy W        dW = dy^T x on the kept blocks, 0 elsewhere
//
// y and dx are one product: some block rows' weights are packed in the order of their use, [block][k][results], as many
// as stay in L2; tokens stream past them, a tile at a time, in place where they can be, the next on its way to L2. A
// tile of y stays in registers over its whole block row. dW sums panels of tokens, copied block column by block column,
// into the output (16-bit: into fp32 blocks, rounded once). Scratch: kept weights, and in dW the narrower of dy and x.
// Everything is summed in a fixed order.
#pragma once
#include <algorithm>
#include <type_traits>

#include "problem.h"
#include "threads.h"
#include "lanes.h"
#include "transpose.h"

namespace pycse::PYCSE_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileTokens = 12, kTileVecs = 2, kOuterRows = 8;  // 24 of 32 registers accumulate; 16 in dW
#else
constexpr int kTileTokens = 6, kTileVecs = 2, kOuterRows = 4;   // 12 and 8 of 16
#endif
constexpr int64_t kPackedBytes = 1 << 20;  // of L2: the packed weights that every tile of tokens passes by
constexpr int64_t kSpanTiles = 8;  // tiles of tokens in a task
constexpr int64_t kOuterNumbers = 4096;  // of dW: of a block column of dy and of x, 2 x 16 KB in L1
constexpr int64_t kOuterColumns = 512;  // of the wider of dy and x, copied at a time: whole cache lines in a row
constexpr int64_t kStreamBytes = 16 << 20;  // results from this size on are stored past the caches

// out[c - c0][t][b] = x[t][c b : (c + 1) b] for n tokens, block columns [c0, c1); `tokens` is the panel's extent.
template <int b, class T, class A>
PYCSE_NOINLINE void copy_panel(const T* x, int64_t ld, int64_t n, int64_t c0, int64_t c1, int64_t tokens, A* out) {
  for (int64_t t = 0; t < n; ++t)
    for (int64_t c = c0; c < c1; ++c)
      for (int k = 0; k < b; k += kLanes<A>)
        store_lanes(out + ((c - c0) * tokens + t) * b + k, load_lanes(x + t * ld + c * b + k));
}

// The next tile's rows of x on their way to L2: `lines` of each, shared out over the blocks of this tile.
template <class A>
struct Ahead {
  const A* next;
  int64_t ldx, lines, blocks, due = 0;
};
template <int R, class A>
PYCSE_INLINE void fetch(Ahead<A>& ahead) {
  for (ahead.due += ahead.lines; ahead.due >= ahead.blocks; ahead.due -= ahead.blocks, ahead.next += 64 / sizeof(A))
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i) __builtin_prefetch(ahead.next + i * ahead.ldx, 0, 2);
}

// y[0 : R, 0 : V lanes] over the n blocks of a block row, whose weights lie at w as [block][k][V lanes]. x is in place,
// or
// copied: [block column][R][b].
template <int b, int R, int V, bool copied, bool stream, class A, class T>
PYCSE_INLINE void product_tile(const A* x, int64_t ldx, const int32_t* cols, int64_t n, const A* w, const T* bias, T* y,
                               int64_t ldy, Ahead<A>& ahead) {
  constexpr int width = V * kLanes<A>, line = 64 / sizeof(A), page = 4096 / sizeof(A), column = copied ? R * b : b;
  if constexpr (copied) ldx = b;
  vec_t<A> acc[R][V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const vec_t<A> start = bias ? load_lanes(bias + v * kLanes<A>) : vec_t<A>{};
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i) acc[i][v] = start;
  }
  for (int64_t j = 0; j < n; ++j, w += b * width) {
    const A *xc = x + cols[j] * column, *next = x + cols[j + (j + 1 < n)] * column;
    fetch<R>(ahead);
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i)
      for (int k = 0; k < b; k += line) __builtin_prefetch(next + i * ldx + k);
#pragma GCC unroll 4
    for (int k = 0; k < b; ++k) {
      vec_t<A> wv[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        wv[v] = load_lanes(w + k * width + v * kLanes<A>);
        __builtin_prefetch(w + page + k * width + v * kLanes<A>);
      }
#pragma GCC unroll 32
      for (int i = 0; i < R; ++i) {
        const A xi = xc[i * ldx + k];
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

// R tokens of y for the block rows [r0, r1), whose weights start at w.
template <int b, int R, int V, bool copied, bool stream, class A, class T>
PYCSE_NOINLINE void product_rows(const A* x, int64_t ldx, const int32_t* ptr, const int32_t* cols, int64_t r0,
                                 int64_t r1, const A* w, const T* bias, T* y, int64_t ldy, Ahead<A> ahead) {
  constexpr int width = V * kLanes<A>;
  for (int64_t r = r0; r < r1; ++r)
    for (int part = 0; part < b; part += width, w += (ptr[r + 1] - ptr[r]) * b * width)
      product_tile<b, R, V, copied, stream>(x, ldx, cols + ptr[r], ptr[r + 1] - ptr[r], w,
                                            bias ? bias + r * b + part : nullptr, y + r * b + part, ldy, ahead);
}

// A kept block for y: packed[part][k][o] = W[r b + part + o][c b + k], parts `stride` apart.
template <int b, int width, class T, class A>
PYCSE_NOINLINE void pack_transposed(const T* w, int64_t ld, int64_t stride, A* packed) {
  constexpr int W = kLanes<A>;
  for (int part = 0; part < b; part += width, packed += stride)
    for (int o = 0; o < width; o += W)
      for (int k = 0; k < b; k += W) {
        vec_t<A> m[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) m[i] = load_lanes(w + (part + o + i) * ld + k);
        transpose<A>(m);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store_lanes(packed + (k + i) * width + o, m[i]);
      }
}
// And for dx: packed[part][k][i] = W[r b + k][c b + part + i].
template <int b, int width, class T, class A>
PYCSE_NOINLINE void pack_straight(const T* w, int64_t ld, int64_t stride, A* packed) {
  for (int part = 0; part < b; part += width, packed += stride)
    for (int k = 0; k < b; ++k)
      for (int v = 0; v < width; v += kLanes<A>) store_lanes(packed + k * width + v, load_lanes(w + k * ld + part + v));
}

// y = x W^T + bias, or with `transposed` dx = dy W: block rows are then the pattern's block columns.
template <int b, class T>
void block_product(const SparsePattern& p, const T* x, int64_t ldx, const T* w, int64_t ldw, const T* bias, T* y,
                   int64_t n, bool transposed, int threads) {
  using A = acc_t<T>;
  constexpr bool direct = std::is_same_v<A, T>;
  constexpr int V = std::min(kTileVecs, b / kLanes<A>), width = V * kLanes<A>, R = kTileTokens * kTileVecs / V;
  constexpr bool copied =
      !direct || V < kTileVecs;  // 16 bits are widened; the addresses of more rows would not fit in registers
  const int32_t *ptr = transposed ? p.t_ptr : p.ptr, *cols = transposed ? p.t_rows : p.cols;
  const int64_t features = transposed ? p.out : p.in, results = transposed ? p.in : p.out, rows = results / b,
                kept = ptr[rows];
  if (n == 0 || rows == 0) return;
  // A task is some block rows, as many as keep their weights in L2, times some tokens; a thread's tasks follow each
  // other.
  const int64_t span = kSpanTiles * R, spans = (n + span - 1) / span;
  const int64_t parts =
      std::min(rows, std::max<int64_t>(kept * b * b * int64_t(sizeof(A)) / kPackedBytes + 1, 4 * threads / spans));
  const auto bound = [&](int64_t part) {
    return part == parts ? rows : std::lower_bound(ptr, ptr + rows, int32_t(kept * part / parts)) - ptr;
  };
  int64_t most = 0;
  for (int64_t part = 0; part < parts; ++part) most = std::max<int64_t>(most, ptr[bound(part + 1)] - ptr[bound(part)]);
  const bool stream =
      direct && n * results * int64_t(sizeof(T)) >= kStreamBytes && reinterpret_cast<std::uintptr_t>(y) % 64 == 0;
  Scratch<A> packed(threads * most * b * b), tiles(copied ? threads * R * features : 0);
#pragma omp parallel num_threads(threads)
  {
    A *mine = packed.get() + thread_index() * most * b * b, *tile = tiles.get() + thread_index() * R * features;
    int64_t held = -1;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < parts * spans; ++task) {
      const int64_t part = task / spans, r0 = bound(part), r1 = bound(part + 1),
                    end = std::min(n, (task % spans + 1) * span);
      if (held != part) {
        A* to = mine;
        for (int64_t r = r0; r < r1; ++r) {
          const int64_t stride = (ptr[r + 1] - ptr[r]) * b * width;
          for (int64_t j = ptr[r]; j < ptr[r + 1]; ++j, to += b * width) {
            if (transposed) pack_straight<b, width>(w + cols[j] * b * ldw + r * b, ldw, stride, to);
            else pack_transposed<b, width>(w + r * b * ldw + cols[j] * b, ldw, stride, to);
          }
          to += stride * (b / width - 1);
        }
        held = part;
      }
      for (int64_t t = task % spans * span; t < end;) {
        const auto run = [&](auto tokens) {
          constexpr int m = decltype(tokens)::value;
          const int64_t blocks = std::max(1, ptr[r1] - ptr[r0]) * (b / width);
          Ahead<A> ahead{tile, 0, 0, blocks};
          if constexpr (direct)
            ahead = {x + std::min(t + m, n - m) * ldx, ldx, features * int64_t(sizeof(A)) / 64, blocks};
          const A* xt = tile;
          if constexpr (copied) copy_panel<b>(x + t * ldx, ldx, m, 0, features / b, m, tile);
          else xt = x + t * ldx;
          (stream ? product_rows<b, m, V, copied, direct, A, T>
                  : product_rows<b, m, V, copied, false, A, T>)(xt, ldx, ptr, cols, r0, r1, mine, bias, y + t * results,
                                                                results, ahead);
          t += m;
        };
        if (end - t >= R) run(std::integral_constant<int, R>());
        else if (end - t >= 4) run(std::integral_constant<int, 4>());
        else run(std::integral_constant<int, 1>());
      }
    }
    stores_done();
  }
}

// out[0 : R, 0 : V lanes] (+)= sum_t dy[t] x[t] over n tokens; `next` is fetched meanwhile, `step` numbers a token.
template <int b, int R, int V, class A>
PYCSE_INLINE void outer_tile(const A* dy, const A* x, int64_t n, bool first, A* out, int64_t ld, const A* next) {
  constexpr int tiles = b / R * (b / (V * kLanes<A>)), step = b / tiles;
  vec_t<A> acc[R][V] = {};
  for (int i = 0; i < R; ++i)
    __builtin_prefetch(out + i * ld, 1), __builtin_prefetch(out + i * ld + V * kLanes<A> - 1, 1);
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
    for (int i = 0; i < b; i += R, next += n * step)
      outer_tile<b, R, V>(dy + i, x + k, n, first, out + i * ld + k, ld, next);
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
void block_outer(const SparsePattern& p, const T* dy, int64_t ldy, const T* x, int64_t ldx, T* dw, int64_t n,
                 int threads) {
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
