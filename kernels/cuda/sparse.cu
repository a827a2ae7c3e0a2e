// Device side of sparse.h: a block of 128 threads for a tile. Operands come from L2 (x and W of an encoder fit there),
// which feeds a tile of 128 tokens x 64 for 43 operations a byte; tiles of the same tokens run side by side.
#include <climits>

#include "launch.cuh"
#include "sparse.h"

namespace pycse::cuda {

// On a multiprocessor, as many as its shared memory holds: 168 registers a thread.
constexpr int kBlocks = 3;

extern __shared__ __align__(128) char tile_memory[];

template <class T, int B>
__global__ void __launch_bounds__(kTileThreads, kBlocks) linear_kernel(const __grid_constant__ Sparse p) {
  DeviceTile block{tile_memory};
  linear_tile<T, B>(block, p, blockIdx.x);
}

template <class T, int B>
__global__ void __launch_bounds__(kTileThreads, kBlocks) dx_kernel(const __grid_constant__ Sparse p) {
  DeviceTile block{tile_memory};
  dx_tile<T, B>(block, p, blockIdx.x);
}

template <class T, int B>
__global__ void __launch_bounds__(kTileThreads, kBlocks) dw_kernel(const __grid_constant__ Sparse p) {
  DeviceTile block{tile_memory};
  dw_tile<T, B>(block, p, blockIdx.x);
}

template <class T, int B>
__global__ void __launch_bounds__(256) add_splits_kernel(const __grid_constant__ Sparse p) {
  add_splits<T, B>(ThreadBlock(), p, blockIdx.x);
}

__global__ void __launch_bounds__(64) mark_kernel(const int* ptr, const int* index, uint32_t* bits, int words) {
  mark_row(ThreadBlock(), ptr, index, bits, words, blockIdx.x);
}

static void launch(const Sparse& p, const char* name, void (*kernel)(Sparse), int64_t tiles, int bytes, Queue queue) {
  if (tiles > INT_MAX) throw std::runtime_error("pycse: more than 2**31 tiles: too many tokens for one call");
  if (tiles == 0) return;
  launch_on(queue, name, [&](cudaStream_t stream) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
    kernel<<<unsigned(tiles), kTileThreads, bytes, stream>>>(p);
  });
}

void sparse(Which which, Sparse p, Storage storage, int pieces, Queue queue) {
  sparse_variant(storage, p.kept.block, [&](auto type, auto side) {
    using T = decltype(type);
    constexpr int B = decltype(side)::value, M = kTokens<T>, N = kSide<B>;
    switch (which) {
      case Which::linear:
        set_wide<T>(p, p.out);
        return launch(p, "linear", linear_kernel<T, B>, linear_tiles<T, B>(p),
                      kTileBytes<LinearProduct<T, B>, T, B == 0, T, M, N>, queue);
      case Which::dx:
        set_wide<T>(p, p.in);
        return launch(p, "dx", dx_kernel<T, B>, dx_tiles<T, B>(p), kTileBytes<DxProduct<T, B>, T, B == 0, T, M, N>,
                      queue);
      case Which::dw:
        set_wide<T>(p, p.in);
        launch(p, "dw", dw_kernel<T, B>, dw_tiles<T, B>(p),
               kTileBytes<DwProduct<T, B>, T, false, acc_t<T>, N, kWide<T>>, queue);
        if (p.splits > 1 && pieces > 0)
          launch_on(queue, "add_splits",
                    [&](cudaStream_t stream) { add_splits_kernel<T, B><<<pieces, 256, 0, stream>>>(p); });
    }
  });
}

void mark(const int* ptr, const int* index, uint32_t* bits, int rows, int words, Queue queue) {
  if (rows == 0 || words == 0) return;
  launch_on(queue, "mark", [&](cudaStream_t stream) { mark_kernel<<<rows, 64, 0, stream>>>(ptr, index, bits, words); });
}

}  // namespace pycse::cuda
