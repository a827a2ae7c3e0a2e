// What AMX does faster than the widest vectors; everything else stays as v4 has it. CMake compiles this with PYCSE_ISA
// = amx.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "block_tiles.h"
#include "kernels.h"
#include "sparse.h"

namespace pycse::v4 {
Kernels kernels();
}

namespace pycse::PYCSE_ISA {

// The processor has tiles for bf16, and Linux lets this process use them.
bool available() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTiles)) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

static const Kernels& without() {
  static const Kernels table = v4::kernels();
  return table;
}

// Tiles take blocks of 32 and more; few tokens do not pay for making the operands.
static bool fits(const SparsePattern& p, DType dtype, int64_t n) {
  return p.block >= 32 && dtype != DType::f64 && n >= (dtype == DType::f32 ? 4 * kSquare : kSquare);
}

static void product(const SparsePattern& p, DType dtype, const void* x, int64_t ldx, const void* w, int64_t ldw,
                    const void* bias, void* y, int64_t n, bool transposed, int threads) {
  if (!fits(p, dtype, n)) return without().sparse_product(p, dtype, x, ldx, w, ldw, bias, y, n, transposed, threads);
  const auto run = [&](auto type) {
    using T = decltype(type);
    (p.block == 32 ? tiled_product<32, T>
                   : tiled_product<64, T>)(p, static_cast<const T*>(x), ldx, static_cast<const T*>(w), ldw,
                                           static_cast<const T*>(bias), static_cast<T*>(y), transposed ? p.in : p.out,
                                           n, transposed, false, true, threads);
  };
  if (dtype == DType::f32) run(float());
  else run(bf16());
}

static void outer(const SparsePattern& p, DType dtype, const void* dy, int64_t ldy, const void* x, int64_t ldx,
                  void* dw, int64_t n, int threads) {
  if (!fits(p, dtype, n)) return without().sparse_outer(p, dtype, dy, ldy, x, ldx, dw, n, threads);
  const auto run = [&](auto type) {
    using T = decltype(type);
    (p.block == 32 ? tiled_outer<32, T> : tiled_outer<64, T>)(p, static_cast<const T*>(dy), ldy,
                                                              static_cast<const T*>(x), ldx, static_cast<T*>(dw), n,
                                                              false, threads);
  };
  if (dtype == DType::f32) run(float());
  else run(bf16());
}

static void dense_product(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t out, int64_t in, float* y,
                          int64_t ldy, int64_t n, bool transposed, bool add, int threads) {
  const int64_t features = transposed ? out : in;
  const int64_t most = transposed ? kDeepest * 3 / 4 : kDeepest;
  const int64_t chunks = (features + most - 1) / most, chunk = (features / kDepth + chunks - 1) / chunks * kDepth;
  for (int64_t f = 0; f < features; f += chunk) {
    const int64_t deep = std::min(chunk, features - f);
    const EveryBlock all(transposed ? deep : out, transposed ? in : deep);
    tiled_product<32, float>(all.pattern, x + f, ldx, w + f * (transposed ? ldw : 1), ldw, nullptr, y, ldy, n,
                             transposed, add || f > 0, false, threads);
  }
}

static void dense_outer(const float* dy, int64_t ldy, const float* x, int64_t ldx, int64_t out, int64_t in, float* dw,
                        int64_t n, bool add, int threads) {
  tiled_outer<32, float>(EveryBlock(out, in).pattern, dy, ldy, x, ldx, dw, n, add, threads);
}

Kernels kernels() {
  Kernels with = without();
  with.isa = "amx";
  with.sparse_product = product;
  with.sparse_outer = outer;
  with.dense_product = dense_product;
  with.dense_outer = dense_outer;
  return with;
}

}  // namespace pycse::PYCSE_ISA
