// AMX: products of 16 x 32 by 32 x 16 bf16 in one instruction, summed in fp32. And fp32 by way of bf16:
//
//   x = x1 + x2 + x3 exactly, each a bf16;  x w = x1 w1 + x1 w2 + x2 w1 + x2 w2 + x1 w3 + x3 w1, but for 2^-24 of it
//
// which is as precise as fp32, and six such products are still faster than one of the fp32 units. Infinities make NaN.
// Parts below 1.2e-38 count as 0: numbers lose bits, eight at a time, from 1e-33 down.
#pragma once
#include <immintrin.h>

#include "lanes.h"
#include "transpose.h"

namespace pycse::PYCSE_ISA {

constexpr int kTile = 16, kDepth = 32;  // a product: (16, 32) by (32, 16)
constexpr int64_t kTileNumbers = kTile * kDepth;  // of bf16 in a tile, 1 KB
template <class T> constexpr int kParts = std::is_same_v<T, float> ? 3 : 1;

// This thread's tile registers, all of 16 rows of 64 bytes; what others had configured comes back in the end.
class Tiles {
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  Config before;

 public:
  Tiles() {
    const Config mine;
    _tile_storeconfig(&before);
    _tile_loadconfig(&mine);
  }
  ~Tiles() {
    if (before.palette) _tile_loadconfig(&before);
    else _tile_release();
  }
  Tiles(const Tiles&) = delete;
};

// Rounded to bf16; towards zero where that would leave the finite numbers, or where a NaN is to stay one.
PYCSE_INLINE uvec to_bf16(uvec u, bool any) {
  if (!any) return (u + 0x8000u) & 0xffff0000u;
  return (u + ((uvec)((u & 0x7fffffffu) < 0x7f7f8000u) & 0x8000u)) & 0xffff0000u;
}

// Pairs of numbers as bf16, one in each half of a lane: part[p] of (low, high). The processor multiplies pair by pair,
// so any order of the depth will do that both operands have.
PYCSE_INLINE void pairs(vec low, vec high, uvec* part) {
#pragma GCC unroll 3
  for (int p = 0; p < 3; ++p) {
    const uvec l = to_bf16((uvec)low, p == 0), h = to_bf16((uvec)high, p == 0);
    part[p] = l >> 16 | h;
    low -= (vec)l, high -= (vec)h;
  }
}
PYCSE_INLINE uvec widened(const bf16* x) {
  hvec h;
  std::memcpy(&h, x, sizeof h);
  return __builtin_convertvector(h, uvec);
}

// 32 numbers of a row: the left operand's row, or before a transposition the right one's column.
PYCSE_INLINE void row_pairs(const float* x, uvec* part) { pairs(load_lanes(x), load_lanes(x + kTile), part); }
PYCSE_INLINE void row_pairs(const bf16* x, uvec* part) { std::memcpy(part, x, sizeof *part); }

// Row k of the right operand, 16 columns of w: the same pairs of the depth as above.
PYCSE_INLINE void column_pairs(const float* w, int64_t ld, int k, uvec* part) {
  pairs(load_lanes(w + k * ld), load_lanes(w + (k + kTile) * ld), part);
}
PYCSE_INLINE void column_pairs(const bf16* w, int64_t ld, int k, uvec* part) {
  *part = widened(w + 2 * k * ld) | widened(w + (2 * k + 1) * ld) << 16;
}

// tiles[part][h] = the rows [16 h, 16 h + 16) of x, 32 wide, as left operands: here row t.
template <class T>
PYCSE_INLINE void left_row(const T* x, int t, bf16* tiles) {
  uvec part[kParts<T>];
  row_pairs(x, part);
#pragma GCC unroll 3
  for (int p = 0; p < kParts<T>; ++p) std::memcpy(tiles + (2 * p * kTile + t) * kDepth, &part[p], sizeof part[p]);
}

// tile[j] = lane j of every row.
PYCSE_INLINE void transposed_tile(const uvec* rows, bf16* tile) {
  vec m[kTile];
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) m[i] = (vec)rows[i];
  transpose<float>(m);
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) store_lanes(reinterpret_cast<float*>(tile) + i * kTile, m[i]);
}

// tiles[part][h] = right operands x^T, of x (32 results, 32).
template <class T>
PYCSE_NOINLINE void right_transposed(const T* x, int64_t ld, bf16* tiles) {
  for (int h = 0; h < 2; ++h) {
    uvec rows[kParts<T>][kTile];
    for (int i = 0; i < kTile; ++i) {
      uvec part[kParts<T>];
      row_pairs(x + (h * kTile + i) * ld, part);
      for (int p = 0; p < kParts<T>; ++p) rows[p][i] = part[p];
    }
    for (int p = 0; p < kParts<T>; ++p) transposed_tile(rows[p], tiles + (2 * p + h) * kTileNumbers);
  }
}
// Rows [k0, k1) of tiles[part][h] = right operands x, of x (32, 32 results).
template <class T>
PYCSE_INLINE void right_rows(const T* x, int64_t ld, int h, int k0, int k1, bf16* tiles) {
  for (int k = k0; k < k1; ++k) {
    uvec part[kParts<T>];
    column_pairs(x + h * kTile, ld, k, part);
    for (int p = 0; p < kParts<T>; ++p)
      std::memcpy(tiles + (2 * p + h) * kTileNumbers + k * kDepth, &part[p], sizeof part[p]);
  }
}
template <class T>
PYCSE_NOINLINE void right_straight(const T* x, int64_t ld, bf16* tiles) {
  for (int h = 0; h < 2; ++h) right_rows(x, ld, h, 0, kTile, tiles);
}

// The tile registers: 0 to 3 are a (32, 32) sum, 4 and 5 the left operands, 6 and 7 the right ones. The compiler does
// not know that they touch memory.
#define PYCSE_IN_ORDER() asm volatile("" ::: "memory")
PYCSE_INLINE void sum_from_zero() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
PYCSE_INLINE void sum_from(const float* rows, int64_t ld) {  // ld 0: one row for all
  PYCSE_IN_ORDER();
  _tile_loadd(0, rows, ld * 4);
  _tile_loadd(1, rows + kTile, ld * 4);
  _tile_loadd(2, rows + kTile * ld, ld * 4);
  _tile_loadd(3, rows + kTile * ld + kTile, ld * 4);
}
PYCSE_INLINE void sum_to(float* rows, int64_t ld) {
  _tile_stored(0, rows, ld * 4);
  _tile_stored(1, rows + kTile, ld * 4);
  _tile_stored(2, rows + kTile * ld, ld * 4);
  _tile_stored(3, rows + kTile * ld + kTile, ld * 4);
  PYCSE_IN_ORDER();
}
PYCSE_INLINE void load_left(const bf16* tiles, int part) {
  _tile_loadd(4, tiles + 2 * part * kTileNumbers, 64);
  _tile_loadd(5, tiles + (2 * part + 1) * kTileNumbers, 64);
}
PYCSE_INLINE void load_right(const bf16* tiles, int part) {
  _tile_loadd(6, tiles + 2 * part * kTileNumbers, 64);
  _tile_loadd(7, tiles + (2 * part + 1) * kTileNumbers, 64);
}
PYCSE_INLINE void multiply() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// sum += left right, the smallest products first. Each of kSteps steps leaves the vector units free for some 64 cycles:
// beside(step) is what they do then.
template <class T> constexpr int kSteps = kParts<T> == 3 ? 6 : 1;
template <class T, class Beside>
PYCSE_INLINE void add_product(const bf16* left, const bf16* right, Beside beside) {
  load_left(left, 0);
  if constexpr (kParts<T> == 3) {
    load_right(right, 2), beside(0), multiply();
    load_right(right, 1), beside(1), multiply();
    load_right(right, 0), beside(2), multiply();
    load_left(left, 2), beside(3), multiply();
    load_left(left, 1), beside(4), multiply();
    load_right(right, 1), beside(5), multiply();
  } else {
    load_right(right, 0), beside(0), multiply();
  }
}

}  // namespace pycse::PYCSE_ISA
