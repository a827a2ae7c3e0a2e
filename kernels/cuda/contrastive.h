// What the CUDA kernels are given. Plain data that travels by value; every pointer is the device's.
#pragma once
#include <cstdint>
#include <utility>

#include "../common/problem.h"

namespace pycse::cuda {

using Contrastive = ContrastiveOf<int>;
using Panel = PanelOf<int>;
using Distill = DistillOf<int>;

// Teacher similarities of a panel's rows, and memory for their groups.
struct Teacher {
  const void* T = nullptr;
  int64_t ld = 0;
  char* scratch = nullptr;                // (rows, row_bytes) or null: in shared memory
  int rows = 0;
};

// n rows of D features, z and z1hat with leading dimensions of their own.
struct Vectors {
  const void* z = nullptr;
  int64_t ld = 0;
  int n = 0, D = 0;
};

// One launch for a whole contrastive problem; small.h. All that follows z2 is memory that small_work places.
struct Small {
  Vectors z1, z2;
  bool normalize = true, symmetric = false, grad = false;
  void* work = nullptr;
  void *dz1 = nullptr, *dz2 = nullptr;    // contiguous, or null
  void* total = nullptr;                  // fp32, or null: sum_i coef_i L_i
  int64_t ld_S = 0, ld_hat = 0;
  void *r1 = nullptr, *r2 = nullptr, *f = nullptr, *S = nullptr, *G = nullptr, *z1hat = nullptr, *g1 = nullptr,
       *g2 = nullptr;
};

PYCSE_HD constexpr int ceil_div(int n, int d) { return n / d + (n % d != 0); }

struct Queue {
  int device = 0;
  void* stream = nullptr;
};

// One launch each. The device's (*.cu) and, for tests, the host's (tests/kernels/emulation) have the same names, each
// in a module of its own: there is no table in which two could swap.
void rows(const Contrastive&, DType, const Panel&, bool grad, Queue);
void columns(const Contrastive&, DType, const Panel&, Queue);
void symmetric(const Contrastive&, DType, const Panel&, Queue);
// s_pos of rows [i0, i0 + z1hat.n)
void positives(const Contrastive&, DType, Vectors z1hat, Vectors z2, int i0, Queue);
// out = factor z / |z|, rows ld_out apart
void normalize(DType, Vectors z, void* r, void* out, int64_t ld_out, double factor, Queue);
void project(DType z_type, DType g_type, Vectors z, const void* g, const void* r, const void* f, bool scaled, void* out,
             Queue);
void distill(const Distill&, DType, const Panel&, DType teacher_type, const Teacher&, bool grad, Queue);
// Rows and bytes of scratch that distill asks for; 0 where shared memory will do.
std::pair<int, int64_t> scratch(const Distill&, DType, int c, Queue);
// Rows [i0, i0 + c) of S against the n keys from i0 on.
void uniformity(const Uniformity&, DType, const Panel&, int n, bool grad, Queue);
void small(Contrastive, DType, Small, Queue);
// Whether the device can hold a grid that waits for itself.
bool small_runs(Queue);
// The panel's GEMM and rows in one (fused.h): G over S, s_pos, losses, f. partial: (columns / 256, c) floats; cluster:
// 1 or 2.
void fused(const Contrastive&, Vectors z1hat, Vectors z2, const Panel&, void* partial, bool grad, int cluster, Queue);
bool fused_runs(Queue);

}  // namespace pycse::cuda
