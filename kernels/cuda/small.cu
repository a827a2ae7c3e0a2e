// Device side of small.h: a cooperative launch, so that blocks may wait for each other. 48 KB of shared memory a block.
#include <cooperative_groups.h>

#include <algorithm>

#include "launch.cuh"
#include "small.h"

namespace pycse::cuda {

constexpr int kThreads = kTileThreads;
constexpr int kBlocks = 3;  // on a multiprocessor at least: up to 168 registers a thread
constexpr int kColumns = 16;  // side by side: whole sectors of a row; 8 slices of the rows

extern __shared__ __align__(128) char small_memory[];

struct Grid {
  template <class F> __device__ __forceinline__ void warps(int n, F f) const {
    for (int k = (blockIdx.x * kThreads + threadIdx.x) / 32; k < n; k += gridDim.x * (kThreads / 32)) f(Warp(), k);
  }
  template <class F> __device__ __forceinline__ void blocks(int n, F f) const {
    for (int k = blockIdx.x; k < n; k += gridDim.x) f(ThreadBlock(), k);
  }
  template <class F> __device__ __forceinline__ void tiles(int n, F f) const {
    DeviceTile tile{small_memory};
    for (int k = blockIdx.x; k < n; k += gridDim.x) f(tile, k);
  }
  template <class F> __device__ __forceinline__ void columns(int n, F f) const {
    for (int j = blockIdx.x * kColumns; j < n; j += gridDim.x * kColumns)
      f(Slice<kColumns, kThreads / kColumns>(), int(j + threadIdx.x % kColumns));
  }
  template <class F> __device__ __forceinline__ void threads(int n, F f) const {
    for (int k = blockIdx.x * kThreads + threadIdx.x; k < n; k += gridDim.x * kThreads) f(k);
  }
  __device__ __forceinline__ void sync() const { cooperative_groups::this_grid().sync(); }
};

template <class T, bool Masked>
__global__ void __launch_bounds__(kThreads, kBlocks)
    small_kernel(const __grid_constant__ Contrastive p, const __grid_constant__ Small q) {
  Grid grid;
  small<T, Masked>(grid, p, q);
}

bool small_runs(Queue queue) { return attribute(cudaDevAttrCooperativeLaunch, queue.device) != 0; }

void small(Contrastive p, DType dtype, Small q, Queue queue) {
  small_work(p, q, dtype == DType::bf16);
  small_variant(p, dtype, [&](auto type, auto masked) {
    using T = decltype(type);
    const auto kernel = small_kernel<T, decltype(masked)::value>;
    constexpr int bytes = kSmallBytes<T>;
    launch_on(queue, "small", [&](cudaStream_t stream) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "small: shared memory");
      int resident = 0;
      check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, bytes), "small: occupancy");
      resident *= attribute(cudaDevAttrMultiProcessorCount, queue.device);
      if (resident == 0) throw std::runtime_error("pycse: small: the device has no room for a block");
      void* arguments[] = {&p, &q};
      check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel),
                                        dim3(std::min(resident, small_items(p, q))), dim3(kThreads), arguments, bytes,
                                        stream),
            "small");
    });
  });
}

}  // namespace pycse::cuda
