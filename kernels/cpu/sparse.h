// A linear layer under a mask: which kernel computes a pattern, and the mask laid over a dense weight.
//
//   y = x (W * M)^T + bias        dx = dy (W * M)        dW = (dy^T x) * M
#pragma once
#include "block_sparse.h"
#include "unstructured.h"

namespace pycse::PYCSE_ISA {

template <class Body>
void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::f32: return body(float());
    case DType::bf16: return body(bf16());
    case DType::f64: return body(double());
  }
}

// x is dy and y is dx where `transposed`.
inline void sparse_product(const SparsePattern& p, DType dtype, const void* x, int64_t ldx, const void* w, int64_t ldw,
                           const void* bias, void* y, int64_t n, bool transposed, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    auto run = [&](auto body) {
      body(p, static_cast<const T*>(x), ldx, static_cast<const T*>(w), ldw, static_cast<const T*>(bias),
           static_cast<T*>(y), n, transposed, threads);
    };
    switch (p.block) {
      case 1: return run(unstructured_product<T>);
      case 16: return run(block_product<16, T>);
      case 32: return run(block_product<32, T>);
      case 64: return run(block_product<64, T>);
    }
  });
}

inline void sparse_outer(const SparsePattern& p, DType dtype, const void* dy, int64_t ldy, const void* x, int64_t ldx,
                         void* dw, int64_t n, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    auto run = [&](auto body) {
      body(p, static_cast<const T*>(dy), ldy, static_cast<const T*>(x), ldx, static_cast<T*>(dw), n, threads);
    };
    switch (p.block) {
      case 1: return run(unstructured_outer<T>);
      case 16: return run(block_outer<16, T>);
      case 32: return run(block_outer<32, T>);
      case 64: return run(block_outer<64, T>);
    }
  });
}

// SparsePattern::packed of a pattern of single weights.
inline void sparse_pack(const SparsePattern& p, DType dtype, const void* w, int64_t ldw, void* packed, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    unstructured_pack<T>(p, static_cast<const T*>(w), ldw, static_cast<acc_t<T>*>(packed), threads);
  });
}

template <class T>
PYCSE_INLINE void mask_word(const T* w, uint32_t bits, int n, T* result) {
  for (int j = 0; j < n; ++j) result[j] = (bits >> j) & 1u ? w[j] : T{};
}

// result = W * M, contiguous, and 0 (not W * 0) outside the mask; result may be W. bits: (out, ceil(in / 32)).
inline void mask_weight(DType dtype, const void* w, int64_t ldw, const int32_t* bits, int64_t out, int64_t in,
                        void* result, int threads) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t words = (in + 31) / 32;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = 0; o < out; ++o) {
      const T* row = static_cast<const T*>(w) + o * ldw;
      T* to = static_cast<T*>(result) + o * in;
      for (int64_t k = 0; k < words; ++k) {
        const uint32_t word = uint32_t(bits[o * words + k]);
        if (k < in / 32) mask_word(row + k * 32, word, 32, to + k * 32);
        else mask_word(row + k * 32, word, int(in - k * 32), to + k * 32);
      }
    }
  });
}

}  // namespace pycse::PYCSE_ISA
