// Device side of symmetric.h: a thread block for a row; for the columns 32 of them side by side (whole sectors of a
// row) times kSlices of the panel's rows.
#include "launch.cuh"
#include "symmetric.h"

namespace pycse::cuda {

constexpr int kThreads = 256, kColumns = 32, kSlices = 16;
template <class T> constexpr int kBlocks = sizeof(T) == 8 ? 2 : 3;  // as in rows.cu: 128 or 80 registers a thread

template <class T, bool Masked>
__global__ void __launch_bounds__(kColumns* kSlices, 1)
    columns_kernel(const __grid_constant__ Contrastive p, const __grid_constant__ Panel panel) {
  column<T, Masked>(Slice<kColumns, kSlices>(), p, panel, int(blockIdx.x * kColumns + threadIdx.x % kColumns));
}

template <class T, bool Params, bool Masked>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    symmetric_kernel(const __grid_constant__ Contrastive p, const __grid_constant__ Panel panel) {
  symmetric_row<T, Params, Masked>(ThreadBlock(), p, panel, blockIdx.x);
}

void columns(const Contrastive& p, DType dtype, const Panel& panel, Queue queue) {
  columns_variant(p, dtype, [&](auto type, auto masked) {
    launch_on(queue, "columns", [&](cudaStream_t stream) {
      columns_kernel<decltype(type), decltype(masked)::value>
          <<<ceil_div(p.N, kColumns), kColumns * kSlices, 0, stream>>>(p, panel);
    });
  });
}

void symmetric(const Contrastive& p, DType dtype, const Panel& panel, Queue queue) {
  symmetric_variant(p, dtype, [&](auto type, auto params, auto masked) {
    using T = decltype(type);
    launch_on(queue, "symmetric", [&](cudaStream_t stream) {
      symmetric_kernel<T, decltype(params)::value, decltype(masked)::value>
          <<<panel.c, threads_for(p.N, kWidth<T>, kThreads), 0, stream>>>(p, panel);
    });
  });
}

}  // namespace pycse::cuda
