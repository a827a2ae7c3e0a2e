// The CUDA kernels' bodies on the host, a row at a time by one thread: what the tests run where there is no GPU. Pointers
// are the host's, the queue is ignored.
#include "distill.h"
#include "norms.h"
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

const Kernels& emulated_kernels() {
  static constexpr Kernels table = {rows, columns, symmetric, positives, normalize, project,
                                    distill, scratch_rows, uniformity};
  return table;
}

}  // namespace pycse::cuda
