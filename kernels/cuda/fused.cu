// Device side of fused.h: its machine. Compiled for sm_90a alone. It has not yet run on a GPU.
#include <algorithm>

#include "fused.h"
#include "hopper.cuh"
#include "launch.cuh"

namespace pycse::cuda {

using namespace hopper;

constexpr int kBytes = kSharedBytes + 2 * kSteps * 8 + 1024;  // barriers, and room to begin at a multiple of 1024

template <int Cluster>
struct Hopper {
  const CUtensorMap &map_a, &map_b, &map_G;
  char* shared;  // at a multiple of 1024

  __device__ __forceinline__ int thread() const { return threadIdx.x; }
  __device__ __forceinline__ int rank() const { return blockIdx.x % Cluster; }  // in a cluster along x
  __device__ __forceinline__ int first() const { return blockIdx.x / Cluster; }
  __device__ __forceinline__ int stride() const { return gridDim.x / Cluster; }
  __device__ __forceinline__ void prefetch(const float* at) const { hopper::prefetch(at); }
  __device__ __forceinline__ void put(int at, uint32_t word) const { hopper::put(address(at), word); }
  __device__ __forceinline__ uint32_t address(int at) const { return shared_address(shared) + at; }
  __device__ __forceinline__ void sync() const {
    if constexpr (Cluster > 1) sync_cluster();
    else __syncthreads();
  }
  __device__ __forceinline__ void sync_group(int group) const { hopper::sync_group(1 + group); }
  template <int Registers> __device__ __forceinline__ void give_registers() const {
    hopper::give_registers<Registers>();
  }
  template <int Registers> __device__ __forceinline__ void take_registers() const {
    hopper::take_registers<Registers>();
  }

  __device__ __forceinline__ uint64_t* full(int slot) const {
    return reinterpret_cast<uint64_t*>(shared + kSharedBytes) + slot;
  }
  __device__ __forceinline__ uint64_t* empty(int slot) const { return full(kSteps + slot); }
  __device__ __forceinline__ void init(uint64_t* barrier, int arrivals) const { hopper::init(barrier, arrivals); }
  __device__ __forceinline__ void fence_init() const { hopper::fence_init(); }
  __device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) const { hopper::wait(barrier, parity); }
  __device__ __forceinline__ void arrive_expecting(uint64_t* barrier, int bytes) const {
    hopper::arrive_expecting(barrier, bytes);
  }
  __device__ __forceinline__ void arrive_at(uint64_t* barrier, int block) const {
    if constexpr (Cluster > 1) hopper::arrive_at(barrier, block);
    else arrive(barrier);
  }

  __device__ __forceinline__ void load_a(int at, int column, int row, uint64_t* barrier) const {
    load_box(shared + at, &map_a, column, row, barrier);
  }
  __device__ __forceinline__ void load_b(int at, int column, int row, uint64_t* barrier) const {
    if constexpr (Cluster > 1) load_box_for_all(shared + at, &map_b, column, row, barrier, (1 << Cluster) - 1);
    else load_box(shared + at, &map_b, column, row, barrier);
  }
  __device__ __forceinline__ void fence_stores() const { hopper::fence_stores(); }
  __device__ __forceinline__ void store_G(int at, int column, int row) const {
    store_box(&map_G, shared + at, column, row);
  }
  __device__ __forceinline__ void commit_stores() const { hopper::commit_stores(); }
  template <int Left> __device__ __forceinline__ void wait_read() const { hopper::wait_read<Left>(); }
  __device__ __forceinline__ void wait_stored() const { hopper::wait_stored(); }

  __device__ __forceinline__ void multiply_fence() const { wgmma_fence(); }
  __device__ __forceinline__ void multiply(float (&acc)[128], uint64_t a, uint64_t b, int add) const {
    wgmma(acc, a, b, add);
  }
  __device__ __forceinline__ void multiply_commit() const { wgmma_commit(); }
  template <int Left> __device__ __forceinline__ void multiply_wait(float (&acc)[128]) const {
    wgmma_wait<Left>();
    if constexpr (Left == 0) arrived(acc);
  }
};

template <int Cluster, bool Grad, bool Masked>
__global__ void __cluster_dims__(Cluster, 1, 1) __launch_bounds__(kThreads, 1)
    fused_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                 const __grid_constant__ CUtensorMap map_G, const __grid_constant__ Contrastive p,
                 const __grid_constant__ Fused q) {
  extern __shared__ char anywhere[];
  Hopper<Cluster> machine = {map_a, map_b, map_G, anywhere + (1024 - shared_address(anywhere) % 1024) % 1024};
  fused_block<Cluster, Grad, Masked>(machine, p, q);
}

constexpr int kRows = 32, kSlices = 8;

template <bool Grad>
__global__ void __launch_bounds__(kRows* kSlices)
    finish_rows_kernel(const __grid_constant__ Contrastive p, const __grid_constant__ Panel panel,
                       const float* partial) {
  finish_row<Grad>(Slice<kRows, kSlices>(), p, panel, partial, int(blockIdx.x * kRows + threadIdx.x % kRows));
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function by its address: nothing is linked against libcuda.
static Encode encoder() {
  static const Encode found = [] {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000, cudaEnableDefault, &result),
          "cuTensorMapEncodeTiled");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &address, cudaEnableDefault, &result),
          "cuTensorMapEncodeTiled");
#endif
    if (result != cudaDriverEntryPointSuccess || !address)
      throw std::runtime_error("pycse: this driver has no cuTensorMapEncodeTiled (CUDA 12 has)");
    return reinterpret_cast<Encode>(address);
  }();
  return found;
}

// A matrix of bf16 in boxes of 64 columns (128 bytes, swizzled).
static CUtensorMap tensor_map(const void* at, int64_t ld, int rows, int columns, int box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(ld) * 2};
  const cuuint32_t box[2] = {kTileK, cuuint32_t(box_rows)}, steps[2] = {1, 1};
  const CUresult status = encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(at), sizes, strides,
                                    box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error("pycse: fused: no tensor map, driver error " + std::to_string(int(status)));
  return map;
}

bool fused_runs(Queue queue) {
  return attribute(cudaDevAttrComputeCapabilityMajor, queue.device) == 9 &&
         attribute(cudaDevAttrComputeCapabilityMinor, queue.device) == 0;
}

void fused(const Contrastive& p, Vectors z1hat, Vectors z2, const Panel& panel, void* partial, bool grad, int cluster,
           Queue queue) {
  const Fused q = {panel.c, panel.i0, z1hat.D, static_cast<float*>(partial)};
  const auto launch = [&](auto size, auto grad, auto masked) {
    constexpr int kCluster = decltype(size)::value;
    constexpr bool kGrad = decltype(grad)::value;
    const auto kernel = fused_kernel<kCluster, kGrad, decltype(masked)::value>;
    launch_on(queue, "fused", [&](cudaStream_t stream) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), "fused: shared memory");
      const CUtensorMap a = tensor_map(z1hat.z, z1hat.ld, panel.c, z1hat.D, kTileM);
      const CUtensorMap b = tensor_map(z2.z, z2.ld, p.N, z2.D, kTileN / kCluster);
      const CUtensorMap G = tensor_map(panel.S, panel.ld, panel.c, p.N, kGroupRows);
      const int tiles = ceil_div(panel.c, kCluster * kTileM) * ceil_div(p.N, kTileN);
      const int clusters = std::min(tiles, attribute(cudaDevAttrMultiProcessorCount, queue.device) / kCluster);
      kernel<<<clusters * kCluster, kThreads, kBytes, stream>>>(a, b, G, p, q);
      check(cudaGetLastError(), "fused");
      finish_rows_kernel<kGrad><<<ceil_div(panel.c, kRows), kRows * kSlices, 0, stream>>>(p, panel, q.partial);
    });
  };
  fused_variant(p, grad, [&](auto grad, auto masked) {
    if (cluster == 2) launch(Count<2>(), grad, masked);
    else launch(Count<1>(), grad, masked);
  });
}

}  // namespace pycse::cuda
