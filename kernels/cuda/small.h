// A whole forward and backward in one launch, for batches bound by launches (B, N up to about a thousand). Phases with
// a barrier of the whole grid between them; each is the body that the panel driver launches by itself:
//
//   normalize      r1, r2 = 1/|z|, z1hat = r1 z1                                   norms.h, a warp for a row
//   similarities   S = z1hat z2^T, fp32                                            tile.h, a block for 64 x 64
//   rows           S -> losses and G = dL/dS with the key's norm, complete         rows.h, a block for a row
//     symmetric:   rows without gradient and columns; columns' log-sums; rows      symmetric.h
//   gradients      g1 = G z2, g2 = G^T z1hat, fp32; total = sum coef_i L_i         tile.h
//   project        dz = project(g)                                                 norms.h
//
// Stored (small_work): z1hat, S, G in z's type (fp32: S itself), g in fp32: (8 N + 6 D) B + 4 N D bytes for bf16. They
// stay in L2. Any number of blocks does: each takes items of a phase in turn, and sums have an order that does not
// depend on how many.
#pragma once
#include "norms.h"
#include "symmetric.h"
#include "tile.h"

namespace pycse::cuda {

// Bytes of work for a call, every array on a 256-byte boundary; with `p` and `q` also where they stand in q.work.
inline int64_t small_work(Contrastive& p, Small& q, bool bf16) {
  const int64_t B = p.B, N = p.N, D = q.z1.D;
  int64_t bytes = 0;
  const auto take = [&](int64_t n) {
    void* at = q.work ? static_cast<char*>(q.work) + bytes : nullptr;
    bytes += (n + 255) / 256 * 256;
    return at;
  };
  q.ld_S = (N + 7) / 8 * 8, q.ld_hat = (D + 7) / 8 * 8;
  q.r1 = take(4 * B), q.f = take(4 * B), q.r2 = take(4 * N);
  q.S = take(4 * B * q.ld_S);
  q.G = bf16 ? take(2 * B * q.ld_S) : q.S;
  q.z1hat = q.normalize ? take((bf16 ? 2 : 4) * B * q.ld_hat) : const_cast<void*>(q.z1.z);
  if (!q.normalize) q.ld_hat = q.z1.ld;
  q.g1 = bf16 && q.dz1 ? take(4 * B * D) : q.dz1;
  q.g2 = bf16 && q.dz2 ? take(4 * N * D) : q.dz2;
  p.r2 = q.r2;
  p.s_pos = q.symmetric && p.exclude.given ? take(4 * B) : nullptr;  // in S too, but columns ask before their row
  if (q.symmetric) {
    p.lpos = take(4 * B), p.lneg = take(4 * B), p.column_max = take(4 * B), p.column_sum = take(4 * B);
    p.lneg_column = take(4 * B), p.lse_column = take(4 * B);
  }
  return bytes;
}

inline int64_t small_work_size(int B, int N, int D, DType dtype, bool normalize, bool symmetric, bool dz1, bool dz2) {
  Contrastive p;
  Small q;
  char any;  // of the gradients only whether they are wanted
  p.B = B, p.N = N, p.exclude.given = true;
  q.z1.D = D, q.normalize = normalize, q.symmetric = symmetric;
  q.dz1 = dz1 ? &any : nullptr, q.dz2 = dz2 ? &any : nullptr;
  return small_work(p, q, dtype == DType::bf16);
}

constexpr int kSmallTile = 64;
template <class T> using Similarities = Product<T, kSmallTile, kSmallTile, true, true>;
template <class T> using RowGradient = Product<T, kSmallTile, kSmallTile, true, false>;
template <class T> using KeyGradient = Product<T, kSmallTile, kSmallTile, false, false>;
template <class T> constexpr int kSmallBytes = kTileBytes<Similarities<T>, T, false, float, kSmallTile, kSmallTile>;

PYCSE_HD int small_tiles(int rows, int columns) { return ceil_div(rows, kSmallTile) * ceil_div(columns, kSmallTile); }
PYCSE_HD int small_gradient_tiles(const Contrastive& p, const Small& q) {
  return (q.dz1 ? small_tiles(p.B, q.z1.D) : 0) + (q.dz2 ? small_tiles(p.N, q.z1.D) : 0);
}

// An operand in memory, rows x columns.
template <class T>
struct Operand {
  const T* at;
  int64_t ld;
  int rows, columns;

  PYCSE_BODY bool wide() const { return aligned(at) && ld * int64_t(sizeof(T)) % kAccess == 0; }
  PYCSE_BODY From<T> chunk(int row, int column) const {
    const int left = columns - column;
    const bool here = row < rows && left > 0;
    return {here ? at + row * ld + column : at, here ? (left < kWidth<T> ? left : kWidth<T>) : 0};
  }
  // Its chunks of a step where K runs along columns, from row `first` on; and where it runs along rows.
  PYCSE_BODY auto along_columns(int first) const {
    return [*this, first](int step) {
      return [*this, first, step](int c) {
        return [*this, first, step, c](int r) { return chunk(first + r, step * kDepth<T> + c); };
      };
    };
  }
  PYCSE_BODY auto along_rows(int first) const {
    return [*this, first](int step) {
      return [*this, first, step](int c) {
        return [*this, first, step, c](int r) { return chunk(step * kDepth<T> + r, first + c); };
      };
    };
  }
};

// Stores tile (i0, j0) of out (rows, columns), fp32 with rows ld apart.
template <class P, class Block>
PYCSE_BODY void finish_small(Block& block, P& sums, void* to, int64_t ld, int rows, int columns, int i0, int j0) {
  float* out = static_cast<float*>(to);
  const bool wide = aligned(out) && ld % kWidth<float> == 0;
  finish<float, kSmallTile, kSmallTile, false>(
      block, sums, wide, [](int) { return 0.0f; },
      [&](int n) {
        return [=](int m) {
          const bool here = i0 + m < rows && j0 + n < columns;
          return To<float>{out + (here ? (i0 + m) * ld + j0 + n : 0), here ? columns - j0 - n : 0, 0};
        };
      });
  block.sync();  // the next tile takes the same memory
}

template <class T, class Block>
PYCSE_BODY void similarity_tile(Block& block, const Contrastive& p, const Small& q, int tile) {
  const int D = q.z1.D, across = ceil_div(p.N, kSmallTile), i0 = tile / across * kSmallTile,
            j0 = tile % across * kSmallTile;
  const Operand<T> a = {static_cast<const T*>(q.z1hat), q.ld_hat, p.B, D};
  const Operand<T> b = {static_cast<const T*>(q.z2.z), q.z2.ld, p.N, D};
  Similarities<T> sums;
  product<T, true>(block, sums, ceil_div(D, kDepth<T>), a.wide(), b.wide(), a.along_columns(i0), b.along_columns(j0),
                   NoBits());
  finish_small(block, sums, q.S, q.ld_S, p.B, p.N, i0, j0);
}

template <class T, class Block>
PYCSE_BODY void gradient_tile(Block& block, const Contrastive& p, const Small& q, int tile) {
  const int D = q.z1.D, across = ceil_div(D, kSmallTile), of_rows = q.dz1 ? small_tiles(p.B, D) : 0;
  const Operand<T> G = {static_cast<const T*>(q.G), q.ld_S, p.B, p.N};
  const auto at = [&](int k) { return k * kSmallTile; };
  if (tile < of_rows) {
    const Operand<T> b = {static_cast<const T*>(q.z2.z), q.z2.ld, p.N, D};
    const int i0 = at(tile / across), d0 = at(tile % across);
    RowGradient<T> sums;
    product<T, true>(block, sums, ceil_div(p.N, kDepth<T>), G.wide(), b.wide(), G.along_columns(i0), b.along_rows(d0),
                     NoBits());
    finish_small(block, sums, q.g1, D, p.B, D, i0, d0);
  } else {
    const Operand<T> b = {static_cast<const T*>(q.z1hat), q.ld_hat, p.B, D};
    const int j0 = at((tile - of_rows) / across), d0 = at((tile - of_rows) % across);
    KeyGradient<T> sums;
    product<T, true>(block, sums, ceil_div(p.B, kDepth<T>), G.wide(), b.wide(), G.along_rows(j0), b.along_rows(d0),
                     NoBits());
    finish_small(block, sums, q.g2, D, p.N, D, j0, d0);
  }
}

// Row i of z1, or row i - B of z2: the norm, z1hat, and where a column's sums begin.
template <class T, class Warp>
PYCSE_BODY void small_normalize(Warp warp, const Contrastive& p, const Small& q, int i) {
  const bool row = i < p.B;
  const int k = row ? i : i - p.B;
  if (q.normalize)
    normalize_row<T>(warp, row ? q.z1 : q.z2, k, row ? q.r1 : q.r2, row ? q.z1hat : nullptr, q.ld_hat, 1);
  if (warp.index() != 0) return;
  if (!q.normalize) static_cast<float*>(row ? q.r1 : q.r2)[k] = 1;
  if (q.symmetric && row) {
    static_cast<float*>(p.column_max)[k] = -infinity<float>();
    static_cast<float*>(p.column_sum)[k] = 0;
  }
}

// G = f S of row i, in z's type.
template <class T, class Block>
PYCSE_BODY void scale_row(Block block, const Contrastive& p, const Small& q, int i, float f) {
  const float* S = static_cast<const float*>(q.S) + i * q.ld_S;
  T* G = static_cast<T*>(q.G) + i * q.ld_S;
  each<kWidth<T>>(block, p.N, 0, [&](int j, auto width) {
    constexpr int W = decltype(width)::value;
    float x[W];
    read<W>(S + j, true, x);
    for (int n = 0; n < W; ++n) x[n] *= f;
    write<W>(G + j, true, x);
  });
}

template <class T, bool Masked, class Block>
PYCSE_BODY void small_row(Block block, const Contrastive& p, const Small& q, int i) {
  const Panel panel = {q.S, q.ld_S, 0, p.B, q.f};
  if (!q.grad || q.symmetric) return row<float, false, false, Masked>(block, p, panel, i);
  row<float, true, true, Masked>(block, p, panel, i);
  block.sync();
  scale_row<T>(block, p, q, i, static_cast<const float*>(q.f)[i]);
}

template <class T, bool Masked, class Block>
PYCSE_BODY void small_symmetric_row(Block block, const Contrastive& p, const Small& q, int i) {
  symmetric_row<float, true, Masked>(block, p, {q.S, q.ld_S, 0, p.B, nullptr}, i);
  block.sync();
  if constexpr (sizeof(T) != sizeof(float)) scale_row<T>(block, p, q, i, 1);
}

// The log-sums of column j, and the loss of row j.
PYCSE_BODY void finish_column(const Contrastive& p, int j) {
  const float sum = static_cast<const float*>(p.column_sum)[j], top = static_cast<const float*>(p.column_max)[j];
  const float l_pos = static_cast<const float*>(p.lpos)[j];
  const float l_neg = sum == 0 ? -infinity<float>() : (log2(sum) + top) * float(kLn2);
  float* loss = static_cast<float*>(p.loss) + j;
  static_cast<float*>(p.lneg_column)[j] = l_neg;
  static_cast<float*>(p.lse_column)[j] = log_add(l_neg, l_pos);
  *loss = (*loss + log_add(l_neg - l_pos, 0.0f)) / 2;
}

// total = sum_i coef_i L_i.
template <class Block>
PYCSE_BODY void small_total(Block block, const Contrastive& p, void* to) {
  if (!to) return;
  float total = 0;
  for (int i = block.index(); i < p.B; i += block.size())
    total += static_cast<const float*>(p.loss)[i] * p.coefficient<float>(i);
  total = block.sum(total);
  if (block.index() == 0) *static_cast<float*>(to) = total;
}

// Row i of dz1, or row i - B of dz2.
template <class T, class Warp>
PYCSE_BODY void small_project(Warp warp, const Contrastive& p, const Small& q, int i) {
  const bool row = i < p.B;
  const int k = row ? i : i - p.B, D = q.z1.D;
  const void* g = row ? q.g1 : q.g2;
  void* out = row ? q.dz1 : q.dz2;
  if (!out) return;
  if (q.normalize) return project_row<T, float>(warp, row ? q.z1 : q.z2, k, g, row ? q.r1 : q.r2, nullptr, !row, out);
  for (int d = warp.index(); d < D; d += warp.size())
    store(static_cast<T*>(out)[int64_t(k) * D + d], static_cast<const float*>(g)[int64_t(k) * D + d]);
}

// All phases. The grid shares out n items of each: warps(n, f(warp, k)), blocks(n, f(block, k)), tiles(n, f(tile, k)),
// columns(n, f(slice, k)), threads(n, f(k)); sync() is the barrier.
template <class T, bool Masked, class Grid>
PYCSE_BODY void small(Grid& grid, const Contrastive& p, const Small& q) {
  grid.warps(p.B + p.N, [&](auto warp, int i) { small_normalize<T>(warp, p, q, i); });
  grid.sync();
  grid.tiles(small_tiles(p.B, p.N), [&](auto& tile, int k) { similarity_tile<T>(tile, p, q, k); });
  if (p.s_pos)
    grid.warps(p.B, [&](auto warp, int i) { positive_row<T>(warp, p, {q.z1hat, q.ld_hat, p.B, q.z1.D}, q.z2, 0, i); });
  grid.sync();
  grid.blocks(p.B, [&](auto block, int i) { small_row<T, Masked>(block, p, q, i); });
  if (q.symmetric) {
    const Panel panel = {q.S, q.ld_S, 0, p.B, nullptr};
    grid.columns(p.N, [&](auto slice, int j) { column<float, Masked>(slice, p, panel, j); });
    grid.sync();
    grid.threads(p.N, [&](int j) { finish_column(p, j); });
    if (q.grad) {
      grid.sync();
      grid.blocks(p.B, [&](auto block, int i) { small_symmetric_row<T, Masked>(block, p, q, i); });
    }
  }
  grid.sync();
  const int tiles = q.grad ? small_gradient_tiles(p, q) : 0;
  grid.tiles(tiles, [&](auto& tile, int k) { gradient_tile<T>(tile, p, q, k); });
  grid.blocks(1, [&](auto block, int) { small_total(block, p, q.total); });
  if (tiles == 0) return;
  grid.sync();
  grid.warps(p.B + p.N, [&](auto warp, int i) { small_project<T>(warp, p, q, i); });
}

// Items of the phase that has most.
inline int small_items(const Contrastive& p, const Small& q) {
  const int tiles = q.grad ? small_gradient_tiles(p, q) : 0, rows = p.B > tiles ? p.B : tiles;
  const int pairs = small_tiles(p.B, p.N);
  return rows > pairs ? rows : pairs;
}

template <class Run>
void small_variant(const Contrastive& p, DType dtype, Run run) {
  with_flag(p.masked(), [&](auto masked) {
    if (dtype == DType::f32) run(float(), masked);
    else if (dtype == DType::bf16) run(bf16(), masked);
    else throw std::logic_error("pycse: small takes float32 and bfloat16");
  });
}

}  // namespace pycse::cuda
