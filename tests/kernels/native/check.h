// What the native checks share: memory that ends where its last number ends, numbers, comparisons. A check calls
// kernels through their table as the backends do, and compares with plain loops in double precision.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../../../kernels/cpu/kernels.h"
#include "../../../kernels/common/storage.h"

namespace checks {

using pycse::bf16;
using pycse::DType;

template <class T>
constexpr DType kType = std::is_same_v<T, double> ? DType::f64
                        : std::is_same_v<T, bf16> ? DType::bf16
                                                  : DType::f32;
template <class T>
using acc = pycse::acc_t<T>;
// Of the largest number of a result: some hundred roundings; of bf16 a few.
template <class T>
constexpr double kBand = std::is_same_v<T, double> ? 1e-11
                         : std::is_same_v<T, bf16> ? 2e-2
                                                   : 3e-5;

// A matrix whose memory ends with its last row, and whose rows have `gap` numbers between them. All bytes are 0xff at
// first: NaN to whoever reads what nobody wrote.
template <class T>
struct Matrix {
  int64_t rows, columns, ld;
  T* at;
  Matrix(int64_t n, int64_t m, int64_t gap = 0)
      : rows(n), columns(m), ld(m + gap), at(static_cast<T*>(std::malloc(bytes()))) {
    if (!at) std::abort();
    std::memset(static_cast<void*>(at), 0xff, bytes());
  }
  Matrix(const Matrix&) = delete;
  ~Matrix() { std::free(at); }
  int64_t size() const { return rows > 0 && columns > 0 ? (rows - 1) * ld + columns : 0; }
  int64_t bytes() const { return size() * int64_t(sizeof(T)); }
  T& operator()(int64_t i, int64_t j = 0) { return at[i * ld + j]; }
  const T& operator()(int64_t i, int64_t j = 0) const { return at[i * ld + j]; }
  double value(int64_t i, int64_t j = 0) const { return pycse::load((*this)(i, j)); }
  void set(const std::function<double(int64_t, int64_t)>& f) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) pycse::store((*this)(i, j), acc<T>(f(i, j)));
  }
  // Nothing was written between the rows.
  bool gaps_untouched() const {
    const auto* byte = reinterpret_cast<const unsigned char*>(at);
    for (int64_t i = 0; i + 1 < rows; ++i)
      for (size_t k = (i * ld + columns) * sizeof(T); k < (i + 1) * ld * sizeof(T); ++k)
        if (byte[k] != 0xff) return false;
    return true;
  }
};
template <>
inline double Matrix<int64_t>::value(int64_t i, int64_t j) const {
  return double((*this)(i, j));
}

// xorshift64*, and from it numbers that look normal.
struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15u + 1) {
    for (int k = 0; k < 8; ++k) next();
  }
  uint64_t next() {
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return state * 0x2545F4914F6CDD1Du;
  }
  double uniform() { return double(next() >> 11) * 0x1p-53; }
  double normal() {
    double sum = -6;
    for (int k = 0; k < 12; ++k) sum += uniform();
    return sum;
  }
  int64_t below(int64_t n) { return int64_t(next() % uint64_t(n)); }
};

inline int failures = 0, comparisons = 0;
inline std::string now;  // the check that runs

inline void expect(bool ok, const char* what) {
  ++comparisons;
  if (ok) return;
  ++failures;
  std::printf("FAILED %s: %s\n", now.c_str(), what);
}

// |got - want| <= band max |want| everywhere, at least `floor` of it; a NaN only where one is wanted.
template <class T>
void close(const char* what, const Matrix<T>& got, const std::function<double(int64_t, int64_t)>& want, double band,
           double floor = 0) {
  double largest = floor, worst = 0;
  for (int64_t i = 0; i < got.rows; ++i)
    for (int64_t j = 0; j < got.columns; ++j) {
      const double x = want(i, j), y = got.value(i, j);
      largest = std::max(largest, std::fabs(x));
      const double error = std::isnan(x) && std::isnan(y) ? 0 : std::fabs(x - y);
      worst = std::isnan(error) || error > worst ? error : worst;
    }
  expect(worst <= band * largest, what);
  if (!(worst <= band * largest)) std::printf("  off by %g of %g, %g allowed\n", worst, largest, band * largest);
  expect(got.gaps_untouched(), what);
}

using Kernels = pycse::Kernels;
void contrastive(const Kernels&);
void small(const Kernels&);
void distill(const Kernels&);
void sparse(const Kernels&);
void sigmoid(const Kernels&);
void supervised(const Kernels&);
void guide(const Kernels&);
void adapacse(const Kernels&);
void prefixes(const Kernels&);
constexpr int kThreads = 3;  // odd: shares of rows are ragged

}  // namespace checks
