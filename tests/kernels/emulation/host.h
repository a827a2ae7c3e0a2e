// The CUDA kernels' bodies on the host: what the tests run where there is no GPU. By one thread, or (emulate_with) by a
// thread block of fibers that takes all rows in turn. Pointers are the host's, queues are ignored.
#pragma once
#include "../../../kernels/cuda/block.h"

namespace pycse::cuda {

inline int block_threads = 0;  // 0: one thread
inline bool ascending = true;

// f(block, k) for every k < n.
template <class F>
void blocks(int n, F f) {
  if (block_threads == 0) {
    for (int k = 0; k < n; ++k) f(OneThread(), k);
  } else {
    Fibers().run(block_threads, ascending, [&] {
      for (int k = 0; k < n; ++k) f(ThreadBlock(), k);
    });
  }
}

template <class F>
void warps(int n, F f) {
  if (block_threads == 0) return blocks(n, f);
  Fibers().run(block_threads, ascending, [&] {
    for (int k = thread_index() / 32; k < n; k += thread_count() / 32) f(Warp(), k);
  });
}

// Columns side by side, in slices of the rows.
template <class F>
void columns_of(int n, F f) {
  constexpr int kColumns = 16, kSlices = 4;
  if (block_threads == 0) return blocks(n, f);
  Fibers().run(kColumns * kSlices, ascending, [&] {
    for (int j = 0; j < n; j += kColumns) f(Slice<kColumns, kSlices>(), j + thread_index() % kColumns);
  });
}

}  // namespace pycse::cuda
