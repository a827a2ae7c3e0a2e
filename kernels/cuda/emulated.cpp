// The CUDA kernels' bodies on the host, a row at a time by one thread: what the tests run where there is no GPU. Pointers
// are the host's, the queue is ignored.
#include "distill.h"
#include "norms.h"
#include "small.h"
#include "sparse.h"
#include "symmetric.h"
#include "uniformity.h"

namespace pycse::cuda {

static void rows(const Contrastive& p, DType dtype, const Panel& panel, bool grad, Queue) {
  rows_variant(p, dtype, grad, [&](auto type, auto grad, auto params, auto masked) {
    using T = decltype(type);
    for (int k = 0; k < panel.c; ++k)
      row<T, decltype(grad)::value, decltype(params)::value, decltype(masked)::value>(OneThread(), p, panel, k);
  });
}

static void columns(const Contrastive& p, DType dtype, const Panel& panel, Queue) {
  columns_variant(p, dtype, [&](auto type, auto masked) {
    for (int j = 0; j < p.N; ++j) column<decltype(type), decltype(masked)::value>(OneThread(), p, panel, j);
  });
}

static void symmetric(const Contrastive& p, DType dtype, const Panel& panel, Queue) {
  symmetric_variant(p, dtype, [&](auto type, auto params, auto masked) {
    for (int k = 0; k < panel.c; ++k)
      symmetric_row<decltype(type), decltype(params)::value, decltype(masked)::value>(OneThread(), p, panel, k);
  });
}

static void positives(const Contrastive& p, DType dtype, Vectors z1hat, Vectors z2, int i0, Queue) {
  with_type(dtype, [&](auto type) {
    for (int k = 0; k < z1hat.n; ++k) positive_row<decltype(type)>(OneThread(), p, z1hat, z2, i0, k);
  });
}

static void normalize(DType dtype, Vectors z, void* r, void* out, int64_t ld_out, double factor, Queue) {
  with_type(dtype, [&](auto type) {
    for (int i = 0; i < z.n; ++i) normalize_row<decltype(type)>(OneThread(), z, i, r, out, ld_out, factor);
  });
}

static void project(DType z_type, DType g_type, Vectors z, const void* g, const void* r, const void* f, bool scaled,
                    void* out, Queue) {
  project_variant(z_type, g_type, [&](auto type, auto gradient) {
    for (int i = 0; i < z.n; ++i)
      project_row<decltype(type), decltype(gradient)>(OneThread(), z, i, g, r, f, scaled, out);
  });
}

static void distill(const Distill& d, DType dtype, const Panel& panel, DType teacher_type, const Teacher& teacher,
                    bool grad, Queue) {
  distill_variant(dtype, teacher_type, [&](auto type, auto teachers) {
    Bins bins;
    for (int k = 0; k < panel.c; ++k)
      distill_row<decltype(type), decltype(teachers)>(OneThread(), d, panel, teacher, k, grad, bins, teacher.scratch);
  });
}

static int scratch_rows(int, int, Queue) { return 1; }

static void uniformity(const Uniformity& p, DType dtype, const Panel& panel, int n, bool grad, Queue) {
  uniformity_variant(dtype, grad, [&](auto type, auto grad) {
    for (int k = 0; k < panel.c; ++k)
      uniformity_row<decltype(type), decltype(grad)::value>(OneThread(), p, panel, n, k);
  });
}

// Every phase's items in turn, none before all of the phase before are done.
struct HostGrid {
  int bytes;
  template <class F> void warps(int n, F f) const { blocks(n, f); }
  template <class F> void columns(int n, F f) const { blocks(n, f); }
  template <class F> void blocks(int n, F f) const {
    for (int k = 0; k < n; ++k) f(OneThread(), k);
  }
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
                                    distill, scratch_rows, uniformity, small, small_runs};
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
