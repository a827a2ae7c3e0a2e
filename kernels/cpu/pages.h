// Large scratch on 2 MB pages: a 32 MB panel on 4 KB pages costs 8192 page faults a call and misses the TLB in every
// GEMM.
#pragma once
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace pycse {

// A hint for fresh memory, before it is first written; ignored where the system knows no such pages.
inline void prefer_huge_pages([[maybe_unused]] std::uintptr_t begin, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const std::uintptr_t page = sysconf(_SC_PAGESIZE), first = (begin + page - 1) / page * page;
  if (const std::uintptr_t end = (begin + bytes) / page * page; end > first)
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace pycse
