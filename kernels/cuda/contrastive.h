// What the CUDA kernels are given. Plain data that travels by value; every pointer is the device's.
#pragma once
#include <cstdint>
#include <utility>

#include "../common/groups.h"

namespace pycse::cuda {

enum class DType : int { f32 = 0, bf16 = 1, f64 = 2 };

// A number that the host knows, or one in device memory (acc) that it never reads.
struct Number {
  double value = 0;
  const void* at = nullptr;
};

// One contrastive problem. "acc" is the accumulation type: float for f32 and bf16 panels, double for f64.
struct Contrastive {
  int B = 0, N = 0;
  bool focal = true;
  Number tau{0.05}, m;
  bool fixed_shift = false;
  double shift = 0;                       // subtracted from every logit when fixed_shift; else the row's own maximum
  double hard_weight = 0;                 // added to the logits of keys kB + i, k >= 1
  bool exclude = false;
  double exclude_above = 0;               // a key with s_ij > s_i,pos + exclude_above is no negative
  const void* r2 = nullptr;               // (N) acc: 1/|z2_j|, 0 for a zero vector
  void* s_pos = nullptr;                  // (B) acc: s of the positives from the embeddings; null: from the panel
  const int64_t* positives = nullptr;     // (B) or null: i
  const int64_t* query_ids = nullptr;     // (B) or null
  const int64_t* key_ids = nullptr;       // (N) or null
  const void* coef = nullptr;             // (B) acc: dLoss/dL_i, or null: coef_all for every row
  double coef_all = 1;
  void* loss = nullptr;                   // (B) acc
  void* dtau = nullptr;                   // (B) acc or null: coef_i dL_i/dtau
  void* dm = nullptr;                     // (B) acc or null: coef_i dL_i/dm
  // The symmetric loss, all (B) acc, else null:
  void* lpos = nullptr;                   // logit of the positive
  void* lneg = nullptr;                   // log of the sum over the row's negatives
  void* column_max = nullptr;             // running maximum (in bits) of the columns and sum over the rows so far
  void* column_sum = nullptr;
  void* lneg_column = nullptr;            // the finished log-sums of the columns
  void* lse_column = nullptr;             // log(exp(lneg_column) + exp(lpos))
};

// Rows [i0, i0 + c) of the similarity panel, row-major with leading dimension ld.
struct Panel {
  void* S = nullptr;
  int64_t ld = 0;
  int i0 = 0, c = 0;
  void* f = nullptr;                      // (c) acc or null: the rows' factors, which G lacks
};

enum class Divergence : int { ce = 0, kl = 1, js = 2 };

// One distillation problem; formulas in distill.h.
struct Distill {
  int B = 0;
  double inv_student = 40, inv_teacher = 80, inv_group = 1;  // 1 / temperature
  Divergence divergence = Divergence::ce;
  Grouping cut;                           // kind none: q stays as it is
  bool sample = true;                     // else each member receives its group's mean
  uint64_t seed = 0;
  const uint64_t* seed_at = nullptr;      // or the seed in device memory
  const void* coef = nullptr;             // (B) acc: dLoss/dL_i, or null: coef_all for every row
  double coef_all = 1;
  void* loss = nullptr;                   // (B) acc
};

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
  void *total = nullptr, *total_dtau = nullptr, *total_dm = nullptr;  // fp32, or null
  int64_t ld_S = 0, ld_hat = 0;
  void *r1 = nullptr, *r2 = nullptr, *f = nullptr, *S = nullptr, *G = nullptr, *z1hat = nullptr, *g1 = nullptr,
       *g2 = nullptr;
};

struct Uniformity {
  double u = 0;                           // 2 t / log 2
  const void* bias = nullptr;             // (N) acc
  void* sums = nullptr;                   // (N) acc
};

PYCSE_HD constexpr int ceil_div(int n, int d) { return n / d + (n % d != 0); }

struct Queue {
  int device = 0;
  void* stream = nullptr;
};

// One table for the device, and one of the same kernels run by a single host thread (emulated.cpp).
struct Kernels {
  void (*rows)(const Contrastive&, DType, const Panel&, bool grad, Queue);
  void (*columns)(const Contrastive&, DType, const Panel&, Queue);
  void (*symmetric)(const Contrastive&, DType, const Panel&, Queue);
  // s_pos of rows [i0, i0 + z1hat.n)
  void (*positives)(const Contrastive&, DType, Vectors z1hat, Vectors z2, int i0, Queue);
  // out = factor z / |z|, rows ld_out apart
  void (*normalize)(DType, Vectors z, void* r, void* out, int64_t ld_out, double factor, Queue);
  void (*project)(DType z_type, DType g_type, Vectors z, const void* g, const void* r, const void* f, bool scaled,
                  void* out, Queue);
  void (*distill)(const Distill&, DType, const Panel&, DType teacher_type, const Teacher&, bool grad, Queue);
  // Rows and bytes of scratch that distill asks for; 0 where shared memory will do.
  std::pair<int, int64_t> (*scratch)(const Distill&, DType, int c, Queue);
  // Rows [i0, i0 + c) of S against the n keys from i0 on.
  void (*uniformity)(const Uniformity&, DType, const Panel&, int n, bool grad, Queue);
  void (*small)(Contrastive, DType, Small, Queue);
  // The panel's GEMM and rows in one (fused.h): G over S, s_pos, losses, f. partial: (columns / 256, c) floats;
  // cluster: 1 or 2.
  void (*fused)(const Contrastive&, Vectors z1hat, Vectors z2, const Panel&, void* partial, bool grad, int cluster,
                Queue);
  bool (*fused_runs)(Queue);
  // Whether the device can hold a grid that waits for itself.
  bool (*small_runs)(Queue);
};

int64_t small_work_size(int B, int N, int D, DType dtype, bool normalize, bool symmetric, bool dz1, bool dz2);

const Kernels& emulated_kernels();
// The emulation's thread block: so many fibers, which run in ascending order or in descending; 0 for one thread.
void emulate_with(int threads, bool ascending);
const Kernels& device_kernels();

}  // namespace pycse::cuda
