// AMX's tile instructions as plain loops, included before kernels/cpu/amx.cpp: its products run on processors without
// AMX, and sanitizers see every number that a tile touches (the instructions themselves are opaque to them).
#pragma once
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace tiles_model {

constexpr int kRows = 16, kBytes = 64;
struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
inline thread_local Config config = {};
inline thread_local uint8_t registers[8][kRows][kBytes];

inline void load_config(const void* from) {
  std::memcpy(&config, from, sizeof config);
  std::memset(registers, 0, sizeof registers);
}
inline void store_config(void* to) { std::memcpy(to, &config, sizeof config); }
inline void release() { config = {}; }
inline void used(int t) {
  if (config.palette != 1 || config.rows[t] != kRows || config.bytes[t] != kBytes) __builtin_trap();
}

inline void zero(int t) { used(t), std::memset(registers[t], 0, sizeof registers[t]); }
inline void load(int t, const void* from, int64_t stride) {
  used(t);
  for (int r = 0; r < kRows; ++r) std::memcpy(registers[t][r], static_cast<const char*>(from) + r * stride, kBytes);
}
inline void store(int t, void* to, int64_t stride) {
  used(t);
  for (int r = 0; r < kRows; ++r) std::memcpy(static_cast<char*>(to) + r * stride, registers[t][r], kBytes);
}
// sum (16, 16) fp32 += a (16, 32) b (32, 16) in bf16; b holds pairs of its rows side by side.
inline void multiply(int sum, int a, int b) {
  used(sum), used(a), used(b);
  const auto number = [](int t, int row, int k) {
    uint16_t half;
    std::memcpy(&half, registers[t][row] + 2 * k, sizeof half);
    const uint32_t bits = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  };
  float left[kRows][32], right[kRows][32];
  for (int r = 0; r < kRows; ++r)
    for (int k = 0; k < 32; ++k) left[r][k] = number(a, r, k), right[r][k] = number(b, r, k);
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kRows; ++n) {
      float x;
      std::memcpy(&x, registers[sum][m] + 4 * n, sizeof x);
      for (int k = 0; k < kRows; ++k) x += left[m][2 * k] * right[k][2 * n] + left[m][2 * k + 1] * right[k][2 * n + 1];
      std::memcpy(registers[sum][m] + 4 * n, &x, sizeof x);
    }
}

inline int granted(long, long, long) { return 0; }

}  // namespace tiles_model

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadd(tile, from, stride) tiles_model::load(tile, from, stride)
#define _tile_stored(tile, to, stride) tiles_model::store(tile, to, stride)
#define _tile_zero(tile) tiles_model::zero(tile)
#define _tile_dpbf16ps(sum, a, b) tiles_model::multiply(sum, a, b)
#define _tile_loadconfig(from) tiles_model::load_config(from)
#define _tile_storeconfig(to) tiles_model::store_config(to)
#define _tile_release() tiles_model::release()

// The processor has tiles, and the system lends them.
#define __get_cpuid_count(leaf, part, a, b, c, d) (*(a) = *(b) = *(c) = *(d) = ~0u, 1)
#define syscall(...) tiles_model::granted(__VA_ARGS__)
