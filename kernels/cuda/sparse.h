// Linear layers whose weights W (out, in) are kept in square blocks, or under a mask of bits. Symbols: x (T, in), dy
// (T, out).
//
//   linear   y  = x Wᵀ + b          a tile is kTokens tokens x a block row; K runs over the columns of its blocks
//   dx       dX = dY W              kTokens tokens x a block column; K over the rows of its blocks
//   dw       dW = dYᵀ X             a block row x kWide columns of its blocks, side by side; K over tokens
//
// The blocks of W are read where they stand. Under bits K runs over everything: W's elements are masked between their
// arrival in shared memory and the product, dW's before they are stored. Sums are fp32 (fp64 for fp64), rounded once.
// dw splits the tokens where tiles are few: each split stores its sums, add_splits adds them in order. No atomics on
// floats.
// Memory: dw's partial sums, splits x kept weights; nothing else.
#pragma once
#include "tile.h"

namespace pycse::cuda {

enum class Storage : int { f32 = 0, bf16 = 1, f64 = 2, f16 = 3 };
enum class Which : int { linear = 0, dx = 1, dw = 2 };

struct Matrix {
  const void* at = nullptr;
  int64_t ld = 0;
};

// Which weights are kept. By blocks: ptr (blocks along one side + 1) and index (nnz) name, ascending, those of each
// block row (linear, dw) or block column (dx). block 0: by bits (out, words), bit j of word k is column 32 k + j.
struct Kept {
  int block = 0;
  const int* ptr = nullptr;
  const int* index = nullptr;
  const uint32_t* bits = nullptr;
  int64_t words = 0;
};

struct Sparse {
  int T = 0, out = 0, in = 0;
  Kept kept;
  Matrix a, b;  // x and W; dy and W; dy and x
  const void* bias = nullptr;  // (out) or null
  void* c = nullptr;  // y, dX or dW, contiguous; dW comes zeroed
  int splits = 1;  // of the tokens, for dw
  void* partial = nullptr;  // (splits, kept weights) acc where splits > 1; under bits (splits, out, in)
  bool wide_a = false, wide_b = false, wide_c = false;  // rows begin at 16-byte boundaries
};

template <class T> constexpr int kTokens = sizeof(T) == 8 ? 64 : 128;
template <class T> constexpr int kWide = sizeof(T) == 8 ? 64 : 128;
template <int B> constexpr int kSide = B ? B : 64;  // of a tile under bits

PYCSE_HD constexpr int tiles_of(int n, int tile) { return n / tile + (n % tile != 0); }
PYCSE_HD int at_most(int n, int most) { return n < most ? n : most; }
PYCSE_HD int at_least_0(int n) { return n > 0 ? n : 0; }

template <class T>
PYCSE_HD bool wide(const void* at, int64_t ld) {
  return aligned(at) && ld * int64_t(sizeof(T)) % kAccess == 0;
}

template <class T, int B> using LinearProduct = Product<T, kTokens<T>, kSide<B>, true, true>;
template <class T, int B> using DxProduct = Product<T, kTokens<T>, kSide<B>, true, false>;
template <class T, int B> using DwProduct = Product<T, kSide<B>, kWide<T>, false, false>;

template <class T, int B>
PYCSE_HD int64_t linear_tiles(const Sparse& p) {
  return int64_t(tiles_of(p.T, kTokens<T>)) * tiles_of(p.out, kSide<B>);
}
template <class T, int B>
PYCSE_HD int64_t dx_tiles(const Sparse& p) {
  return int64_t(tiles_of(p.T, kTokens<T>)) * tiles_of(p.in, kSide<B>);
}
template <class T, int B>
PYCSE_HD int64_t dw_tiles(const Sparse& p) {
  return int64_t(p.splits) * tiles_of(p.out, kSide<B>) * tiles_of(p.in, kWide<T>);
}

// Stores a tile of tokens from t0 and columns from n0 of a matrix (T, n).
template <class T, int M, int N, class P, class Block, class Plus>
PYCSE_BODY void finish_tokens(Block& block, const Sparse& p, P& sums, int t0, int n0, int n, Plus plus) {
  T* c = static_cast<T*>(p.c);
  finish<T, M, N, false>(block, sums, p.wide_c, plus, [&](int j) {
    return [&, j](int m) { return To<T>{c + int64_t(t0 + m) * n + n0 + j, t0 + m < p.T ? n - n0 - j : 0, 0}; };
  });
}

template <class T, int B, class Block>
PYCSE_BODY void linear_tile(Block& block, const Sparse& p, int tile) {
  constexpr int M = kTokens<T>, N = kSide<B>, V = kWidth<T>;
  const int across = tiles_of(p.out, N), row = tile % across, t0 = tile / across * M, o0 = row * N;
  const T *x = static_cast<const T*>(p.a.at), *w = static_cast<const T*>(p.b.at);
  const int begin = B ? p.kept.ptr[row] : 0;
  const int length = B ? (p.kept.ptr[row + 1] - begin) * kSide<B> : p.in;
  const auto column = [&](int k) {
    if constexpr (B == 0) return k;
    else return p.kept.index[begin + k / B] * B + k % B;
  };

  LinearProduct<T, B> sums;
  const auto from_x = [&](int step) {
    return [&, step](int c) {
      const int k = step * kDepth<T> + c, n = at_most(V, at_least_0(length - k));
      const T* at = n ? x + column(k) : x;
      return [&p, t0, n, at](int m) {
        const int t = t0 + m;
        return From<T>{at + int64_t(t < p.T ? t : 0) * p.a.ld, t < p.T ? n : 0};
      };
    };
  };
  const auto from_w = [&](int step) {
    return [&, step](int c) {
      const int k = step * kDepth<T> + c, n = at_most(V, at_least_0(length - k));
      const T* at = n ? w + column(k) : w;
      return [&p, o0, n, at](int r) {
        const int o = o0 + r;
        return From<T>{at + int64_t(o < p.out ? o : 0) * p.b.ld, o < p.out ? n : 0};
      };
    };
  };
  const auto bits = [&](int step) {
    return [&, step](int c) {
      const int k = step * kDepth<T> + c;
      return [&, k](int r) {
        const bool here = o0 + r < p.out && k < length;
        return ChunkBits{p.kept.bits + (here ? (o0 + r) * p.kept.words + k / 32 : 0), here ? k % 32 : -1};
      };
    };
  };
  const int steps = tiles_of(length, kDepth<T>);
  if constexpr (B == 0) product<T, B == 0>(block, sums, steps, p.wide_a, p.wide_b, from_x, from_w, bits);
  else product<T, B == 0>(block, sums, steps, p.wide_a, p.wide_b, from_x, from_w, NoBits());

  const T* bias = static_cast<const T*>(p.bias);
  finish_tokens<T, M, N>(block, p, sums, t0, o0, p.out,
                         [&](int n) { return bias && o0 + n < p.out ? load(bias[o0 + n]) : acc_t<T>(0); });
}

template <class T, int B, class Block>
PYCSE_BODY void dx_tile(Block& block, const Sparse& p, int tile) {
  constexpr int M = kTokens<T>, N = kSide<B>, V = kWidth<T>;
  const int across = tiles_of(p.in, N), column = tile % across, t0 = tile / across * M, j0 = column * N;
  const T *dy = static_cast<const T*>(p.a.at), *w = static_cast<const T*>(p.b.at);
  const int begin = B ? p.kept.ptr[column] : 0;
  const int length = B ? (p.kept.ptr[column + 1] - begin) * kSide<B> : p.out;
  const auto row = [&](int k) {
    if constexpr (B == 0) return k;
    else return p.kept.index[begin + k / B] * B + k % B;
  };

  DxProduct<T, B> sums;
  const auto from_dy = [&](int step) {
    return [&, step](int c) {
      const int k = step * kDepth<T> + c, n = at_most(V, at_least_0(length - k));
      const T* at = n ? dy + row(k) : dy;
      return [&p, t0, n, at](int m) {
        const int t = t0 + m;
        return From<T>{at + int64_t(t < p.T ? t : 0) * p.a.ld, t < p.T ? n : 0};
      };
    };
  };
  const auto from_w = [&](int step) {
    return [&, step](int c) {
      const int n = at_most(V, at_least_0(p.in - j0 - c));
      return [&, step, c, n](int r) {
        const int k = step * kDepth<T> + r;
        const bool here = n > 0 && k < length;
        return From<T>{here ? w + int64_t(row(k)) * p.b.ld + j0 + c : w, here ? n : 0};
      };
    };
  };
  const auto bits = [&](int step) {
    return [&, step](int c) {
      const int j = j0 + c;
      return [&, step, j](int r) {
        const int k = step * kDepth<T> + r;
        const bool here = j < p.in && k < length;
        return ChunkBits{p.kept.bits + (here ? k * p.kept.words + j / 32 : 0), here ? j % 32 : -1};
      };
    };
  };
  const int steps = tiles_of(length, kDepth<T>);
  if constexpr (B == 0) product<T, B == 0>(block, sums, steps, p.wide_a, p.wide_b, from_dy, from_w, bits);
  else product<T, B == 0>(block, sums, steps, p.wide_a, p.wide_b, from_dy, from_w, NoBits());
  finish_tokens<T, M, N>(block, p, sums, t0, j0, p.in, [](int) { return acc_t<T>(0); });
}

template <class T, int B, class Block>
PYCSE_BODY void dw_tile(Block& block, const Sparse& p, int tile) {
  using A = acc_t<T>;
  constexpr int M = kSide<B>, N = kWide<T>, V = kWidth<T>;
  const int across = tiles_of(p.in, N), down = tiles_of(p.out, M);
  const int group = tile % across, row = tile / across % down, split = tile / across / down;
  // Of this tile's columns, side by side: the first slot in index, and how many columns there are.
  const int first = B ? p.kept.ptr[row] + group * (N / kSide<B>) : 0;
  const int width = B ? (p.kept.ptr[row + 1] - first) * kSide<B> : p.in - group * N;
  if (width <= 0) return;
  const auto column = [&](int n) {
    if constexpr (B == 0) return group * N + n;
    else return p.kept.index[first + n / B] * B + n % B;
  };
  const int each = tiles_of(tiles_of(p.T, kDepth<T>), p.splits);  // steps of a split
  const int begin = at_most(p.T, split * each * kDepth<T>), end = at_most(p.T, begin + each * kDepth<T>);
  const T *dy = static_cast<const T*>(p.a.at), *x = static_cast<const T*>(p.b.at);
  const int o0 = row * M;

  DwProduct<T, B> sums;
  const auto from_dy = [&](int step) {
    return [&, step](int c) {
      const int n = at_most(V, at_least_0(p.out - o0 - c));
      return [&, step, c, n](int r) {
        const int t = begin + step * kDepth<T> + r;
        const bool here = n > 0 && t < end;
        return From<T>{here ? dy + int64_t(t) * p.a.ld + o0 + c : dy, here ? n : 0};
      };
    };
  };
  const auto from_x = [&](int step) {
    return [&, step](int c) {
      const int n = at_most(V, at_least_0(width - c));
      const T* at = n ? x + column(c) : x;
      return [&, step, n, at](int r) {
        const int t = begin + step * kDepth<T> + r;
        return From<T>{at + int64_t(t < end ? t : 0) * p.b.ld, t < end ? n : 0};
      };
    };
  };
  product<T, B == 0>(block, sums, tiles_of(end - begin, kDepth<T>), p.wide_a, p.wide_b, from_dy, from_x, NoBits());

  const auto nothing = [](int) { return A(0); };
  const auto rows = at_most(M, p.out - o0);
  if (p.splits > 1) {
    const int64_t kept = B ? int64_t(p.kept.ptr[down]) * B * B : int64_t(p.out) * p.in;
    A* partial = static_cast<A*>(p.partial) + split * kept;
    finish<A, M, N, false>(block, sums, B != 0 || p.in % kWidth<A> == 0, nothing, [&](int n) {
      return [&, n](int m) {
        int64_t at;
        if constexpr (B == 0) at = int64_t(o0 + m) * p.in + group * N + n;
        else at = (int64_t(first + n / B) * B + m) * B + n % B;
        return To<A>{partial + at, m < rows ? width - n : 0, 0};
      };
    });
  } else {
    T* dw = static_cast<T*>(p.c);
    finish<T, M, N, B == 0>(block, sums, p.wide_c, nothing, [&](int n) {
      const int j = n < width ? column(n) : 0;
      return [&, n, j](int m) {
        const bool here = m < rows && n < width;
        To<T> to = {dw + (here ? int64_t(o0 + m) * p.in + j : 0), here ? width - n : 0, 0};
        if constexpr (B == 0)
          if (here) to.bits = p.kept.bits[(o0 + m) * p.kept.words + j / 32] >> j % 32;
        return to;
      };
    });
  }
}

// The block row of a slot of index: the last that begins at it or before.
PYCSE_HD int row_of_slot(const int* ptr, int rows, int slot) {
  int low = 0;
  for (int high = rows; high - low > 1;) {
    const int middle = low + (high - low) / 2;
    (ptr[middle] <= slot ? low : high) = middle;
  }
  return low;
}

// dW of a kept block, or under bits of a row, from the sums of the splits.
template <class T, int B, class Block>
PYCSE_BODY void add_splits(Block block, const Sparse& p, int piece) {
  using A = acc_t<T>;
  const int down = tiles_of(p.out, kSide<B>), n = B ? B * B : p.in;
  const int64_t kept = B ? int64_t(p.kept.ptr[down]) * n : int64_t(p.out) * p.in;
  const A* partial = static_cast<const A*>(p.partial) + int64_t(piece) * n;
  T* dw = static_cast<T*>(p.c);
  const int row = B ? row_of_slot(p.kept.ptr, down, piece) : piece;
  for (int k = block.index(); k < n; k += block.size()) {
    A sum = 0;
    for (int split = 0; split < p.splits; ++split) sum += partial[split * kept + k];
    if constexpr (B == 0) {
      const bool here = p.kept.bits[row * p.kept.words + k / 32] >> k % 32 & 1;
      store(dw[int64_t(row) * p.in + k], here ? sum : A(0));
    } else {
      store(dw[(int64_t(row) * B + k / B) * p.in + p.kept.index[piece] * B + k % B], sum);
    }
  }
}

// The bits of a row of a pattern of single weights.
template <class Block>
PYCSE_BODY void mark_row(Block block, const int* ptr, const int* index, uint32_t* bits, int words, int row) {
  uint32_t* own = bits + int64_t(row) * words;
  for (int k = block.index(); k < words; k += block.size()) own[k] = 0;
  block.sync();
  for (int k = ptr[row] + block.index(); k < ptr[row + 1]; k += block.size())
    add(own + index[k] / 32, 1u << index[k] % 32);  // each bit once: the sum is their union
}

// Calls run(T(), Count<B>) for a storage type and the side of a block, 0 for bits.
template <class Run>
void sparse_variant(Storage storage, int block, Run run) {
  const auto sides = [&](auto type) {
    switch (block) {
      case 0: return run(type, Count<0>());
      case 16: return run(type, Count<16>());
      case 32: return run(type, Count<32>());
      case 64: return run(type, Count<64>());
      default: throw std::logic_error("pycse: blocks of this size have no kernel");
    }
  };
  switch (storage) {
    case Storage::f32: return sides(float());
    case Storage::bf16: return sides(bf16());
    case Storage::f64: return sides(double());
    case Storage::f16: return sides(f16());
  }
}

template <class T>
void set_wide(Sparse& p, int columns) {
  p.wide_a = wide<T>(p.a.at, p.a.ld), p.wide_b = wide<T>(p.b.at, p.b.ld), p.wide_c = wide<T>(p.c, columns);
}

// One launch each, as those in contrastive.h. Pieces that add_splits takes: kept blocks, or rows under bits.
void sparse(Which, Sparse, Storage, int pieces, Queue);
void mark(const int* ptr, const int* index, uint32_t* bits, int rows, int words, Queue);

}  // namespace pycse::cuda
