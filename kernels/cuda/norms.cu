// Device side of norms.h: a warp for a row, kRows rows in a thread block.
#include "launch.cuh"
#include "norms.h"

namespace pycse::cuda {

constexpr int kRows = 4;
constexpr int kBlocks =
    6;  // on a multiprocessor at least: 80 registers a thread. With fewer, or left to itself, ptxas spills.

__device__ __forceinline__ int warp_row() { return blockIdx.x * kRows + threadIdx.y; }

template <class T>
__global__ void __launch_bounds__(32 * kRows, kBlocks)
    normalize_kernel(Vectors z, void* r, void* out, int64_t ld_out, double factor) {
  if (warp_row() < z.n) normalize_row<T>(Warp(), z, warp_row(), r, out, ld_out, factor);
}

template <class T, class G>
__global__ void __launch_bounds__(32 * kRows, kBlocks)
    project_kernel(Vectors z, const void* g, const void* r, const void* f, bool scaled, void* out) {
  if (warp_row() < z.n) project_row<T, G>(Warp(), z, warp_row(), g, r, f, scaled, out);
}

template <class T>
__global__ void __launch_bounds__(32 * kRows, kBlocks)
    positives_kernel(const __grid_constant__ Contrastive p, Vectors z1hat, Vectors z2, int i0) {
  if (warp_row() < z1hat.n) positive_row<T>(Warp(), p, z1hat, z2, i0, warp_row());
}

void normalize(DType dtype, Vectors z, void* r, void* out, int64_t ld_out, double factor, Queue queue) {
  with_type(dtype, [&](auto type) {
    launch_on(queue, "normalize", [&](cudaStream_t stream) {
      normalize_kernel<decltype(type)><<<ceil_div(z.n, kRows), dim3(32, kRows), 0, stream>>>(z, r, out, ld_out, factor);
    });
  });
}

void project(DType z_type, DType g_type, Vectors z, const void* g, const void* r, const void* f, bool scaled, void* out,
             Queue queue) {
  project_variant(z_type, g_type, [&](auto type, auto gradient) {
    launch_on(queue, "project", [&](cudaStream_t stream) {
      project_kernel<decltype(type), decltype(gradient)>
          <<<ceil_div(z.n, kRows), dim3(32, kRows), 0, stream>>>(z, g, r, f, scaled, out);
    });
  });
}

void positives(const Contrastive& p, DType dtype, Vectors z1hat, Vectors z2, int i0, Queue queue) {
  with_type(dtype, [&](auto type) {
    launch_on(queue, "positives", [&](cudaStream_t stream) {
      positives_kernel<decltype(type)><<<ceil_div(z1hat.n, kRows), dim3(32, kRows), 0, stream>>>(p, z1hat, z2, i0);
    });
  });
}

}  // namespace pycse::cuda
