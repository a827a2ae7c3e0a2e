// What the bindings refuse. Addresses and sizes come as numbers, so a mistake in Python would be a read or write
// anywhere; a few compares find those that show, and ValueError names the argument. Not found: an address that is
// wrong, a buffer that is shorter than its sizes say, an index out of range.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#include "groups.h"

namespace pycse {

using Address = std::uintptr_t;  // a tensor's data_ptr(), 0 for none

constexpr int64_t kMostNumbers = int64_t(1) << 56;  // of a matrix: its bytes can be counted
constexpr int kMostThreads = 4096;

[[noreturn]] inline void refuse(const char* name, const std::string& must, int64_t got) {
  throw std::invalid_argument(std::string(name) + " must " + must + ", got " + std::to_string(got));
}
inline void at_least(const char* name, int64_t x, int64_t least) {
  if (x < least) refuse(name, "be at least " + std::to_string(least), x);
}
inline void in_range(const char* name, int64_t x, int64_t least, int64_t most) {
  if (x < least || x > most) refuse(name, "lie between " + std::to_string(least) + " and " + std::to_string(most), x);
}
inline void threads_of(int threads) { in_range("threads", threads, 1, kMostThreads); }

// a b numbers; both are sizes.
inline int64_t numbers(const char* name, int64_t a, int64_t b) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product) || product > kMostNumbers)
    refuse(name, "give a matrix that fits into memory", a);
  return product;
}

// An array that has to be there unless it is empty.
inline void needed(const char* name, const void* x, int64_t size = 1) {
  if (x == nullptr && size > 0) refuse(name, "not be null", 0);
}
inline void needed(const char* name, Address x, int64_t size = 1) {
  needed(name, reinterpret_cast<const void*>(x), size);
}

// n rows of D numbers, ld apart. Rows that are read may repeat (an expanded tensor); those that are written may not
// overlap.
inline void matrix(const char* name, Address x, int64_t n, int64_t D, int64_t ld, bool written) {
  if (n < 0 || D < 0) refuse(name, "have sizes of at least 0", n < 0 ? n : D);
  needed(name, x, n > 0 && D > 0);
  if (n <= 1) return void(numbers(name, n, D));
  if (const int64_t least = written ? D : 0; ld < least)
    refuse(name, "have rows at least " + std::to_string(least) + " apart", ld);
  numbers(name, n, ld > D ? ld : D);
}

// Rows [i0, i0 + c) among B; c by its name.
inline void rows_among(int64_t i0, const char* name, int64_t c, int64_t B) {
  in_range(name, c, 0, B);
  in_range("i0", i0, 0, B - c);
}

// What both kinds of problem (cpu/contrastive.h, cuda/contrastive.h) ask of their sizes.
template <class Contrastive>
void check_contrastive(const Contrastive& p) {
  at_least("B", p.B, 0);
  at_least("N", p.N, 0);
  numbers("B", p.B, p.N);
  if (!p.positives && p.N < p.B) refuse("N", "be at least B where positives are not given", p.N);
  if (!p.query_ids != !p.key_ids) throw std::invalid_argument("query_ids and key_ids must be given together");
}
template <class Sigmoid>
void check_sigmoid(const Sigmoid& p) {
  at_least("B", p.B, 0);
  at_least("N", p.N, 0);
  numbers("B", p.B, p.N);
  if (!p.query_ids != !p.key_ids) throw std::invalid_argument("query_ids and key_ids must be given together");
  if (p.query_ids && p.positives) throw std::invalid_argument("query_ids and positives exclude each other");
  if (!p.positives && !p.query_ids && p.N < p.B)
    refuse("N", "be at least B where neither positives nor ids are given", p.N);
  needed("r2", p.r2, p.N), needed("loss", p.loss, p.B);
}
// InfoNCE's problem and an angle m.
template <class Contrastive>
void check_adapacse(const Contrastive& p, double m) {
  if (!(m >= 0 && m <= 1.5707963267948966))
    throw std::invalid_argument("m must lie between 0 and pi/2, got " + std::to_string(m));
  if (p.exclude.given || p.guide.given) throw std::invalid_argument("p must have no bounds of similarities");
  needed("r2", p.r2, p.N), needed("loss", p.loss, p.B);
}
template <class Contrastive>
void check_rows(const Contrastive& p) {
  needed("r2", p.r2, p.N);
}
template <class Contrastive>
void check_columns(const Contrastive& p) {
  needed("r2", p.r2, p.N);
  if (p.N != p.B) refuse("N", "be B in a symmetric loss", p.N);
  if (p.exclude.given) needed("s_pos", p.s_pos, p.B);
  needed("column_max", p.column_max, p.N), needed("column_sum", p.column_sum, p.N);
}
template <class Contrastive>
void check_symmetric(const Contrastive& p) {
  check_columns(p);
  needed("lpos", p.lpos, p.B), needed("lneg", p.lneg, p.B);
  needed("lneg_column", p.lneg_column, p.N), needed("lse_column", p.lse_column, p.N);
}

// Groups as groups.h counts them: fewer than 2^60 of them, and more than none.
inline void check_grouping(const Grouping& cut) {
  in_range("grouping", int(cut.kind), 0, 3);
  in_range("group_end", cut.end, 0, INT32_MAX);
  if (cut.kind == GroupKind::none) return;
  const double least = cut.kind == GroupKind::mass ? 0x1p-60 : cut.kind == GroupKind::size ? 1 : 0;
  const double most = cut.kind == GroupKind::mass ? 1 : cut.kind == GroupKind::size ? HUGE_VAL : double(cut.end);
  if (!(cut.value >= least && cut.value <= most))
    throw std::invalid_argument("group_value must lie between " + std::to_string(least) + " and " +
                                std::to_string(most) + ", got " + std::to_string(cut.value));
}
template <class Distill>
void check_distill(const Distill& d) {
  in_range("B", d.B, 0, INT32_MAX);  // columns are counted in 32 bits
  in_range("divergence", int(d.divergence), 0, 2);
  check_grouping(d.cut);
  needed("loss", d.loss, d.B);
}

// The gradient's type beside that of the embeddings (project): its own, or for bf16 (1) also float (0).
inline void check_gradient_type(int dtype, int g_dtype) {
  if (g_dtype != dtype && (dtype != 1 || g_dtype != 0))
    refuse("g_dtype", "fit dtype " + std::to_string(dtype), g_dtype);
}

}  // namespace pycse
