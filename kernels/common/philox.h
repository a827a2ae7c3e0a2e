// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), for host and device.
//
// The shuffle's key of member n of a group is word n mod 4 of block n div 4: counter (n div 4, group, row, row >> 32),
// key (seed, seed >> 32). pycse/grouping.py defines the same.
#pragma once
#include <cstdint>

#include "target.h"

namespace pycse {

struct Philox {
  uint32_t word[4];

  PYCSE_HD Philox(uint64_t seed, uint32_t block, uint32_t group, uint64_t row)
      : word{block, group, uint32_t(row), uint32_t(row >> 32)} {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t(0xD2511F53u) * word[0], b = uint64_t(0xCD9E8D57u) * word[2];
      const uint32_t x0 = uint32_t(b >> 32) ^ word[1] ^ k0, x2 = uint32_t(a >> 32) ^ word[3] ^ k1;
      word[0] = x0, word[1] = uint32_t(b), word[2] = x2, word[3] = uint32_t(a);
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
  }
};

}  // namespace pycse
