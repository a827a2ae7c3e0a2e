// The table of an instruction set's kernels.
#pragma once
#include "problem.h"

namespace pycse {

// The kernels of an instruction set, X(name, result, arguments). From this list come the table's members and what fills
// them (isa.cpp), each by its name.
//   positives        s_pos of rows [i0, i0 + n), of which z1hat holds the embeddings
//   prefixes         losses at several lengths, of a panel for each block of features (prefixes.h)
//   distill          rows [i0, i0 + c) of S given the teachers', of which `teachers` holds c rows
//   uniformity       rows [i0, i0 + c) of S against the n keys from i0 on
//   sparse_product   y = x W^T + bias of n tokens, or dx = dy W where transposed (x is then dy, y is dx)
#define PYCSE_CPU_KERNELS(X)                                                                                         \
  X(rows, void, (const Contrastive&, const Panel&, bool grad))                                                       \
  X(prefixes, void, (const Prefixes&, const Panel&, bool grad))                                                      \
  X(small_prefixes, bool, (const Prefixes&, const int64_t* dims, const Small&))                                      \
  X(columns, void, (const Contrastive&, const Panel&))                                                               \
  X(symmetric, void, (const Contrastive&, const Panel&))                                                             \
  X(supervised, void, (const Supervised&, const Panel&, bool grad))                                                  \
  X(normalize, bool,                                                                                                 \
    (DType, const void* z, int64_t ld, int64_t n, int64_t D, void* r, void* out, int64_t ld_out, double factor,      \
     int threads))                                                                                                   \
  X(project, void,                                                                                                   \
    (DType z_type, DType g_type, const void* z, int64_t ld, const void* g, int64_t g_ld, int64_t n, int64_t D,       \
     const void* r, const void* f, bool scaled, void* out, int threads))                                             \
  X(positives, void,                                                                                                 \
    (const Contrastive&, DType, const void* z1hat, int64_t ld1, const void* z2, int64_t ld2, int64_t D, int64_t i0,  \
     int64_t n, int threads))                                                                                        \
  X(small, bool, (const Contrastive&, const Small&))                                                                 \
  X(distill, void, (const Distill&, const Panel&, DType teacher_type, const void* teachers, int64_t ld, bool grad))  \
  X(small_distill, bool, (const Distill&, const SmallDistill&))                                                      \
  X(sigmoid_rows, void, (const Sigmoid&, const Panel&, bool grad))                                                   \
  X(adapacse, void, (const Contrastive&, double m, const Panel&, bool grad))                                         \
  X(uniformity, void, (const Uniformity&, const Panel&, int64_t n, bool grad))                                       \
  X(sparse_product, void,                                                                                            \
    (const SparsePattern&, DType, const void* x, int64_t ldx, const void* w, int64_t ldw, const void* bias, void* y, \
     int64_t n, bool transposed, int threads))                                                                       \
  X(sparse_outer, void,                                                                                              \
    (const SparsePattern&, DType, const void* dy, int64_t ldy, const void* x, int64_t ldx, void* dw, int64_t n,      \
     int threads))                                                                                                   \
  X(sparse_pack, void, (const SparsePattern&, DType, const void* w, int64_t ldw, void* packed, int threads))         \
  X(mask_weight, void,                                                                                               \
    (DType, const void* w, int64_t ldw, const int32_t* bits, int64_t out, int64_t in, void* result, int threads))

struct Kernels {
  const char* isa = nullptr;
#define PYCSE_MEMBER(name, result, arguments) result(*name) arguments = nullptr;
  PYCSE_CPU_KERNELS(PYCSE_MEMBER)
#undef PYCSE_MEMBER
  // Dense products in fp32, faster than the fp32 units'; null where the processor has no means for them. w is (out,
  // in), both multiples of 32: y (+)= x w^T or, `transposed`, x w; and dw (+)= dy^T x, contiguous.
  void (*dense_product)(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t out, int64_t in, float* y,
                        int64_t ldy, int64_t n, bool transposed, bool add, int threads) = nullptr;
  void (*dense_outer)(const float* dy, int64_t ldy, const float* x, int64_t ldx, int64_t out, int64_t in, float* dw,
                      int64_t n, bool add, int threads) = nullptr;
};

}  // namespace pycse
