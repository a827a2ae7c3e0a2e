// Makes single allocations fail, preloaded into a process: those that pycse's module makes (all by operator new), and
// those that PyTorch's CPU allocator (libc10) makes for tensors. Everybody else's memory is as always.
#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

struct Range { std::uintptr_t begin = 0, end = 0; };
Range module, c10;
std::atomic<long> seen{0}, victim{0};  // allocations since start(); the one that fails, 0 for none

// Whether the caller's next allocation fails.
bool fails(const void* caller, const Range& of) {
  const auto at = reinterpret_cast<std::uintptr_t>(caller);
  if (at < of.begin || at >= of.end) return false;
  return ++seen == victim.load(std::memory_order_relaxed);
}

void* allocate(std::size_t size, std::size_t alignment, const void* caller) {
  void* memory = nullptr;
  if (!fails(caller, module)) {
    if (alignment == 0) memory = std::malloc(size ? size : 1);
    else memory = std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
  }
  if (!memory) throw std::bad_alloc();
  return memory;
}

}  // namespace

extern "C" {

// Finds the code of both libraries; 0 where one is not loaded.
int failing_find() {
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        Range* const range = std::strstr(info->dlpi_name, "/_native.")    ? &module
                             : std::strstr(info->dlpi_name, "/libc10.so") ? &c10
                                                                          : nullptr;
        for (int k = 0; range && k < info->dlpi_phnum; ++k) {
          const auto& part = info->dlpi_phdr[k];
          if (part.p_type != PT_LOAD || !(part.p_flags & PF_X)) continue;
          range->begin = info->dlpi_addr + part.p_vaddr, range->end = range->begin + part.p_memsz;
        }
        return 0;
      },
      nullptr);
  return module.begin != 0 && c10.begin != 0;
}
void failing_start(long n) { seen = 0, victim = n; }
long failing_stop() { return victim = 0, seen.load(); }

int posix_memalign(void** memory, size_t alignment, size_t size) {
  static const auto real = reinterpret_cast<int (*)(void**, size_t, size_t)>(dlsym(RTLD_NEXT, "posix_memalign"));
  if (fails(__builtin_return_address(0), c10)) return ENOMEM;
  return real(memory, alignment, size);
}
}

void* operator new(std::size_t n) { return allocate(n, 0, __builtin_return_address(0)); }
void* operator new[](std::size_t n) { return allocate(n, 0, __builtin_return_address(0)); }
void* operator new(std::size_t n, std::align_val_t a) {
  return allocate(n, std::size_t(a), __builtin_return_address(0));
}
void* operator new[](std::size_t n, std::align_val_t a) {
  return allocate(n, std::size_t(a), __builtin_return_address(0));
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
