// The panel's GEMM with the row kernel as its epilogue, for sm_90a: S = z1hat z2^T stays in registers, fixed shift
// only.
//
// Symbols and formulas as in rows.h. Of a tile of kTileM rows x kTileN keys:
//   G_ij       = e_ij l'(s_ij) r_j over the negatives, 0 at the positive          written once, bf16
//   partial_tk = sum of e over row k's negatives in column tile t                  s_pos,i by the tile that holds it
//   finish_row z_neg = sum_t partial_tk in order; loss, f, and G at the positive
// A thread block of three warpgroups takes tiles in turn. One thread of the first has the copy engine (TMA) fetch
// operands, kSteps ahead, through mbarriers; the others multiply 64 rows each (wgmma m64n256k16, fp32 sums in 128
// registers), apply the epilogue to 64 columns at a time and have the copy engine store them from shared memory. In
// clusters of two, blocks with neighbouring row tiles each fetch half of the keys' tile for both: 131 operations a byte
// from L2 instead of 87.
// Stored: G (not in forward only), partial (column tiles, c), s_pos, loss, f. S is never written. Traffic: operands
// from L2, G to memory. No atomics.
//
// A block's program is a template over its machine: Hopper's instructions (fused.cu), or models of them by the PTX
// manual, on which the host runs whole clusters thread by thread (tests/kernels/emulation).
#pragma once
#include "rows.h"

namespace pycse::cuda {

constexpr int kTileM = 128, kTileN = 256, kTileK = 64;  // K: rows of 128 bytes, one swizzle
constexpr int kSteps = 4;  // in flight: 192 KB
constexpr int kGroupRows = 64, kChunk = 64;  // rows of a warpgroup; columns of a store
constexpr int kBytesA = kTileM * kTileK * 2, kBytesB = kTileN * kTileK * 2, kStepBytes = kBytesA + kBytesB;
constexpr int kChunkBytes = kGroupRows * kChunk * 2, kChunks = kTileN / kChunk;
constexpr int kBuffers = 2;  // of chunks for a warpgroup: one is stored, one written
constexpr int kThreads = 3 * 128;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // of 168 each at entry: 40 + 2 x 232 <= 3 x 168
constexpr int kTileGroup = 16;  // row tiles that share their column tiles in L2: 2048 rows

struct Fused {
  int c = 0, i0 = 0, D = 0;
  float* partial = nullptr;  // (column tiles, c)
};

// Where a byte of a tile of 128-byte rows stands: 16-byte chunks of a row are permuted by the row's last three bits
// (PTX ISA, "128-byte swizzle": address bits 4-6 are XORed with bits 7-9). The tile begins at a multiple of 1024.
PYCSE_HD uint32_t swizzled(uint32_t byte) { return byte ^ (byte >> 7 & 7) << 4; }

// A wgmma matrix descriptor for K-major operands in such rows (PTX ISA, "matrix descriptor"): bits 0-13 the address /
// 16; 16-29 the leading offset, unused with a swizzle; 32-45 bytes / 16 from 8 rows to the next 8; 62-63 1: 128-byte
// swizzle. K advances by 16 elements with 32 bytes of address.
PYCSE_HD uint64_t descriptor(uint32_t address) {
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// Row and column in a warpgroup's 64 x 256 sums of register n of a thread (PTX ISA, "D fragment of wgmma m64nNk16").
PYCSE_HD int sums_row(int thread, int n) { return thread / 32 * 16 + thread % 32 / 4 + n / 2 % 2 * 8; }
PYCSE_HD int sums_column(int thread, int n) { return n / 4 * 8 + thread % 4 * 2 + n % 2; }

struct TileAt { int m, n; };

// The place, counted in tiles, of a number: down kTileGroup row tiles, then the next column tile.
PYCSE_HD TileAt tile_at(int tile, int down, int across) {
  const int group = tile / (kTileGroup * across), first = group * kTileGroup;
  const int rows = down - first < kTileGroup ? down - first : kTileGroup, within = tile - group * kTileGroup * across;
  return {first + within % rows, within / rows};
}

// The numbers are the host's: a fixed shift came from them.
PYCSE_BODY Logit<float> known_logit(const Contrastive& p) {
  Coefficients known = p.logit;
  known.at = nullptr;
  return known.logit<float>();
}

// A thread's two rows; k0: its warpgroup's first row of the panel.
template <bool Masked>
struct FusedRows {
  Negatives<float, Masked> of[2];  // positive -1 also behind the panel's last row

  PYCSE_BODY FusedRows(const Contrastive& p, const Fused& q, const Logit<float>& logit, int thread, int k0) {
    PYCSE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int k = k0 + sums_row(thread, 2 * half), i = q.i0 + k;
      const bool here = k < q.c;
      of[half] = {here ? positive_of(p, i) : -1,
                  p.key_ids,
                  here && Masked ? p.query_ids[i] : 0,
                  false,
                  0.0f,
                  logit.own_b * float(kLog2e),
                  logit.own_c * float(kLog2e),
                  i,
                  p.B};
    }
  }
};

// A number that is computed here, once: addresses that begin with it are it and a constant.
PYCSE_BODY int settled(int n) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(n));
#endif
  return n;
}

// Columns whose sum is not a plain negative's, by row: the positive, the keys that are no negatives (with it, and
// behind the last), the row's own hard negatives. A thread has 16 columns of a chunk: bit b is column 8 (b / 2) + 2
// (thread % 4) + b % 2.
struct Exceptions {
  uint32_t positive[2] = {0, 0}, gone[2] = {0, 0}, own[2] = {0, 0};

  template <bool Masked>
  PYCSE_BODY Exceptions(const FusedRows<Masked>& rows, int thread, int j0, int N) {
    const int left = N - j0;  // a multiple of 8
    bool some = Masked || left < kChunk;
    PYCSE_UNROLL
    for (const auto& row : rows.of) some |= row.owns() || unsigned(row.positive - j0) < unsigned(kChunk);
    if (!some) return;  // most chunks
    const auto bit = [&](int column) {
      return unsigned(column) < unsigned(kChunk) && column / 2 % 4 == thread % 4 ? 1u << (column / 8 * 2 + column % 2)
                                                                                 : 0u;
    };
    PYCSE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const auto& row = rows.of[half];
      positive[half] = bit(row.positive - j0);
      gone[half] = positive[half] | (left >= kChunk ? 0 : left <= 0 ? 0xffffu : 0xffffu << left / 4);
      if (row.owns())
        for (int column = row.until_own(j0); column < kChunk; column += row.B) own[half] |= bit(column);
      if constexpr (Masked) {
        PYCSE_UNROLL
        for (int b = 0; b < 16; ++b) {
          const int j = j0 + sums_column(thread, 2 * b - b % 2);
          if (j < N) gone[half] |= uint32_t(row.ids[j] == row.id) << b;
        }
      }
    }
  }
  PYCSE_BODY bool any() const { return gone[0] | gone[1] | own[0] | own[1]; }
};

// The epilogue for one thread's 32 sums of the chunk from column j0, of keys with norms r2: adds e to sums[half], and
// with Grad puts G at `staging`, 64 rows of 128 swizzled bytes. Plain: no Exceptions.
template <bool Grad, bool Plain, bool Masked, class Machine>
PYCSE_BODY void fused_chunk(Machine& on, const Logit<float>& logit, float top, const FusedRows<Masked>& rows,
                            const Exceptions& but, int thread, const float* acc, int j0, int N, const float* r2,
                            int staging, float* sums, float* s_pos) {
  const Bits<float> bits(logit);
  const int column = sums_column(thread, 0), j = settled(j0 + column);
  const uint32_t first = swizzled(uint32_t(sums_row(thread, 0) * 2 * kChunk + 2 * column));
  PYCSE_UNROLL
  for (int n = 0; n < 32; n += 4) {
    const int further = sums_column(0, n);
    float r[2] = {0, 0};
    if (Plain || j + further < N) memcpy(r, __builtin_assume_aligned(r2 + j + further, 8), 8);
    const int at = staging + int(first ^ 2 * further);  // the sum, swizzled: no bit is in both
    PYCSE_UNROLL
    for (int half = 0; half < 2; ++half) {
      float e[2], G[2];
      PYCSE_UNROLL
      for (int w = 0; w < 2; ++w) {
        const float s = acc[n + 2 * half + w] * r[w];
        float x = bits(s) - top;
        if constexpr (!Plain) {
          const uint32_t bit = 1u << (n / 2 + w);
          if (but.own[half] & bit) x += rows.of[half].own_b * s + rows.of[half].own_c;
          if (but.gone[half] & bit) x = -infinity<float>();
          if (but.positive[half] & bit) s_pos[half] = s;
        }
        e[w] = exp2_(x);
        G[w] = e[w] * logit.derivative(s) * r[w];
      }
      sums[half] += e[0] + e[1];
      if constexpr (Grad) on.put(at + half * 8 * 2 * kChunk, pack_bf16(G[0], G[1]));
    }
  }
}

// Where things stand in a block's shared memory, which begins at a multiple of 1024.
PYCSE_HD int a_at(int slot) { return slot * kStepBytes; }
PYCSE_HD int b_at(int slot) { return a_at(slot) + kBytesA; }
PYCSE_HD int staging_at(int group, int buffer) {
  return kSteps * kStepBytes + (group * kBuffers + buffer) * kChunkBytes;
}
constexpr int kSharedBytes = kSteps * kStepBytes + 2 * kBuffers * kChunkBytes;

// A block's tiles. The pipeline's barriers, of each slot:
//   full     the operands of a step have arrived       1 arrival (the producer) and kStepBytes
//   empty    both warpgroups of all blocks of the cluster have multiplied them   8 arrivals a block, one a warp
// Step number `step` counts on over all of a block's tiles: slot step % kSteps, phase step / kSteps.
template <int Cluster, bool Grad, bool Masked, class Machine>
PYCSE_BODY void fused_block(Machine& on, const Contrastive& p, const Fused& q) {
  // Of the cluster: Cluster row tiles at a time, this block's by its rank.
  const int down = ceil_div(q.c, Cluster * kTileM), across = ceil_div(p.N, kTileN), tiles = down * across;
  const int steps = ceil_div(q.D, kTileK), warpgroup = on.thread() / 128;
  const auto place = [&](int tile) {
    const TileAt at = tile_at(tile, down, across);
    return TileAt{(at.m * Cluster + on.rank()) * kTileM, at.n * kTileN};
  };

  if (on.thread() == 0) {
    for (int slot = 0; slot < kSteps; ++slot) {
      on.init(on.full(slot), 1);
      on.init(on.empty(slot), 8 * Cluster);
    }
    on.fence_init();
  }
  on.sync();

  if (warpgroup == 0) {
    on.template give_registers<kProducerRegisters>();
    if (on.thread() == 0) {
      uint32_t step = 0;
      for (int tile = on.first(); tile < tiles; tile += on.stride()) {
        const TileAt at = place(tile);
        for (int k = 0; k < steps; ++k, ++step) {
          const int slot = step % kSteps;
          on.wait(on.empty(slot), (step / kSteps % 2) ^ 1);  // the first time round all slots are free
          on.arrive_expecting(on.full(slot), kStepBytes);
          on.load_a(a_at(slot), k * kTileK, at.m, on.full(slot));
          // In a cluster this block's part of the keys, for all; the others' parts count for this barrier too.
          constexpr int kPart = kTileN / Cluster;
          on.load_b(b_at(slot) + on.rank() * (kBytesB / Cluster), k * kTileK, at.n + on.rank() * kPart, on.full(slot));
        }
      }
    }
  } else {
    on.template take_registers<kConsumerRegisters>();
    const int group = warpgroup - 1, thread = on.thread() % 128;
    const bool leads = thread == 0;
    const Logit<float> logit = known_logit(p);
    const float top = float(p.shift * kLog2e), *r2 = static_cast<const float*>(p.r2);
    float acc[128];
    uint32_t step = 0;
    const auto release = [&](int slot) {
      if (thread % 32 == 0)
        for (int block = 0; block < Cluster; ++block) on.arrive_at(on.empty(slot), block);
    };
    for (int tile = on.first(); tile < tiles; tile += on.stride()) {
      const TileAt at = place(tile);
      // The keys' norms for the epilogue, in lines of 128 bytes.
      if (const int j = at.n + 32 * thread; thread < kTileN / 32 && j < p.N) on.prefetch(r2 + j);
      for (int k = 0; k < steps; ++k, ++step) {
        const int slot = step % kSteps;
        on.wait(on.full(slot), step / kSteps % 2);
        const uint64_t a = descriptor(on.address(a_at(slot)) + group * kGroupRows * 2 * kTileK);
        const uint64_t b = descriptor(on.address(b_at(slot)));
        on.multiply_fence();
        PYCSE_UNROLL
        for (int part = 0; part < kTileK / 16; ++part)  // 32 bytes on: 2 in units of 16
          on.multiply(acc, a + 2 * part, b + 2 * part, k > 0 || part > 0);
        on.multiply_commit();
        on.template multiply_wait<1>(acc);  // the step before has been multiplied
        if (k > 0) release((step - 1) % kSteps);
      }
      on.template multiply_wait<0>(acc);
      release((step - 1) % kSteps);

      const int k0 = at.m + group * kGroupRows;
      const FusedRows<Masked> rows(p, q, logit, thread, k0);
      float sums[2] = {0, 0};
      PYCSE_UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const int j0 = at.n + chunk * kChunk, staging = staging_at(group, chunk % kBuffers);
        if constexpr (Grad) {
          if (leads) on.template wait_read<kBuffers - 1>();  // the buffer's last store
          on.sync_group(group);
        }
        const Exceptions but(rows, thread, j0, p.N);
        float s_pos[2];
        const auto chunk_of = [&](auto plain) {
          fused_chunk<Grad, decltype(plain)::value>(on, logit, top, rows, but, thread, acc + 32 * chunk, j0, p.N, r2,
                                                    staging, sums, s_pos);
        };
        if (but.any()) {
          chunk_of(Flag<false>());
          for (int half = 0; half < 2; ++half)
            if (but.positive[half]) static_cast<float*>(p.s_pos)[rows.of[half].i] = s_pos[half];
        } else {
          chunk_of(Flag<true>());
        }
        if constexpr (Grad) {
          on.fence_stores();
          on.sync_group(group);
          if (leads) {
            if (k0 < q.c && j0 < p.N) on.store_G(staging, j0, k0);
            on.commit_stores();  // an empty group counts too
          }
        }
      }
      PYCSE_UNROLL
      for (int half = 0; half < 2; ++half) {
        float sum = sums[half];
        sum += from_opposite(sum, 1);
        sum += from_opposite(sum, 2);
        const int row = k0 + sums_row(thread, 2 * half);
        if (thread % 4 == 0 && row < q.c) q.partial[int64_t(at.n / kTileN) * q.c + row] = sum;
      }
    }
    if (Grad && leads) on.wait_stored();
  }
  if constexpr (Cluster > 1) on.sync();  // no block leaves while another's copies or arrivals are on their way to it
}

// Row k of the panel, from its partial sums; the threads share the column tiles.
template <bool Grad, class Block>
PYCSE_BODY void finish_row(Block block, const Contrastive& p, const Panel& panel, const float* partial, int k) {
  const bool inside = k < panel.c;
  float z_neg = 0;
  if (inside)
    for (int t = block.index(); t < ceil_div(p.N, kTileN); t += block.size())
      z_neg += partial[int64_t(t) * panel.c + k];
  z_neg = block.sum(z_neg);
  if (!inside || block.index() != 0) return;
  const int i = panel.i0 + k, positive = positive_of(p, i);
  const float r_pos = positive >= 0 ? static_cast<const float*>(p.r2)[positive] : 0;
  const float s_pos = positive >= 0 ? static_cast<const float*>(p.s_pos)[i] : nan<float>();
  const RowLoss<float> result(z_neg, float(p.shift * kLog2e), s_pos, r_pos, known_logit(p), p.coefficient<float>(i));
  static_cast<float*>(p.loss)[i] = result.loss;
  if constexpr (Grad) {
    if (positive >= 0) store(static_cast<bf16*>(panel.S)[k * panel.ld + positive], result.g_pos);
    static_cast<float*>(panel.f)[k] = result.f;
  }
}

template <class Run>
void fused_variant(const Contrastive& p, bool grad, Run run) {
  with_flag(p.query_ids != nullptr, [&](auto masked) { with_flag(grad, [&](auto grad) { run(grad, masked); }); });
}

}  // namespace pycse::cuda
