// What the CPU kernels are given. Plain data: the bindings fill it, every instruction-set variant reads it.
#pragma once
#include <cstdint>

#include "../common/problem.h"

namespace pycse {

using Contrastive = ContrastiveOf<int64_t>;
using Distill = DistillOf<int64_t>;
using Sigmoid = SigmoidOf<int64_t>;

// The type of its similarities and the threads that share its rows; a guide's similarities of the same rows and keys.
struct Panel : PanelOf<int64_t> {
  DType dtype = DType::f32;
  int threads = 1;
  const void* T = nullptr;
  int64_t ld_T = 0;
  DType dtype_T = DType::f32;
};

constexpr int kMostLengths = 16;

// A loss at several lengths, ascending, each a problem with its own coefficients and norms: prefixes.h. The panel has
// the products of a block of features each, ``step`` numbers apart.
struct Prefixes {
  int lengths = 0;
  const Contrastive* of[kMostLengths] = {};
  int64_t step = 0;
  const void* rho = nullptr;  // (lengths, c) acc: inverse norms of the panel's rows
  void* t = nullptr;  // (lengths, c) acc, with gradients
  void* columns = nullptr;  // (lengths, N) acc, added to; with gradients
};

struct Small {  // a whole forward + backward in one call, for batches that fit in cache
  DType dtype = DType::f32;
  int64_t D = 0, ld1 = 0, ld2 = 0;
  const void *z1 = nullptr, *z2 = nullptr;
  bool normalize = true, symmetric = false;
  float* work = nullptr;  // small_work_size floats, aligned as doubles are
  void *dz1 = nullptr, *dz2 = nullptr;  // (B, D), (N, D) contiguous or null, in dtype
  float* total = nullptr;  // sum_i coef_i L_i
  int threads = 1;
};

// r1, r2, the rows' losses and factors, the panel of similarities; what a symmetric loss keeps of rows and columns
// (five doubles and three floats each); for bf16 the gradients before they are rounded.
inline int64_t small_work_size(int64_t B, int64_t N, int64_t D, DType dtype, bool symmetric) {
  return 3 * B + N + B * N + (symmetric ? 13 * B : 0) + (dtype == DType::bf16 ? (B + N) * D : 0);
}

// Ones, the norms and their sums, two panels a length, the gradients before they are projected.
inline int64_t small_prefixes_work_size(int64_t lengths, int64_t B, int64_t N, int64_t longest) {
  return B + 2 * lengths * (B + N) + 2 * lengths * B * N + (B + N) * longest;
}

// A loss whose rows have all keys of their class as positives: supervised.h.
struct Supervised {
  int64_t B = 0, N = 0;
  double b = 20;  // l = b s: 1/temperature
  double shift = 0;  // subtracted from every logit when fixed_shift; else the row's own maximum
  bool fixed_shift = false;
  bool same = false;  // the keys are the rows, and none is its own key
  bool inside = false;  // the positives' mean inside the logarithm
  const int64_t *ptr = nullptr, *keys = nullptr;  // of class k: keys[ptr[k]] to keys[ptr[k + 1] - 1], ascending
  const int64_t* classes = nullptr;  // (B)
  const void* r2 = nullptr;  // (N) acc: 1/|z2_j|, 0 for a zero vector
  const void* coef = nullptr;  // (B) acc: dLoss/dL_i, or null: coef_all for every row
  double coef_all = 1;
  void* loss = nullptr;  // (B) acc
  void* dlogit = nullptr;  // (B) acc or null: coef_i dL_i/db

  template <class A>
  A coefficient(int64_t i) const {
    return coef ? static_cast<const A*>(coef)[i] : A(coef_all);
  }
};

struct Vectors {  // rows of embeddings, or of a matrix
  DType type = DType::f32;
  const void* x = nullptr;
  int64_t ld = 0, D = 0;
};

struct SmallDistill {  // a whole forward + backward in one call, for batches that fit in cache
  Vectors z, logits;  // logits (B, B) where there are no teachers
  bool normalize = true;
  int64_t teachers = 0;
  const Vectors* teacher = nullptr;
  const double* weight = nullptr;
  float* work = nullptr;  // small_distill_work_size floats
  void* dz = nullptr;  // (B, D) contiguous or null, in z's type
  int threads = 1;
};

// Norms of z and the teachers; S, T and G + G^T; for bf16 the gradient before it is rounded.
inline int64_t small_distill_work_size(int64_t B, int64_t D, int64_t teachers, DType dtype) {
  return (1 + teachers) * B + (teachers > 0 ? 3 : 2) * B * B + (dtype == DType::bf16 ? B * D : 0);
}

// The kept blocks of a weight (out, in), by block rows and by block columns: pycse/sparse/pattern.py.
struct SparsePattern {
  int64_t out = 0, in = 0;
  int block = 1;
  const int32_t *ptr = nullptr, *cols = nullptr;  // (out/block + 1), (nnz)
  const int32_t *t_ptr = nullptr, *t_rows = nullptr;  // (in/block + 1), (nnz)
  const int32_t *plan = nullptr, *t_plan = nullptr;  // single weights: the order of their use for y, for dx
  const void* packed = nullptr;  // (nnz) acc: single weights in that order for y; null: they are in W
};
constexpr int64_t kSparseChunk = 128;  // features that single weights are planned by: with their tokens at most 32 KB
constexpr int kAtStep = 32;  // a feature's place in a plan: the processor multiplies it by up to 8

}  // namespace pycse
