// small.h on the host: every phase's items in turn, none before all of the phase before are done.
#include "../../../kernels/cuda/small.h"
#include "host.h"

namespace pycse::cuda {

struct HostGrid {
  int bytes;
  template <class F> void warps(int n, F f) const { cuda::warps(n, f); }
  template <class F> void columns(int n, F f) const { columns_of(n, f); }
  template <class F> void blocks(int n, F f) const { cuda::blocks(n, f); }
  template <class F> void threads(int n, F f) const {
    for (int k = 0; k < n; ++k) f(k);
  }
  template <class F> void tiles(int n, F f) const {
    for (int k = 0; k < n; ++k) {
      HostTile tile(bytes);
      f(tile, k);
    }
  }
  void sync() const {}
};

void small(Contrastive p, DType dtype, Small q, Queue) {
  small_work(p, q, dtype == DType::bf16);
  small_variant(p, dtype, [&](auto type, auto masked) {
    HostGrid grid{kSmallBytes<decltype(type)>};
    small<decltype(type), decltype(masked)::value>(grid, p, q);
  });
}

bool small_runs(Queue) { return true; }

}  // namespace pycse::cuda
