// rows.h, symmetric.h and norms.h on the host.
#include "../../../kernels/cuda/norms.h"
#include "../../../kernels/cuda/symmetric.h"
#include "host.h"

namespace pycse::cuda {

void rows(const Contrastive& p, DType dtype, const Panel& panel, bool grad, Queue) {
  rows_variant(p, dtype, grad, [&](auto type, auto grad, auto params, auto masked) {
    using T = decltype(type);
    blocks(panel.c, [&](auto block, int k) {
      row<T, decltype(grad)::value, decltype(params)::value, decltype(masked)::value>(block, p, panel, k);
    });
  });
}

void columns(const Contrastive& p, DType dtype, const Panel& panel, Queue) {
  columns_variant(p, dtype, [&](auto type, auto masked) {
    columns_of(p.N, [&](auto slice, int j) { column<decltype(type), decltype(masked)::value>(slice, p, panel, j); });
  });
}

void symmetric(const Contrastive& p, DType dtype, const Panel& panel, Queue) {
  symmetric_variant(p, dtype, [&](auto type, auto params, auto masked) {
    blocks(panel.c, [&](auto block, int k) {
      symmetric_row<decltype(type), decltype(params)::value, decltype(masked)::value>(block, p, panel, k);
    });
  });
}

void positives(const Contrastive& p, DType dtype, Vectors z1hat, Vectors z2, int i0, Queue) {
  with_type(dtype, [&](auto type) {
    warps(z1hat.n, [&](auto warp, int k) { positive_row<decltype(type)>(warp, p, z1hat, z2, i0, k); });
  });
}

void normalize(DType dtype, Vectors z, void* r, void* out, int64_t ld_out, double factor, Queue) {
  with_type(dtype, [&](auto type) {
    warps(z.n, [&](auto warp, int i) { normalize_row<decltype(type)>(warp, z, i, r, out, ld_out, factor); });
  });
}

void project(DType z_type, DType g_type, Vectors z, const void* g, const void* r, const void* f, bool scaled, void* out,
             Queue) {
  project_variant(z_type, g_type, [&](auto type, auto gradient) {
    warps(z.n,
          [&](auto warp, int i) { project_row<decltype(type), decltype(gradient)>(warp, z, i, g, r, f, scaled, out); });
  });
}

}  // namespace pycse::cuda
