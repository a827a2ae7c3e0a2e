// What kernels are given: plain data, filled by the bindings. Index counts rows and keys, 64 bits on a processor, 32 on
// a GPU; pointers are of the memory that the kernels run on. "acc" is the accumulation type: float for f32 and bf16
// panels, double for f64. "statistic" is double on a processor, acc on a GPU.
#pragma once
#include <cstdint>

#include "groups.h"
#include "logit.h"
#include "storage.h"

namespace pycse {

enum class DType : int { f32 = 0, bf16 = 1, f64 = 2 };

// The bound above which a key is no negative, from the positive's similarity x and a distance:
enum class ExcludeBy : int { absolute = 0, relative = 1, constant = 2 };  // x + d, x + d |x|, d

struct Bound {
  bool given = false;
  ExcludeBy by = ExcludeBy::absolute;
  double all = 0;  // of every row, or
  const void* each = nullptr;  // (B) acc

  template <class A, class I>
  PYCSE_HD A of(I row, A x) const {
    const A d = each ? static_cast<const A*>(each)[row] : A(all);
    return by == ExcludeBy::absolute ? x + d : by == ExcludeBy::constant ? d : x + d * (x < 0 ? -x : x);
  }
};

// One contrastive problem.
template <class Index>
struct ContrastiveOf {
  Index B = 0, N = 0;
  Coefficients logit;
  double shift = 0;  // subtracted from every logit when fixed_shift; else the row's own maximum
  bool fixed_shift = false;
  Bound exclude;  // of s
  Bound guide;  // of a guide's similarity, which a panel has beside s
  const void* r2 = nullptr;  // (N) acc: 1/|z2_j|, 0 for a zero vector
  void* s_pos = nullptr;  // (B) acc: s of the positives from the embeddings; null: from the panel
  const int64_t* positives = nullptr;  // (B) or null: i
  const int64_t* query_ids = nullptr;  // (B) or null
  const int64_t* key_ids = nullptr;  // (N) or null
  const void* coef = nullptr;  // (B) acc: dLoss/dL_i, or null: coef_all for every row
  double coef_all = 1;
  void* loss = nullptr;  // (B) acc
  void* dlogit = nullptr;  // (kGradients, B) acc or null: coef_i dL_i of each coefficient
  // The symmetric loss, else null:
  void* lpos = nullptr;  // (B) statistic: logit of the positive
  void* lneg = nullptr;  // (B) statistic: log of the sum over the row's negatives
  void* column_max = nullptr;  // (N) statistic: running maximum of the columns in bits, and sum over the rows so far
  void* column_sum = nullptr;  // (N) statistic
  void* lneg_column = nullptr;  // (N) statistic: the finished log-sums of the columns
  void* lse_column = nullptr;  // (N) acc: log(exp(lneg_column) + exp(lpos))

  // Whether every key has to be asked if it is a negative.
  PYCSE_HD bool masked() const { return query_ids || exclude.given || guide.given; }

  template <class A>
  PYCSE_HD A coefficient(Index i) const {
    return coef ? static_cast<const A*>(coef)[i] : A(coef_all);
  }

  // The gradients of row i: P s^2 and P s over the negatives, P of the positive and its s.
  template <class A>
  PYCSE_HD void store_gradients(Index i, A negatives_ss, A negatives_s, A P, A s_pos) const {
    A* d = static_cast<A*>(dlogit) + i;
    const A each[kGradients] = {P * s_pos * s_pos, P * s_pos, P, negatives_ss, negatives_s};
    for (int k = 0; k < kGradients; ++k) d[int64_t(k) * B] = each[k];
  }
};

// Rows [i0, i0 + c) of the similarity panel, row-major with leading dimension ld.
template <class Index>
struct PanelOf {
  void* S = nullptr;
  int64_t ld = 0;
  Index i0 = 0, c = 0;
  void* f = nullptr;  // (c) acc or null: the rows' factors, which G lacks
};

enum class Divergence : int { ce = 0, kl = 1, js = 2 };

// One distillation problem; formulas in distill.h of either folder.
template <class Index>
struct DistillOf {
  Index B = 0;
  double inv_student = 40, inv_teacher = 80, inv_group = 1;  // 1 / temperature
  Divergence divergence = Divergence::ce;
  Grouping cut;  // kind none: q stays as it is
  bool sample = true;  // else each member receives its group's mean
  uint64_t seed = 0;
  const uint64_t* seed_at = nullptr;  // or the seed in device memory
  const void* coef = nullptr;  // (B) acc: dLoss/dL_i, or null: coef_all for every row
  double coef_all = 1;
  void* loss = nullptr;  // (B) acc
};

// One problem of the sigmoid loss; formulas in sigmoid.h of either folder.
template <class Index>
struct SigmoidOf {
  Index B = 0, N = 0;
  double scale = 10, bias = -10;
  const void* r2 = nullptr;  // (N) acc: 1/|z2_j|, 0 for a zero vector
  const void* s_pos = nullptr;  // (B) acc: s of the positives from the embeddings; null: from the panel
  const int64_t* positives = nullptr;  // (B) or null: i
  const int64_t* query_ids = nullptr;  // (B) or null; instead of positives: the keys of the row's id
  const int64_t* key_ids = nullptr;  // (N) or null
  const void* coef = nullptr;  // (B) acc: dLoss/dL_i, or null: coef_all for every row
  double coef_all = 1;
  void* loss = nullptr;  // (B) acc
  void* dlogit = nullptr;  // (2, B) acc or null: of scale and bias

  template <class A>
  PYCSE_HD A coefficient(Index i) const {
    return coef ? static_cast<const A*>(coef)[i] : A(coef_all);
  }
};

struct Uniformity {
  double u = 0;  // 2 t / log 2
  const void* bias = nullptr;  // (N) acc
  void* sums = nullptr;  // (N) acc
};

}  // namespace pycse
