// The CUDA kernels' bodies on the host: what the tests run where there is no GPU. By one thread, or (emulate_with) by a thread
// block of fibers that takes all rows in turn. Pointers are the host's, the queue is ignored.
#include "distill.h"
#include "fused.h"
#include "norms.h"
#include "small.h"
#include "sparse.h"
#include "symmetric.h"
#include "uniformity.h"

namespace pycse::cuda {

static int block_threads = 0;  // 0: one thread
static bool ascending = true;

void emulate_with(int threads, bool in_ascending_order) {
  if (threads % 32 || threads < 0 || threads > 1024) throw std::invalid_argument("threads of a block: whole warps, at most 1024");
  block_threads = threads, ascending = in_ascending_order;
}

// f(block, k) for every k < n.
template <class F>
static void blocks(int n, F f) {
  if (block_threads == 0) {
    for (int k = 0; k < n; ++k) f(OneThread(), k);
  } else {
    Fibers().run(block_threads, ascending, [&] {
      for (int k = 0; k < n; ++k) f(ThreadBlock(), k);
    });
  }
}

template <class F>
static void warps(int n, F f) {
  if (block_threads == 0) return blocks(n, f);
  Fibers().run(block_threads, ascending, [&] {
    for (int k = thread_index() / 32; k < n; k += thread_count() / 32) f(Warp(), k);
  });
}

// Columns side by side, in slices of the rows.
template <class F>
static void columns_of(int n, F f) {
  constexpr int kColumns = 16, kSlices = 4;
  if (block_threads == 0) return blocks(n, f);
  Fibers().run(kColumns * kSlices, ascending, [&] {
    for (int j = 0; j < n; j += kColumns) f(Slice<kColumns, kSlices>(), j + thread_index() % kColumns);
  });
}

static void rows(const Contrastive& p, DType dtype, const Panel& panel, bool grad, Queue) {
  rows_variant(p, dtype, grad, [&](auto type, auto grad, auto params, auto masked) {
    using T = decltype(type);
    blocks(panel.c, [&](auto block, int k) {
      row<T, decltype(grad)::value, decltype(params)::value, decltype(masked)::value>(block, p, panel, k);
    });
  });
}

static void columns(const Contrastive& p, DType dtype, const Panel& panel, Queue) {
  columns_variant(p, dtype, [&](auto type, auto masked) {
    columns_of(p.N, [&](auto slice, int j) { column<decltype(type), decltype(masked)::value>(slice, p, panel, j); });
  });
}

static void symmetric(const Contrastive& p, DType dtype, const Panel& panel, Queue) {
  symmetric_variant(p, dtype, [&](auto type, auto params, auto masked) {
    blocks(panel.c, [&](auto block, int k) {
      symmetric_row<decltype(type), decltype(params)::value, decltype(masked)::value>(block, p, panel, k);
    });
  });
}

static void positives(const Contrastive& p, DType dtype, Vectors z1hat, Vectors z2, int i0, Queue) {
  with_type(dtype, [&](auto type) {
    warps(z1hat.n, [&](auto warp, int k) { positive_row<decltype(type)>(warp, p, z1hat, z2, i0, k); });
  });
}

static void normalize(DType dtype, Vectors z, void* r, void* out, int64_t ld_out, double factor, Queue) {
  with_type(dtype, [&](auto type) {
    warps(z.n, [&](auto warp, int i) { normalize_row<decltype(type)>(warp, z, i, r, out, ld_out, factor); });
  });
}

static void project(DType z_type, DType g_type, Vectors z, const void* g, const void* r, const void* f, bool scaled,
                    void* out, Queue) {
  project_variant(z_type, g_type, [&](auto type, auto gradient) {
    warps(z.n, [&](auto warp, int i) {
      project_row<decltype(type), decltype(gradient)>(warp, z, i, g, r, f, scaled, out);
    });
  });
}

static void distill(const Distill& d, DType dtype, const Panel& panel, DType teacher_type, const Teacher& teacher,
                    bool grad, Queue) {
  distill_variant(dtype, teacher_type, d.B > kMostNarrow, [&](auto type, auto teachers, auto index) {
    RowTables few;
    blocks(panel.c, [&](auto block, int k) {
      distill_row<decltype(type), decltype(teachers), decltype(index)>(block, d, panel, teacher, k, grad, few,
                                                                       teacher.scratch);
    });
  });
}

static std::pair<int, int64_t> scratch(const Distill& d, DType dtype, int, Queue) {
  return {1, row_bytes(d, dtype, d.B > kMostNarrow ? 4 : 2)};
}

static void uniformity(const Uniformity& p, DType dtype, const Panel& panel, int n, bool grad, Queue) {
  uniformity_variant(dtype, grad, [&](auto type, auto grad) {
    blocks(panel.c, [&](auto block, int k) {
      uniformity_row<decltype(type), decltype(grad)::value>(block, p, panel, n, k);
    });
  });
}

// Every phase's items in turn, none before all of the phase before are done.
struct HostGrid {
  int bytes;
  template <class F> void warps(int n, F f) const { cuda::warps(n, f); }
  template <class F> void columns(int n, F f) const { columns_of(n, f); }
  template <class F> void blocks(int n, F f) const { cuda::blocks(n, f); }
  template <class F> void threads(int n, F f) const {
    for (int k = 0; k < n; ++k) f(k);
  }
  template <class F> void tiles(int n, F f) const {
    for (int k = 0; k < n; ++k) {
      HostTile tile(bytes);
      f(tile, k);
    }
  }
  void sync() const {}
};

static void small(Contrastive p, DType dtype, Small q, Queue) {
  small_work(p, q, dtype == DType::bf16);
  small_variant(p, dtype, [&](auto type, auto masked) {
    HostGrid grid{kSmallBytes<decltype(type)>};
    small<decltype(type), decltype(masked)::value>(grid, p, q);
  });
}

// The copy engine: the box of `rows` x 64 elements at (column, row) to 128-byte rows, swizzled; zeros outside. `at` stands for the
// address in shared memory.
static void load_box(std::vector<bf16>& memory, uint32_t at, const Vectors& matrix, int rows, int row, int column) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < kTileK; ++c) {
      const bool inside = row + r < matrix.n && column + c < matrix.D;
      memory[swizzled(at + r * 128 + c * 2) / 2] =
          inside ? static_cast<const bf16*>(matrix.z)[(row + r) * matrix.ld + column + c] : bf16{0};
    }
}

// wgmma m64n256k16: element (row, k) of an operand where its descriptor says. The address advances within a row before the
// swizzle, which is of the address itself.
static float operand(const std::vector<bf16>& memory, uint64_t descriptor, int row, int k) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, eight_rows = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) throw std::logic_error("not the 128-byte swizzle");
  return load(memory[swizzled(start + row / 8 * eight_rows + row % 8 * 128 + k * 2) / 2]);
}

static void wgmma(const std::vector<bf16>& memory, uint64_t a, uint64_t b, std::vector<float>& d) {
  std::vector<float> left(kGroupRows * 16), right(kTileN * 16);
  for (int k = 0; k < 16; ++k) {
    for (int m = 0; m < kGroupRows; ++m) left[m * 16 + k] = operand(memory, a, m, k);
    for (int n = 0; n < kTileN; ++n) right[n * 16 + k] = operand(memory, b, n, k);
  }
  for (int m = 0; m < kGroupRows; ++m)
    for (int n = 0; n < kTileN; ++n)
      for (int k = 0; k < 16; ++k) d[m * kTileN + n] += left[m * 16 + k] * right[n * 16 + k];
}

// In clusters the tiles are the same.
static void fused(const Contrastive& p, Vectors z1hat, Vectors z2, const Panel& panel, void* partial, bool grad, int, Queue) {
  const Fused q = {panel.c, panel.i0, z1hat.D, static_cast<float*>(partial)};
  const int down = ceil_div(q.c, kTileM), across = ceil_div(p.N, kTileN);
  fused_variant(p, grad, [&](auto grad, auto masked) {
    constexpr bool kGrad = decltype(grad)::value;
    std::vector<bf16> memory((1024 + kStepBytes) / 2, bf16{0xffff});
    const uint32_t a = 1024, b = a + kBytesA;
    for (int tile = 0; tile < down * across; ++tile) {
      const TileAt place = tile_at(tile, down, across), at = {place.m * kTileM, place.n * kTileN};
      std::vector<float> d[2] = {std::vector<float>(kGroupRows * kTileN), std::vector<float>(kGroupRows * kTileN)};
      for (int k = 0; k < q.D; k += kTileK) {
        load_box(memory, a, z1hat, kTileM, at.m, k);
        load_box(memory, b, z2, kTileN, at.n, k);
        for (int group = 0; group < 2; ++group)
          for (int part = 0; part < kTileK / 16; ++part)
            wgmma(memory, descriptor(a + group * kGroupRows * 128) + 2 * part, descriptor(b) + 2 * part, d[group]);
      }
      for (int group = 0; group < 2; ++group) {
        const int k0 = at.m + group * kGroupRows;
        std::vector<float> sums(128 * 2);
        for (int chunk = 0; chunk < kChunks; ++chunk) {
          alignas(16) char staging[kChunkBytes];
          memset(staging, 0xff, sizeof staging);
          const int j0 = at.n + chunk * kChunk;
          for (int thread = 0; thread < 128; ++thread) {
            float acc[32];  // PTX ISA, figure of the D fragment
            for (int n = 0; n < 32; ++n)
              acc[n] = d[group][(16 * (thread / 32) + thread % 32 / 4 + (n % 4 < 2 ? 0 : 8)) * kTileN + 64 * chunk + n / 4 * 8 +
                                2 * (thread % 4) + (n & 1)];
            fused_chunk<kGrad, decltype(masked)::value>(p, q, FusedRows(p, q, thread, k0), thread, k0, j0, acc, staging,
                                                        &sums[2 * thread]);
          }
          for (int r = 0; kGrad && r < kGroupRows && k0 + r < q.c; ++r)
            for (int n = 0; n < kChunk && j0 + n < p.N; ++n)
              memcpy(static_cast<bf16*>(panel.S) + (k0 + r) * panel.ld + j0 + n, staging + swizzled(r * 128 + n * 2), 2);
        }
        for (int thread = 0; thread < 128; thread += 4)
          for (int half = 0; half < 2; ++half) {
            const int row = k0 + sums_row(thread, 2 * half);
            float sum = 0;
            for (int lane = 0; lane < 4; ++lane) sum += sums[2 * (thread + lane) + half];
            if (row < q.c) q.partial[int64_t(at.n / kTileN) * q.c + row] = sum;
          }
      }
    }
    columns_of(panel.c, [&](auto slice, int k) { finish_row<kGrad>(slice, p, panel, q.partial, k); });
  });
}

static bool fused_runs(Queue) { return true; }

static bool small_runs(Queue) { return true; }

int64_t small_work_size(int B, int N, int D, DType dtype, bool normalize, bool symmetric, bool dz1, bool dz2) {
  Contrastive p;
  Small q;
  char any;  // of the gradients only whether they are wanted
  p.B = B, p.N = N, p.exclude = true;
  q.z1.D = D, q.normalize = normalize, q.symmetric = symmetric, q.dz1 = dz1 ? &any : nullptr, q.dz2 = dz2 ? &any : nullptr;
  return small_work(p, q, dtype == DType::bf16);
}

const Kernels& emulated_kernels() {
  static constexpr Kernels table = {rows, columns, symmetric, positives, normalize, project,
                                    distill, scratch, uniformity, small, fused, fused_runs, small_runs};
  return table;
}

static void sparse(Which which, Sparse p, Storage storage, int pieces, Queue) {
  sparse_variant(storage, p.kept.block, [&](auto type, auto side) {
    using T = decltype(type);
    constexpr int B = decltype(side)::value, M = kTokens<T>, N = kSide<B>;
    const auto tiles = [](int64_t count, int bytes, auto tile) {
      for (int64_t k = 0; k < count; ++k) {
        HostTile block(bytes);
        tile(block, int(k));
      }
    };
    switch (which) {
      case Which::linear:
        set_wide<T>(p, p.out);
        return tiles(linear_tiles<T, B>(p), kTileBytes<LinearProduct<T, B>, T, B == 0, T, M, N>,
                     [&](auto& block, int k) { linear_tile<T, B>(block, p, k); });
      case Which::dx:
        set_wide<T>(p, p.in);
        return tiles(dx_tiles<T, B>(p), kTileBytes<DxProduct<T, B>, T, B == 0, T, M, N>,
                     [&](auto& block, int k) { dx_tile<T, B>(block, p, k); });
      case Which::dw:
        set_wide<T>(p, p.in);
        tiles(dw_tiles<T, B>(p), kTileBytes<DwProduct<T, B>, T, false, acc_t<T>, N, kWide<T>>,
              [&](auto& block, int k) { dw_tile<T, B>(block, p, k); });
        if (p.splits > 1)
          for (int k = 0; k < pieces; ++k) add_splits<T, B>(OneThread(), p, k);
    }
  });
}

static void mark(const int* ptr, const int* index, uint32_t* bits, int rows, int words, Queue) {
  for (int row = 0; row < rows; ++row) mark_row(OneThread(), ptr, index, bits, words, row);
}

const SparseKernels& emulated_sparse() {
  static constexpr SparseKernels table = {sparse, mark};
  return table;
}

}  // namespace pycse::cuda
