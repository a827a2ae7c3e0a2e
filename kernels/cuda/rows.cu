// Device side of rows.h: a thread block for a row. Bound by the panel's traffic, half of it stores: 2.2 TB/s of reads
// at
// 0.7 us take 12 KB in flight on each of 132 multiprocessors, 768 threads with 16 bytes each.
#include "launch.cuh"
#include "rows.h"

namespace pycse::cuda {

constexpr int kThreads = 256;
// On a multiprocessor at least: 128 or 64 registers a thread. Left to itself ptxas takes 40 and spills.
template <class T> constexpr int kBlocks = sizeof(T) == 8 ? 2 : 4;

template <class T, bool Grad, bool Params, bool Masked>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    rows_kernel(const __grid_constant__ Contrastive p, const __grid_constant__ Panel panel) {
  row<T, Grad, Params, Masked>(ThreadBlock(), p, panel, blockIdx.x);
}

void rows(const Contrastive& p, DType dtype, const Panel& panel, bool grad, Queue queue) {
  rows_variant(p, dtype, grad, [&](auto type, auto grad, auto params, auto masked) {
    using T = decltype(type);
    launch_on(queue, "rows", [&](cudaStream_t stream) {
      rows_kernel<T, decltype(grad)::value, decltype(params)::value, decltype(masked)::value>
          <<<panel.c, threads_for(p.N, kWidth<T>, kThreads), 0, stream>>>(p, panel);
    });
  });
}

#ifndef PYCSE_HOPPER  // fused.cu
void fused(const Contrastive&, Vectors, Vectors, const Panel&, void*, bool, int, Queue) {
  throw std::logic_error("pycse: fused was not compiled: no 90a among the architectures");
}
bool fused_runs(Queue) { return false; }
#endif

}  // namespace pycse::cuda
