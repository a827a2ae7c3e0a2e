// sparse.h on the host.
#include "../../../kernels/cuda/sparse.h"
#include "host.h"

namespace pycse::cuda {

void sparse(Which which, Sparse p, Storage storage, int pieces, Queue) {
  sparse_variant(storage, p.kept.block, [&](auto type, auto side) {
    using T = decltype(type);
    constexpr int B = decltype(side)::value, M = kTokens<T>, N = kSide<B>;
    const auto tiles = [](int64_t count, int bytes, auto tile) {
      for (int64_t k = 0; k < count; ++k) {
        HostTile block(bytes);
        tile(block, int(k));
      }
    };
    switch (which) {
      case Which::linear:
        set_wide<T>(p, p.out);
        return tiles(linear_tiles<T, B>(p), kTileBytes<LinearProduct<T, B>, T, B == 0, T, M, N>,
                     [&](auto& block, int k) { linear_tile<T, B>(block, p, k); });
      case Which::dx:
        set_wide<T>(p, p.in);
        return tiles(dx_tiles<T, B>(p), kTileBytes<DxProduct<T, B>, T, B == 0, T, M, N>,
                     [&](auto& block, int k) { dx_tile<T, B>(block, p, k); });
      case Which::dw:
        set_wide<T>(p, p.in);
        tiles(dw_tiles<T, B>(p), kTileBytes<DwProduct<T, B>, T, false, acc_t<T>, N, kWide<T>>,
              [&](auto& block, int k) { dw_tile<T, B>(block, p, k); });
        if (p.splits > 1)
          for (int k = 0; k < pieces; ++k) add_splits<T, B>(OneThread(), p, k);
    }
  });
}

void mark(const int* ptr, const int* index, uint32_t* bits, int rows, int words, Queue) {
  for (int row = 0; row < rows; ++row) mark_row(OneThread(), ptr, index, bits, words, row);
}

}  // namespace pycse::cuda
