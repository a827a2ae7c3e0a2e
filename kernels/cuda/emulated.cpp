// The CUDA kernels' bodies on the host: what the tests run where there is no GPU. By one thread, or (emulate_with) by a thread
// block of fibers that takes all rows in turn. Pointers are the host's, the queue is ignored.
#include "distill.h"
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
                                    distill, scratch, uniformity, small, small_runs};
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
