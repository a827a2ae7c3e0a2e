// What a parallel region needs: scratch, made before it, and which thread this is.
//
// Nothing inside a region allocates: an exception that leaves one ends the process, and one thread's alone would leave
// the others waiting at the next barrier.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif
#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "simd.h"

namespace pycse::PYCSE_ISA {

// This thread among those of the parallel region.
PYCSE_INLINE int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// How many there are: not always as many as were asked for.
PYCSE_INLINE int team_size() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

// Scratch that starts on a cache line.
template <class A>
struct Scratch {
  struct Free {
    void operator()(A* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  std::unique_ptr<A[], Free> memory;
  explicit Scratch(int64_t n)
      : memory(static_cast<A*>(::operator new[](std::max<int64_t>(n, 1) * sizeof(A), std::align_val_t(64)))) {}
  A* get() const { return memory.get(); }
};

}  // namespace pycse::PYCSE_ISA
