// The products of block_sparse.h in AMX tiles, for blocks of 32 and 64, fp32 and bf16.
//
// The weights are made right operands once, in parts that stay in L2. 32 tokens at a time are made left operands, a panel
// [32 features][part][32 tokens], while the products of the 32 before them run, and stream past a part's weights. A (32, 32)
// tile of y stays in registers over its block row, and is written during the next one's products. A part is some block rows;
// or some block columns where x is the wider side and y can take sums, so that x is read once.
#pragma once
#include <vector>

#include "tiles.h"

namespace pycse::PYCSE_ISA {

constexpr int64_t kPartBytes = 1400 << 10;    // of L2: a part's weights, and two panels
constexpr int kSquare = 2 * kTile;            // tokens, and results, of a sum
constexpr int64_t kSpan = 8;                  // times 32 tokens, of dW
template <class T> constexpr int64_t kStride = 2 * kParts<T> * kTileNumbers;  // of operands: 32 x 32 numbers

// A panel in the making; `steps` products share the work.
template <class T>
struct PanelToCome {
  static constexpr int64_t group = 2, line = 64 / sizeof(T);
  const T* x;
  int64_t ldx, n, columns;                    // n <= 32 tokens; the rest is 0
  bf16* panel;
  int64_t steps, units = kSquare * ((columns + group - 1) / group), due = 0, t = 0, c = 0;

  // Some columns of one token, those after them on their way.
  __attribute__((always_inline)) void unit() {
    const int64_t c1 = std::min(c + group, columns);
    if (t < n) {
      const T* row = x + t * ldx;
      for (int64_t k = c; k < c1; ++k) left_row(row + k * kDepth, int(t), panel + k * kStride<T>);
      for (int64_t f = c1 * kDepth; f < std::min(c1 + group, columns) * kDepth; f += line) __builtin_prefetch(row + f);
    } else {
      for (int64_t k = c; k < c1; ++k)
        for (int p = 0; p < kParts<T>; ++p)
          std::memset(static_cast<void*>(panel + k * kStride<T> + (2 * p * kTile + t) * kDepth), 0, 2 * kDepth);
    }
    --units;
    if (++t == kSquare) t = 0, c = c1;
  }
  __attribute__((always_inline)) void step(int64_t all) {
    for (due += all; due >= steps && units > 0; due -= steps) unit();
  }
  __attribute__((noinline)) void finish() { while (units > 0) unit(); }
};

// Rows of a finished sum that are still to be written.
template <bool stream, class T>
struct Unwritten {
  const float* sums = nullptr;
  T* y = nullptr;
  int64_t ldy = 0, n = 0, t = 0;

  __attribute__((always_inline)) void write(int64_t rows) {
    for (const int64_t end = std::min(n, t + rows); t < end; ++t)
      for (int v = 0; v < kSquare; v += kTile) {
        if constexpr (stream) stream_lanes(y + t * ldy + v, load_lanes(sums + t * kSquare + v));
        else store_lanes(y + t * ldy + v, load_lanes(sums + t * kSquare + v));
      }
  }
};

// n <= 32 tokens of y over a part: for the block rows [r0, r1) the blocks begin[r] to end[r], whose weights follow each other
// from w on. The sums start from `start`, one row for all tokens, or where it is null from y.
template <int b, bool stream, class T>
PYCSE_NOINLINE void tiled_rows(const bf16* panel, const int32_t* begin, const int32_t* end, const int32_t* cols, int64_t r0, int64_t r1,
                               const bf16* w, const float* start, T* y, int64_t ldy, int64_t n, PanelToCome<T> next) {
  constexpr int deep = b / kDepth, rows = kParts<T> == 3 ? 6 : 8;
  alignas(64) float sums[2][kSquare * kSquare];
  Unwritten<stream, T> unwritten;
  const int64_t all = next.units;
  int at = 0;
  for (int64_t r = r0; r < r1; ++r)
    for (int o = int(r) * b; o < (r + 1) * b; o += kSquare, at ^= 1) {
      if (!start && begin[r] == end[r]) continue;
      if (start) {
        sum_from(start + o, 0);
      } else if constexpr (std::is_same_v<T, float>) {
        if (n == kSquare) {  // not by way of memory just written, for which the tiles would have to wait
          sum_from(y + o, ldy);
        } else {
          for (int64_t t = 0; t < n; ++t) std::memcpy(sums[at] + t * kSquare, y + t * ldy + o, kSquare * sizeof(float));
          sum_from(sums[at], kSquare);
        }
      }
      for (int64_t j = begin[r]; j < end[r]; ++j)
        for (int k = 0; k < deep; ++k, w += kStride<T>)
          add_product<T>(panel + (cols[j] * deep + k) * kStride<T>, w, [&](int step) __attribute__((always_inline)) {
            for (int i = 0; i < kTile; ++i) __builtin_prefetch(w + kStride<T> + (step * kTile + i) * kDepth);
            unwritten.write(rows);
            next.step(all);
          });
      unwritten.write(kSquare);
      sum_to(sums[at], kSquare);
      unwritten = {sums[at], y + o, ldy, n};
    }
  unwritten.write(kSquare);
  next.finish();
}

// y = x W^T + bias, or with `transposed` dx = dy W: block rows are then the pattern's block columns.
template <int b, class T>
void tiled_product(const SparsePattern& p, const T* x, int64_t ldx, const T* w, int64_t ldw, const T* bias, T* y, int64_t n,
                   bool transposed, int threads) {
  constexpr bool fp32 = std::is_same_v<T, float>;
  constexpr int deep = b / kDepth, wide = b / kSquare;
  constexpr int64_t block = deep * wide * kStride<T>;  // a block's weights, packed
  const int32_t *ptr = transposed ? p.t_ptr : p.ptr, *cols = transposed ? p.t_rows : p.cols;
  const int64_t features = transposed ? p.out : p.in, results = transposed ? p.in : p.out;
  const int64_t rows = results / b, columns = features / b, kept = ptr[rows], tiles = (n + kSquare - 1) / kSquare;
  if (n == 0 || rows == 0) return;
  const bool by_columns = fp32 && features > results && tiles >= threads;
  const int64_t panel_size = features / kDepth * kStride<T>;
  int64_t parts = kept * block * 2, panels = 2 * panel_size * 2;  // bytes
  if (by_columns) parts = std::min(columns, (parts + panels) / kPartBytes + 1);
  else parts = std::min(rows, std::max(parts / std::max(kPartBytes - panels, kPartBytes / 2) + 1, 2 * threads / tiles));
  // A part's blocks of row r: firsts[part][r] to firsts[part + 1][r] by columns, ptr[r] to ptr[r + 1] by rows.
  std::vector<int32_t> firsts(by_columns ? (parts + 1) * rows : 0);
  std::vector<int64_t> bounds(parts + 1), bases(parts + 1);
  for (int64_t part = 0; part <= parts; ++part) {
    if (by_columns) {
      bounds[part] = columns * part / parts;
      for (int64_t r = 0; r < rows; ++r)
        firsts[part * rows + r] = int32_t(std::lower_bound(cols + ptr[r], cols + ptr[r + 1], int32_t(bounds[part])) - cols);
      if (part > 0)
        for (int64_t r = 0; r < rows; ++r) bases[part] += firsts[part * rows + r] - firsts[(part - 1) * rows + r];
      if (part > 0) bases[part] += bases[part - 1];
    } else {
      bounds[part] = part == parts ? rows : std::lower_bound(ptr, ptr + rows, int32_t(kept * part / parts)) - ptr;
      bases[part] = ptr[bounds[part]];
    }
  }
  const auto begin = [&](int64_t part) { return by_columns ? firsts.data() + part * rows : ptr; };
  const auto end = [&](int64_t part) { return by_columns ? firsts.data() + (part + 1) * rows : ptr + 1; };
  const bool stream = fp32 && !by_columns && n * results * int64_t(sizeof(T)) >= kStreamBytes && reinterpret_cast<std::uintptr_t>(y) % 64 == 0;
  Scratch<bf16> packed(kept * block), scratch(threads * 2 * panel_size);
  Scratch<float> start(results);
  for (int64_t o = 0; o < results; ++o) start.get()[o] = bias ? load(bias[o]) : 0.0f;
#pragma omp parallel num_threads(threads)
  {
    for (int64_t part = 0; part < parts; ++part) {
      const int32_t *from = begin(part), *to = end(part);
      const int64_t r0 = by_columns ? 0 : bounds[part], r1 = by_columns ? rows : bounds[part + 1];
#pragma omp for schedule(static) nowait
      for (int64_t r = r0; r < r1; ++r) {
        bf16* out = packed.get() + bases[part] * block;
        for (int64_t q = r0; q < r; ++q) out += (to[q] - from[q]) * block;
        for (int o = 0; o < b; o += kSquare)
          for (int64_t j = from[r]; j < to[r]; ++j)
            for (int k = 0; k < b; k += kDepth, out += kStride<T>) {
              if (transposed) right_straight(w + (cols[j] * b + k) * ldw + r * b + o, ldw, out);
              else right_transposed(w + (r * b + o) * ldw + cols[j] * b + k, ldw, out);
            }
      }
    }
#pragma omp barrier
    const Tiles registers;
    const int64_t me = thread_index();
    bf16 *panel = scratch.get() + me * 2 * panel_size, *other = panel + panel_size;
    for (int64_t part = 0; part < parts; ++part) {
      // This thread's tiles of tokens: by columns always the same, whose sums it holds; by rows a share of all parts' tiles.
      const auto share = [&](int64_t i) {
        return by_columns ? tiles * i / threads : std::clamp<int64_t>(parts * tiles * i / threads - part * tiles, 0, tiles);
      };
      const int64_t t0 = share(me), t1 = share(me + 1), c0 = by_columns ? bounds[part] : 0, c1 = by_columns ? bounds[part + 1] : columns;
      const int64_t r0 = by_columns ? 0 : bounds[part], r1 = by_columns ? rows : bounds[part + 1];
      const int64_t steps = std::max<int64_t>(1, (bases[part + 1] - bases[part]) * deep * wide * kSteps<T>);
      const auto to_come = [&](int64_t tile, bf16* out) {
        const int64_t here = tile < t1 ? std::min<int64_t>(kSquare, n - tile * kSquare) : 0;
        return PanelToCome<T>{x + tile * kSquare * ldx + c0 * b, ldx, here, tile < t1 ? (c1 - c0) * deep : 0, out, steps};
      };
      if (t0 < t1) to_come(t0, panel).finish();
      for (int64_t tile = t0; tile < t1; ++tile, std::swap(panel, other))
        (stream ? tiled_rows<b, fp32, T> : tiled_rows<b, false, T>)(
            panel - c0 * deep * kStride<T>, begin(part), end(part), cols, r0, r1, packed.get() + bases[part] * block,
            by_columns && part > 0 ? nullptr : start.get(), y + tile * kSquare * results, results, std::min<int64_t>(kSquare, n - tile * kSquare),
            to_come(tile + 1, other));
    }
    stores_done();
  }
}

// 32 tokens of 32 numbers as operands of a product over the tokens; those from n on are 0.
template <bool left, class T>
PYCSE_NOINLINE void tokens_deep(const T* x, int64_t ld, int64_t n, bf16* tiles) {
  T padded[kDepth * kDepth];
  if (n < kDepth) {
    std::memset(static_cast<void*>(padded), 0, sizeof padded);
    for (int64_t t = 0; t < n; ++t) std::memcpy(static_cast<void*>(padded + t * kDepth), x + t * ld, kDepth * sizeof(T));
    x = padded, ld = kDepth;
  }
  if constexpr (left) left_transposed(x, ld, tiles);
  else right_straight(x, ld, tiles);
}

// dW = dy^T x on the kept blocks, 0 elsewhere; dW is (out, in) contiguous. The narrower of dy and x is made operands whole, the
// other block column by block column, by the thread that owns their part of dW. A span of tokens at a time stays in L2.
template <int b, class T>
void tiled_outer(const SparsePattern& p, const T* dy, int64_t ldy, const T* x, int64_t ldx, T* dw, int64_t n, int threads) {
  constexpr int deep = b / kDepth;
  constexpr int64_t square = kSquare * kSquare;
  const bool by_rows = p.out >= p.in;
  const int32_t *ptr = by_rows ? p.ptr : p.t_ptr, *index = by_rows ? p.cols : p.t_rows;
  const T *whole = by_rows ? x : dy, *part = by_rows ? dy : x;
  const int64_t ld_whole = by_rows ? ldx : ldy, ld_part = by_rows ? ldy : ldx, narrow = (by_rows ? p.in : p.out) / kDepth;
  const int64_t owners = (by_rows ? p.out : p.in) / b, chunks = (n + kDepth - 1) / kDepth, spans = (chunks + kSpan - 1) / kSpan;
  const auto left_in = [&](int64_t span) { return std::min(kSpan, chunks - span * kSpan); };
  Scratch<bf16> wholes(spans * narrow * kSpan * kStride<T>), parts(threads * deep * kSpan * kStride<T>);
  Scratch<float> partial(spans > 1 ? ptr[owners] * deep * deep * square : 0);
#pragma omp parallel num_threads(threads)
  {
    const Tiles registers;
    const int64_t me = thread_index();
#pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < p.out / b; ++r) clear_dropped<b>(p, r, dw);
#pragma omp for schedule(static)
    for (int64_t k = 0; k < spans * narrow; ++k)
      for (int64_t q = 0; q < left_in(k / narrow); ++q) {
        const int64_t t = (k / narrow * kSpan + q) * kDepth;
        const T* from = whole + t * ld_whole + k % narrow * kDepth;
        bf16* to = wholes.get() + (k * kSpan + q) * kStride<T>;
        if (by_rows) tokens_deep<false>(from, ld_whole, n - t, to);
        else tokens_deep<true>(from, ld_whole, n - t, to);
      }
    const auto bound = [&](int64_t i) {
      return i == threads ? owners : std::lower_bound(ptr, ptr + owners, int32_t(int64_t(ptr[owners]) * i / threads)) - ptr;
    };
    bf16* own = parts.get() + me * deep * kSpan * kStride<T>;
    alignas(64) float sums[2][square];
    int at = 0;
    Unwritten<false, T> unwritten;
    for (int64_t span = 0; span < spans; ++span)
      for (int64_t o = bound(me); o < bound(me + 1); ++o) {
        if (ptr[o] == ptr[o + 1]) continue;
        for (int i = 0; i < deep; ++i)
          for (int64_t q = 0; q < left_in(span); ++q) {
            const int64_t t = (span * kSpan + q) * kDepth;
            const T* from = part + t * ld_part + o * b + i * kDepth;
            bf16* to = own + (i * kSpan + q) * kStride<T>;
            if (by_rows) tokens_deep<true>(from, ld_part, n - t, to);
            else tokens_deep<false>(from, ld_part, n - t, to);
          }
        for (int64_t j = ptr[o]; j < ptr[o + 1]; ++j)
          for (int s = 0; s < deep * deep; ++s, at ^= 1) {
            const int mine = s / deep, other = s % deep;
            const bf16* theirs = wholes.get() + (span * narrow + index[j] * deep + other) * kSpan * kStride<T>;
            const bf16* ours = own + mine * kSpan * kStride<T>;
            const bf16 *left = by_rows ? ours : theirs, *right = by_rows ? theirs : ours;
            float* sum = partial.get() + (j * deep * deep + s) * square;
            if (span == 0) sum_from_zero();
            else sum_from(sum, kSquare);
            for (int64_t q = 0; q < left_in(span); ++q)
              add_product<T>(left + q * kStride<T>, right + q * kStride<T>, [&](int) __attribute__((always_inline)) { unwritten.write(4); });
            unwritten.write(kSquare);
            if (span + 1 < spans) {
              sum_to(sum, kSquare);
            } else {
              const int64_t r = (by_rows ? o : index[j]) * b + (by_rows ? mine : other) * kDepth;
              const int64_t c = (by_rows ? index[j] : o) * b + (by_rows ? other : mine) * kDepth;
              sum_to(sums[at], kSquare);
              unwritten = {sums[at], dw + r * p.in + c, p.in, kSquare};
            }
          }
      }
    unwritten.write(kSquare);
  }
}

}  // namespace pycse::PYCSE_ISA
