// Device side of fused.h: the pipeline. Compiled for sm_90a alone. It has not yet run on a GPU.
//
//   full[s]    operands of step s have arrived      1 arrival (the producer) and kStepBytes
//   empty[s]   both warpgroups of all blocks of the cluster have multiplied it   8 arrivals a block, one a warp
// Step number `step` counts on over all of a block's tiles: slot step % kSteps, phase step / kSteps.
#include <algorithm>

#include "device.h"
#include "fused.h"
#include "hopper.cuh"
#include "launch.cuh"

namespace pycse::cuda {

using namespace hopper;

constexpr int kThreads = 3 * 128;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // of 168 each at entry: 40 + 2 x 232 <= 3 x 168
constexpr int kBuffers = 2;                                       // of chunks for a warpgroup: one is stored, one written
constexpr int kBarriers = kSteps * kStepBytes + 2 * kBuffers * kChunkBytes;
constexpr int kBytes = kBarriers + 2 * kSteps * 8 + 1024;  // and room to begin at a multiple of 1024

struct Shared {
  char* memory;
  __device__ __forceinline__ char* a(int slot) const { return memory + slot * kStepBytes; }
  __device__ __forceinline__ char* b(int slot) const { return a(slot) + kBytesA; }
  __device__ __forceinline__ char* chunk(int group, int buffer) const {
    return memory + kSteps * kStepBytes + (group * kBuffers + buffer) * kChunkBytes;
  }
  __device__ __forceinline__ uint64_t* full(int slot) const { return reinterpret_cast<uint64_t*>(memory + kBarriers) + slot; }
  __device__ __forceinline__ uint64_t* empty(int slot) const { return full(kSteps + slot); }
};

template <int Cluster, bool Grad, bool Masked>
__global__ void __cluster_dims__(Cluster, 1, 1) __launch_bounds__(kThreads, 1)
fused_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
             const __grid_constant__ CUtensorMap map_G, const __grid_constant__ Contrastive p, const __grid_constant__ Fused q) {
  extern __shared__ char anywhere[];
  const Shared shared = {anywhere + (1024 - shared_address(anywhere) % 1024) % 1024};
  // Of the cluster: Cluster row tiles at a time, this block's by its rank.
  const int down = ceil_div(q.c, Cluster * kTileM), across = ceil_div(p.N, kTileN), tiles = down * across;
  const int first = blockIdx.x / Cluster, stride = gridDim.x / Cluster;
  const int steps = ceil_div(q.D, kTileK), warpgroup = threadIdx.x / 128;
  const int rank = blockIdx.x % Cluster;  // in a cluster along x
  const auto place = [&](int tile) {
    const TileAt at = tile_at(tile, down, across);
    return TileAt{(at.m * Cluster + rank) * kTileM, at.n * kTileN};
  };
  const auto sync_all = [] {
    if constexpr (Cluster > 1) sync_cluster();
    else __syncthreads();
  };

  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kSteps; ++slot) {
      init(shared.full(slot), 1);
      init(shared.empty(slot), 8 * Cluster);
    }
    fence_init();
  }
  sync_all();

  if (warpgroup == 0) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) {
      uint32_t step = 0;
      for (int tile = first; tile < tiles; tile += stride) {
        const TileAt at = place(tile);
        for (int k = 0; k < steps; ++k, ++step) {
          const int slot = step % kSteps;
          wait(shared.empty(slot), step / kSteps % 2 ^ 1);  // the first time round all slots are free
          arrive_expecting(shared.full(slot), kStepBytes);
          load_box(shared.a(slot), &map_a, k * kTileK, at.m, shared.full(slot));
          if constexpr (Cluster == 1) {
            load_box(shared.b(slot), &map_b, k * kTileK, at.n, shared.full(slot));
          } else {  // this block's part of the keys, for all; the others' parts count for this barrier too
            constexpr int kPart = kTileN / Cluster;
            load_box_for_all(shared.b(slot) + rank * (kBytesB / Cluster), &map_b, k * kTileK, at.n + rank * kPart,
                             shared.full(slot), (1 << Cluster) - 1);
          }
        }
      }
    }
  } else {
    take_registers<kConsumerRegisters>();
    const int group = warpgroup - 1, thread = threadIdx.x % 128;
    const bool leads = thread == 0, leads_warp = thread % 32 == 0;
    float acc[128];
    uint32_t step = 0;
    const auto release = [&](int slot) {
      if (!leads_warp) return;
      if constexpr (Cluster == 1) arrive(shared.empty(slot));
      else
        for (int block = 0; block < Cluster; ++block) arrive_at(shared.empty(slot), block);
    };
    for (int tile = first; tile < tiles; tile += stride) {
      const TileAt at = place(tile);
      for (int k = 0; k < steps; ++k, ++step) {
        const int slot = step % kSteps;
        wait(shared.full(slot), step / kSteps % 2);
        const uint64_t a = descriptor(shared_address(shared.a(slot)) + group * kGroupRows * 2 * kTileK);
        const uint64_t b = descriptor(shared_address(shared.b(slot)));
        wgmma_fence();
#pragma unroll
        for (int part = 0; part < kTileK / 16; ++part)  // 32 bytes on: 2 in units of 16
          wgmma(acc, a + 2 * part, b + 2 * part, k > 0 || part > 0);
        wgmma_commit();
        wgmma_wait<1>();  // the step before has been multiplied
        if (k > 0) release((step - 1) % kSteps);
      }
      wgmma_wait<0>();
      release((step - 1) % kSteps);

      const int k0 = at.m + group * kGroupRows;
      const FusedRows rows(p, q, thread, k0);
      float sums[2] = {0, 0};
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        char* staging = shared.chunk(group, chunk % kBuffers);
        const int j0 = at.n + chunk * kChunk;
        if constexpr (Grad) {
          if (leads) wait_read<kBuffers - 1>();  // the buffer's last store
          sync_group(1 + group);
        }
        fused_chunk<Grad, Masked>(p, q, rows, thread, k0, j0, acc + 32 * chunk, staging, sums);
        if constexpr (Grad) {
          fence_stores();
          sync_group(1 + group);
          if (leads) {
            if (k0 < q.c && j0 < p.N) store_box(&map_G, staging, j0, k0);
            commit_stores();  // an empty group counts too
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = sums[half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const int row = k0 + sums_row(thread, 2 * half);
        if (thread % 4 == 0 && row < q.c) q.partial[int64_t(at.n / kTileN) * q.c + row] = sum;
      }
    }
    if (Grad && leads) wait_stored();
  }
  if constexpr (Cluster > 1) sync_all();  // no block leaves while another's copies or arrivals are on their way to it
}

constexpr int kRows = 32, kSlices = 8;

template <bool Grad>
__global__ void __launch_bounds__(kRows * kSlices)
finish_rows_kernel(const __grid_constant__ Contrastive p, const __grid_constant__ Panel panel, const float* partial) {
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
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &address, cudaEnableDefault, &result), "cuTensorMapEncodeTiled");
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
  const CUresult status =
      encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(at), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw std::runtime_error("pycse: fused: no tensor map, driver error " + std::to_string(int(status)));
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
      const CUtensorMap a = tensor_map(z1hat.z, z1hat.ld, panel.c, z1hat.D, kTileM);
      const CUtensorMap b = tensor_map(z2.z, z2.ld, p.N, z2.D, kTileN / kCluster);
      const CUtensorMap G = tensor_map(panel.S, panel.ld, panel.c, p.N, kGroupRows);
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), "fused: shared memory");
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
