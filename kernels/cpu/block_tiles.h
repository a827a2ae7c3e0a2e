// The products of block_sparse.h in AMX tiles, for blocks of 32 and 64, fp32 and bf16; dense products keep every block.
//
// The weights are made right operands once, in parts that stay in L2. 32 tokens at a time are made left operands, a
// panel [32 features][part][32 tokens], while the products of the 32 before them run, and stream past a part's weights.
// A (32, 32) tile of y stays in registers over its block row, and is written during the next one's products. A part is
// some block rows; or some block columns where x is the wider side and y can take sums, so that x is read once.
#pragma once
#include "block_sparse.h"
#include "tiles.h"

namespace pycse::PYCSE_ISA {

constexpr int64_t kPartBytes = 1400 << 10;  // of L2: a part's weights, and two panels
constexpr int kSquare = 2 * kTile;  // tokens, and results, of a sum
constexpr int64_t kColumnTiles = 16;  // times 32 tokens, shared out over the threads: fewer go by rows
constexpr int64_t kSpanBytes = 1200 << 10;  // of L2: what is made operands whole, of a span of tokens
constexpr int64_t kDeepest = 1024;  // features of a dense product at a time, two panels in L2
template <class T> constexpr int64_t kStride = 2 * kParts<T> * kTileNumbers;  // of operands: 32 x 32 numbers

// A panel in the making; `steps` products share the work.
template <class T>
struct PanelToCome {
  static constexpr int64_t group = 2, line = 64 / sizeof(T);
  const T* x;
  int64_t ldx, n, columns;  // n <= 32 tokens; the rest is 0
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
  __attribute__((noinline)) void finish() {
    while (units > 0) unit();
  }
};

// Rows of a finished sum that are still to be written, or added: long sums are sums of parts, which keeps their
// rounding errors small.
template <bool stream, class T>
struct Unwritten {
  const float* sums = nullptr;
  T* y = nullptr;
  int64_t ldy = 0, n = 0;
  bool add = false;
  int64_t t = 0;

  __attribute__((always_inline)) void write(int64_t rows) {
    for (const int64_t end = std::min(n, t + rows); t < end; ++t)
      for (int v = 0; v < kSquare; v += kTile) {
        vec sum = load_lanes(sums + t * kSquare + v);
        if constexpr (std::is_same_v<T, float>)  // 16 bits: sums wait elsewhere
          if (add) sum += load_lanes(y + t * ldy + v);
        if constexpr (stream) stream_lanes(y + t * ldy + v, sum);
        else store_lanes(y + t * ldy + v, sum);
      }
  }
};

// n <= 32 tokens of y over a part: for the block rows [r0, r1) the blocks begin[r] to end[r], whose weights follow each
// other from w on. The sums start from `start`, one row for all tokens; where it is null they are added to y.
template <int b, bool stream, class T>
PYCSE_NOINLINE void tiled_rows(const bf16* panel, const int32_t* begin, const int32_t* end, const int32_t* cols,
                               int64_t r0, int64_t r1, const bf16* w, const float* start, T* y, int64_t ldy, int64_t n,
                               PanelToCome<T> next) {
  constexpr int deep = b / kDepth, rows = kParts<T> == 3 ? 6 : 8;
  alignas(64) float sums[2][kSquare * kSquare];
  Unwritten<stream, T> unwritten;
  const int64_t all = next.units;
  int at = 0;
  for (int64_t r = r0; r < r1; ++r)
    for (int o = int(r) * b; o < (r + 1) * b; o += kSquare) {
      if (!start && begin[r] == end[r]) continue;
      if (start) sum_from(start + o, 0);
      else sum_from_zero();
      if (!start)
        for (int64_t t = 0; t < n; ++t)
          __builtin_prefetch(y + t * ldy + o, 1), __builtin_prefetch(y + t * ldy + o + kTile, 1);
      for (int64_t j = begin[r]; j < end[r]; ++j)
        for (int k = 0; k < deep; ++k, w += kStride<T>)
          add_product<T>(panel + (cols[j] * deep + k) * kStride<T>, w, [&](int step) __attribute__((always_inline)) {
            for (int i = 0; i < kTile; ++i) __builtin_prefetch(w + kStride<T> + (step * kTile + i) * kDepth);
            unwritten.write(rows);
            next.step(all);
          });
      unwritten.write(kSquare);
      sum_to(sums[at], kSquare);
      unwritten = {sums[at], y + o, ldy, n, !start};
      at ^= 1;
    }
  unwritten.write(kSquare);
  next.finish();
}

// y = x W^T + bias, or with `transposed` dx = dy W: block rows are then the pattern's block columns. With `add` y += x
// W^T. Parts are of block columns where that is wanted, and x is the wider side.
template <int b, class T>
void tiled_product(const SparsePattern& p, const T* x, int64_t ldx, const T* w, int64_t ldw, const T* bias, T* y,
                   int64_t ldy, int64_t n, bool transposed, bool add, bool by_columns, int threads) {
  constexpr bool fp32 = std::is_same_v<T, float>;
  constexpr int deep = b / kDepth;
  constexpr int64_t block = deep * deep * kStride<T>;  // a block's weights, packed
  const int32_t *ptr = transposed ? p.t_ptr : p.ptr, *cols = transposed ? p.t_rows : p.cols;
  const int64_t features = transposed ? p.out : p.in, results = transposed ? p.in : p.out;
  const int64_t rows = results / b, columns = features / b, kept = ptr[rows], tiles = (n + kSquare - 1) / kSquare;
  if (n == 0 || rows == 0) return;
  by_columns = by_columns && fp32 && features > results && tiles >= kColumnTiles;
  const int64_t panels = 2 * features / kDepth * kStride<T> * int64_t(sizeof(bf16)),
                weights = kept * block * int64_t(sizeof(bf16));
  const int64_t parts =
      by_columns
          ? std::min(columns, (weights + panels) / kPartBytes + 1)
          : std::min(rows, std::max(weights / std::max(kPartBytes - panels, kPartBytes / 2) + 1, 2 * threads / tiles));
  // A part's blocks of row r: firsts[part][r] to firsts[part + 1][r] by columns, ptr[r] to ptr[r + 1] by rows.
  Scratch<int32_t> firsts_(by_columns ? (parts + 1) * rows : 0);
  Scratch<int64_t> bounds_(parts + 1);
  int32_t* firsts = firsts_.get();
  int64_t* bounds = bounds_.get();
  int64_t most = 0, widest = columns;  // blocks, and block columns, of a part
  if (by_columns) widest = (columns + parts - 1) / parts;
  for (int64_t part = 0; part <= parts; ++part) {
    if (by_columns) {
      bounds[part] = columns * part / parts;
      for (int64_t r = 0; r < rows; ++r)
        firsts[part * rows + r] =
            int32_t(std::lower_bound(cols + ptr[r], cols + ptr[r + 1], int32_t(bounds[part])) - cols);
    } else {
      bounds[part] = part == parts ? rows : std::lower_bound(ptr, ptr + rows, int32_t(kept * part / parts)) - ptr;
    }
  }
  const auto begin = [&](int64_t part) { return by_columns ? firsts + part * rows : ptr; };
  const auto end = [&](int64_t part) { return by_columns ? firsts + (part + 1) * rows : ptr + 1; };
  const auto r0 = [&](int64_t part) { return by_columns ? 0 : bounds[part]; };
  const auto r1 = [&](int64_t part) { return by_columns ? rows : bounds[part + 1]; };
  const auto blocks = [&](int64_t part) {
    int64_t sum = 0;
    for (int64_t r = r0(part); r < r1(part); ++r) sum += end(part)[r] - begin(part)[r];
    return sum;
  };
  for (int64_t part = 0; part < parts; ++part) most = std::max(most, blocks(part));
  const bool stream = fp32 && !by_columns && n * results * int64_t(sizeof(T)) >= kStreamBytes &&
                      ldy * sizeof(T) % 64 == 0 && reinterpret_cast<std::uintptr_t>(y) % 64 == 0;
  // By rows a thread has few parts, and packs its own; by columns all threads go through all parts, and share one.
  const int64_t panel_size = widest * deep * kStride<T>;
  Scratch<bf16> packed((by_columns ? 1 : threads) * most * block), scratch(threads * 2 * panel_size);
  Scratch<float> start(results);
  for (int64_t o = 0; o < results; ++o) start.get()[o] = bias ? load(bias[o]) : 0.0f;
#pragma omp parallel num_threads(threads)
  {
    const Tiles registers;
    const int64_t me = thread_index(), team = team_size();
    bf16 *panel = scratch.get() + me * 2 * panel_size, *other = panel + panel_size;
    bf16* mine = packed.get() + (by_columns ? 0 : me * most * block);
    for (int64_t part = 0; part < parts; ++part) {
      // This thread's tiles of tokens: by columns always the same, whose sums it holds; by rows a share of all parts'
      // tiles.
      const auto share = [&](int64_t i) {
        return by_columns ? tiles * i / team : std::clamp<int64_t>(parts * tiles * i / team - part * tiles, 0, tiles);
      };
      const int64_t t0 = share(me), t1 = share(me + 1), c0 = by_columns ? bounds[part] : 0,
                    c1 = by_columns ? bounds[part + 1] : columns;
      const auto pack = [&](int64_t r, bf16* out) {
        for (int o = 0; o < b; o += kSquare)
          for (int64_t j = begin(part)[r]; j < end(part)[r]; ++j)
            for (int k = 0; k < b; k += kDepth, out += kStride<T>) {
              if (transposed) right_straight(w + (cols[j] * b + k) * ldw + r * b + o, ldw, out);
              else right_transposed(w + (r * b + o) * ldw + cols[j] * b + k, ldw, out);
            }
      };
      const int64_t steps = std::max<int64_t>(1, blocks(part) * deep * deep * kSteps<T>);
      const auto to_come = [&](int64_t tile, bf16* out) {
        const int64_t here = tile < t1 ? std::min<int64_t>(kSquare, n - tile * kSquare) : 0;
        return PanelToCome<T>{x + tile * kSquare * ldx + c0 * b, ldx, here,
                              tile < t1 ? (c1 - c0) * deep : 0,  out, steps};
      };
      bf16* out = mine;
      if (by_columns) {
#pragma omp barrier
        for (int64_t r = 0; r < rows; out += (end(part)[r] - begin(part)[r]) * block, ++r)
          if (r % team == me) pack(r, out);
#pragma omp barrier
      } else if (t0 < t1) {
        for (int64_t r = r0(part); r < r1(part); out += (ptr[r + 1] - ptr[r]) * block, ++r) pack(r, out);
      }
      if (t0 < t1) to_come(t0, panel).finish();
      for (int64_t tile = t0; tile < t1; ++tile, std::swap(panel, other))
        (stream ? tiled_rows<b, fp32, T>
                : tiled_rows<b, false, T>)(panel - c0 * deep * kStride<T>, begin(part), end(part), cols, r0(part),
                                           r1(part), mine, add || (by_columns && part > 0) ? nullptr : start.get(),
                                           y + tile * kSquare * ldy, ldy,
                                           std::min<int64_t>(kSquare, n - tile * kSquare), to_come(tile + 1, other));
    }
    stores_done();
  }
}

// A span of tokens, some columns wide, in the making as operands of a product over the tokens: [32 columns][32 tokens]
// squares, `length` apart. Tokens from n on are 0. `steps` products share the work.
template <class T>
struct SpanToCome {
  static constexpr int P = kParts<T>;
  const T* x = nullptr;
  int64_t ld = 0, n = 0, wide = 0, tokens = 0, length = 0;  // squares
  bf16* operands = nullptr;
  bool left = false;  // x^T is the left operand; else x the right one
  int64_t steps = 1, due = 0, column = 0, token = 0;
  int unit_ = 0;
  uvec rows[P][kTile];

  int units_of_square() const { return left ? 2 * (P + 1) : 8; }
  int64_t units() const { return wide * tokens * units_of_square(); }
  bool done() const { return column >= wide; }

  __attribute__((always_inline)) void unit() {
    const T* from = x + token * kDepth * ld + column * kDepth;
    bf16* to = operands + (column * length + token) * kStride<T>;
    const int64_t here = n - token * kDepth;
    T padded[kDepth * kDepth];
    if (here < kDepth) {
      std::memset(static_cast<void*>(padded), 0, sizeof padded);
      for (int64_t t = 0; t < here; ++t)
        std::memcpy(static_cast<void*>(padded + t * kDepth), from + t * ld, kDepth * sizeof(T));
      from = padded;
    }
    const int64_t step = here < kDepth ? kDepth : ld;
    if (left) {
      const int h = unit_ / (P + 1), p = unit_ % (P + 1) - 1;
      if (p < 0)
        for (int k = 0; k < kTile; ++k) {
          uvec part[P];
          column_pairs(from + h * kTile, step, k, part);
          for (int q = 0; q < P; ++q) rows[q][k] = part[q];
        }
      else transposed_tile(rows[p], to + (2 * p + h) * kTileNumbers);
    } else {
      right_rows(from, step, unit_ / 4, unit_ % 4 * 4, unit_ % 4 * 4 + 4, to);
    }
    if (++unit_ < units_of_square()) return;
    unit_ = 0;
    if (++token == tokens) token = 0, ++column;
  }
  __attribute__((always_inline)) void step(int64_t all) {
    for (due += all; due >= steps && !done(); due -= steps) unit();
  }
  __attribute__((noinline)) void finish() {
    while (!done()) unit();
  }
};

// dW = dy^T x on the kept blocks, 0 elsewhere, or with `add` dW += dy^T x there; dW is (out, in) contiguous. The
// narrower of dy and x is made operands whole; of the other each thread makes the block columns that belong to its part
// of dW, while the products of those before them run. A span of tokens at a time stays in L2; between spans the sums
// wait in dW, for 16 bits in fp32 beside it.
template <int b, class T>
void tiled_outer(const SparsePattern& p, const T* dy, int64_t ldy, const T* x, int64_t ldx, T* dw, int64_t n, bool add,
                 int threads) {
  constexpr bool fp32 = std::is_same_v<T, float>;
  constexpr int deep = b / kDepth;
  constexpr int64_t square = kSquare * kSquare;
  if (p.out == 0 || p.in == 0) return;
  const bool by_rows = p.out >= p.in;
  const int32_t *ptr = by_rows ? p.ptr : p.t_ptr, *index = by_rows ? p.cols : p.t_rows;
  const T *whole = by_rows ? x : dy, *part = by_rows ? dy : x;
  const int64_t ld_whole = by_rows ? ldx : ldy, ld_part = by_rows ? ldy : ldx,
                narrow = (by_rows ? p.in : p.out) / kDepth;
  const int64_t owners = (by_rows ? p.out : p.in) / b, chunks = (n + kDepth - 1) / kDepth;
  const int64_t most = std::clamp<int64_t>(kSpanBytes / (narrow * kStride<T> * int64_t(sizeof(bf16))), 4, 32);
  const int64_t spans = (chunks + most - 1) / most, length = (chunks + spans - 1) / spans;
  const auto in_span = [&](int64_t span) { return std::min(length, chunks - span * length); };
  Scratch<bf16> wholes(spans * narrow * length * kStride<T>), parts(threads * 2 * deep * length * kStride<T>);
  Scratch<float> partial(!fp32 && spans > 1 ? ptr[owners] * deep * deep * square : 0);
#pragma omp parallel num_threads(threads)
  {
    const Tiles registers;
    const int64_t me = thread_index(), team = team_size();
    if (!add) {
#pragma omp for schedule(static) nowait
      for (int64_t r = 0; r < p.out / b; ++r) clear_dropped<b>(p, r, dw);
    }
    const auto to_come = [&](const T* from, int64_t ld, int64_t span, int64_t wide, bool left, bf16* operands) {
      SpanToCome<T> span_;
      span_.x = from + span * length * kDepth * ld, span_.ld = ld, span_.n = n - span * length * kDepth;
      span_.wide = wide, span_.tokens = in_span(span), span_.length = length;
      span_.operands = operands, span_.left = left;
      return span_;
    };
#pragma omp for schedule(static)
    for (int64_t k = 0; k < spans * narrow; ++k)
      to_come(whole + k % narrow * kDepth, ld_whole, k / narrow, 1, !by_rows, wholes.get() + k * length * kStride<T>)
          .finish();
    const auto bound = [&](int64_t i) {
      return i == team ? owners : std::lower_bound(ptr, ptr + owners, int32_t(int64_t(ptr[owners]) * i / team)) - ptr;
    };
    const int64_t o0 = bound(me), o1 = bound(me + 1);
    const auto own_to_come = [&](int64_t span, int64_t o, bf16* operands) {
      return to_come(part + o * b, ld_part, span, deep, by_rows, operands);
    };
    // The owner after o that has blocks, in this span or the next.
    const auto after = [&](int64_t& span, int64_t& o) {
      do {
        if (++o >= o1) o = o0, ++span;
      } while (span < spans && ptr[o] == ptr[o + 1]);
    };
    bf16 *own = parts.get() + me * 2 * deep * length * kStride<T>, *other_own = own + deep * length * kStride<T>;
    alignas(64) float sums[2][square];
    int at = 0;
    Unwritten<false, T> unwritten;
    int64_t span = 0, o = o0 - 1;
    if (ptr[o0] < ptr[o1]) {
      after(span, o);
      own_to_come(span, o, own).finish();
    } else {
      span = spans;
    }
    while (span < spans) {
      int64_t next_span = span, next_o = o;
      after(next_span, next_o);
      SpanToCome<T> next;
      if (next_span < spans) next = own_to_come(next_span, next_o, other_own);
      const int64_t all = next.units();
      next.steps = int64_t(ptr[o + 1] - ptr[o]) * deep * deep * in_span(span) * kSteps<T>;
      const auto out_of = [&](int64_t j, int mine, int other) {
        const int64_t r = (by_rows ? o : index[j]) * b + (by_rows ? mine : other) * kDepth;
        return dw + r * p.in + (by_rows ? index[j] : o) * b + (by_rows ? other : mine) * kDepth;
      };
      for (int64_t j = ptr[o]; j < ptr[o + 1]; ++j)
        for (int s = 0; s < deep * deep; ++s) {
          const int mine = s / deep, other = s % deep;
          const bf16* theirs = wholes.get() + (span * narrow + index[j] * deep + other) * length * kStride<T>;
          const bf16* ours = own + mine * length * kStride<T>;
          const bf16 *left = by_rows ? ours : theirs, *right = by_rows ? theirs : ours;
          T* out = out_of(j, mine, other);
          float* sum = partial.get() + (j * deep * deep + s) * square;
          if (fp32 || span == 0) sum_from_zero();
          else sum_from(sum, kSquare);
          const T* soon =
              out_of(j + (s + 1 == deep * deep && j + 1 < ptr[o + 1]), (s + 1) / deep % deep, (s + 1) % deep);
          int row = 0;
          for (int64_t q = 0; q < in_span(span); ++q)
            add_product<T>(left + q * kStride<T>, right + q * kStride<T>, [&](int) __attribute__((always_inline)) {
              unwritten.write(4);
              if (fp32 && row < kSquare) {
                __builtin_prefetch(soon + row * p.in, 1), __builtin_prefetch(soon + row * p.in + kTile, 1);
                ++row;
              }
              next.step(all);
            });
          unwritten.write(kSquare);
          if (fp32 || span + 1 == spans) {
            sum_to(sums[at], kSquare);
            unwritten = {sums[at], out, p.in, kSquare, fp32 && (add || span > 0)};
            at ^= 1;
          } else {
            sum_to(sum, kSquare);
          }
        }
      next.finish();
      std::swap(own, other_own);
      span = next_span, o = next_o;
    }
    unwritten.write(kSquare);
  }
}

// All blocks of 32 of a (out, in) weight, in the order of a pattern.
struct EveryBlock {
  Scratch<int32_t> ptr, cols, t_ptr, t_rows;
  SparsePattern pattern;

  EveryBlock(int64_t out, int64_t in)
      : ptr(out / kSquare + 1),
        cols(out / kSquare * (in / kSquare)),
        t_ptr(in / kSquare + 1),
        t_rows(out / kSquare * (in / kSquare)),
        pattern{out, in, kSquare, ptr.get(), cols.get(), t_ptr.get(), t_rows.get(), nullptr} {
    const int64_t rows = out / kSquare, columns = in / kSquare;
    for (int64_t r = 0; r <= rows; ++r) ptr.get()[r] = int32_t(r * columns);
    for (int64_t c = 0; c <= columns; ++c) t_ptr.get()[c] = int32_t(c * rows);
    for (int64_t j = 0; j < rows * columns; ++j)
      cols.get()[j] = int32_t(j % columns), t_rows.get()[j] = int32_t(j % rows);
  }
};

}  // namespace pycse::PYCSE_ISA
