// Device side of uniformity.h: a thread block for a row, as rows.cu.
#include "launch.cuh"
#include "uniformity.h"

namespace pycse::cuda {

constexpr int kThreads = 256;

template <class T, bool Grad>
__global__ void __launch_bounds__(kThreads)
    uniformity_kernel(const Uniformity p, const __grid_constant__ Panel panel, int n) {
  uniformity_row<T, Grad>(ThreadBlock(), p, panel, n, blockIdx.x);
}

void uniformity(const Uniformity& p, DType dtype, const Panel& panel, int n, bool grad, Queue queue) {
  uniformity_variant(dtype, grad, [&](auto type, auto grad) {
    using T = decltype(type);
    launch_on(queue, "uniformity", [&](cudaStream_t stream) {
      uniformity_kernel<T, decltype(grad)::value>
          <<<panel.c, threads_for(n, kWidth<T>, kThreads), 0, stream>>>(p, panel, n);
    });
  });
}

}  // namespace pycse::cuda
