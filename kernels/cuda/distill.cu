// Device side of distill.h: a thread block for a row, its arrays in shared memory while they fit, with indices of 16
// bits; else in scratch of which each block in flight has a row, with 32. (Each knows its address space: a generic
// atomic is two.)
#include <algorithm>

#include "distill.h"
#include "launch.cuh"

namespace pycse::cuda {

// A block has 8 columns a thread at least. Where a row takes more than half of a multiprocessor's shared memory, the
// block has all the threads that 80 registers each allow (64 spill); else half as many, and two blocks hide each
// other's waits.
template <class A> constexpr int kThreads = sizeof(A) == 8 ? 512 : 768;
constexpr int kBlocks = 1;  // on a multiprocessor at least

template <class T, class U, class Index>
__global__ void __launch_bounds__(kThreads<acc_t<T>>, kBlocks)
    distill_kernel(const __grid_constant__ Distill d, const __grid_constant__ Panel panel, const Teacher teacher,
                   bool grad, int64_t bytes) {
  __shared__ RowTables few;
  extern __shared__ int4 shared[];
  char* memory = sizeof(Index) == 2 ? reinterpret_cast<char*>(shared) : teacher.scratch + blockIdx.x * bytes;
  for (int k = blockIdx.x; k < panel.c; k += gridDim.x)
    distill_row<T, U, Index>(ThreadBlock(), d, panel, teacher, k, grad, few, memory);
}

// Of sums and scans, static; 14 B + 2 KB fits on sm_90 up to B = 16384.
constexpr int kStatic = sizeof(RowTables) + 1536;

std::pair<int, int64_t> scratch(const Distill& d, DType dtype, int c, Queue queue) {
  const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, queue.device) - kStatic;
  if (d.B <= kMostNarrow && row_bytes(d, dtype, 2) <= most) return {0, 0};
  return {std::min(c, kBlocks * attribute(cudaDevAttrMultiProcessorCount, queue.device)), row_bytes(d, dtype, 4)};
}

void distill(const Distill& d, DType dtype, const Panel& panel, DType teacher_type, const Teacher& teacher, bool grad,
             Queue queue) {
  distill_variant(dtype, teacher_type, teacher.scratch != nullptr, [&](auto type, auto teachers, auto index) {
    const auto kernel = distill_kernel<decltype(type), decltype(teachers), decltype(index)>;
    const int64_t row = row_bytes(d, dtype, sizeof index);
    const int bytes = teacher.scratch ? 0 : int(row), blocks = teacher.scratch ? teacher.rows : panel.c;
    const int memory = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, queue.device);
    const int most = kThreads<acc_t<decltype(type)>> / (row > memory / 2 - kStatic ? 1 : 2);
    launch_on(queue, "distill", [&](cudaStream_t stream) {
      if (bytes > 0)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
      kernel<<<std::min(blocks, panel.c), threads_for(d.B, 8, most), bytes, stream>>>(d, panel, teacher, grad, row);
    });
  });
}

}  // namespace pycse::cuda
