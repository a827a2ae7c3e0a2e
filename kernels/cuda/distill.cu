// Device side of distill.h: a thread block for a row, its groups in shared memory while they fit, else in scratch of which
// each block in flight has a row.
#include <algorithm>

#include "device.h"
#include "distill.h"
#include "launch.cuh"

namespace pycse::cuda {

constexpr int kThreads = 512;  // 8 columns each: short rows leave room for several blocks, which hide each other's waits
constexpr int kBlocks = 1;  // on a multiprocessor at least: up to 128 registers a thread, of 64 it would spill

template <class T, class U>
__global__ void __launch_bounds__(kThreads, kBlocks)
distill_kernel(const __grid_constant__ Distill d, const __grid_constant__ Panel panel, const Teacher teacher, bool grad) {
  __shared__ Bins bins;
  extern __shared__ int4 shared[];
  int* memory = teacher.scratch ? teacher.scratch + blockIdx.x * scratch_width(d.B) : reinterpret_cast<int*>(shared);
  for (int k = blockIdx.x; k < panel.c; k += gridDim.x)
    distill_row<T, U>(ThreadBlock(), d, panel, teacher, k, grad, bins, memory);
}

constexpr int kStatic = sizeof(Bins) + 2048;  // the reductions take 1 KB

int scratch_rows(int B, int c, Queue queue) {
  if (scratch_width(B) * 4 + kStatic <= attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, queue.device)) return 0;
  return std::min(c, kBlocks * attribute(cudaDevAttrMultiProcessorCount, queue.device));
}

void distill(const Distill& d, DType dtype, const Panel& panel, DType teacher_type, const Teacher& teacher, bool grad,
             Queue queue) {
  distill_variant(dtype, teacher_type, [&](auto type, auto teachers) {
    const auto kernel = distill_kernel<decltype(type), decltype(teachers)>;
    const bool shared = d.cut.kind != GroupKind::none && !teacher.scratch;
    const int bytes = shared ? int(scratch_width(d.B) * 4) : 0, blocks = teacher.scratch ? teacher.rows : panel.c;
    launch_on(queue, "distill", [&](cudaStream_t stream) {
      if (bytes > 0) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
      kernel<<<std::min(blocks, panel.c), threads_for(d.B, 8, kThreads), bytes, stream>>>(d, panel, teacher, grad);
    });
  });
}

}  // namespace pycse::cuda
