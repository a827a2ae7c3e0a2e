// Storage types and 16-byte accesses, for host and device. Values are float or double ("acc") between load and store.
#pragma once
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "target.h"

namespace pycse {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };  // IEEE half precision

template <class T> struct Acc { using type = T; };
template <> struct Acc<bf16> { using type = float; };
template <> struct Acc<f16> { using type = float; };
template <class T> using acc_t = typename Acc<T>::type;

template <class To, class From>
PYCSE_HD To bit_cast(From x) {
  To y;
  static_assert(sizeof x == sizeof y);
  memcpy(&y, &x, sizeof y);
  return y;
}

PYCSE_HD float load(float x) { return x; }
PYCSE_HD double load(double x) { return x; }
PYCSE_HD float load(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

PYCSE_HD uint32_t round_bf16(float x) {  // to nearest even; NaN stays NaN
  const uint32_t u = bit_cast<uint32_t>(x);
  return x != x ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
}

// Two floats as bfloat16 in one word, the first in the low half.
PYCSE_HD uint32_t pack_bf16(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return round_bf16(high) << 16 | round_bf16(low);
#endif
}

PYCSE_HD float load(f16 x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  const float y = float(rest & 0x3ffu) + (rest >= 0x400u ? 1024.0f : 0.0f);  // exact, in units of the last place
  const uint32_t exponent = rest >> 10 ? rest >> 10 : 1;
  return bit_cast<float>(sign | bit_cast<uint32_t>(y * bit_cast<float>((exponent + 102) << 23)));
#endif
}

// Two floats as half precision in one word, the first in the low half; to nearest even, beyond 65504 infinity.
PYCSE_HD uint32_t pack_f16(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  const auto half = [](float x) -> uint32_t {
    const uint32_t u = bit_cast<uint32_t>(x), sign = u >> 16 & 0x8000u, size = u & 0x7fffffffu;
    if (size > 0x7f800000u) return 0x7fffu;
    if (size >= 0x477ff000u) return sign | 0x7c00u;
    if (size >= 0x38800000u) return sign | (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
    // Denormal: adding 1/2 leaves the result in the last bits, rounded.
    return sign | (bit_cast<uint32_t>(bit_cast<float>(size) + 0.5f) - 0x3f000000u);
  };
  return half(high) << 16 | half(low);
#endif
}

PYCSE_HD void store(float& out, float x) { out = x; }
PYCSE_HD void store(double& out, double x) { out = x; }
PYCSE_HD void store(bf16& out, float x) { out.bits = uint16_t(pack_bf16(x, 0.0f)); }
PYCSE_HD void store(f16& out, float x) { out.bits = uint16_t(pack_f16(x, 0.0f)); }

constexpr int kAccess = 16;  // bytes: the widest access of one thread
template <class T> constexpr int kWidth = kAccess / int(sizeof(T));

PYCSE_HD bool aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % kAccess == 0; }

struct Words { uint32_t w[4]; };

// 16 bytes from or to an aligned address. Elsewhere a GPU faults, and the host throws, so that tests see it.
PYCSE_HD Words read_words(const void* at) {
#ifdef __CUDA_ARCH__
  const uint4 v = *static_cast<const uint4*>(at);
  return {{v.x, v.y, v.z, v.w}};
#else
  if (!aligned(at)) throw std::logic_error("misaligned 16-byte read");
  Words words;
  memcpy(&words, at, sizeof words);
  return words;
#endif
}

PYCSE_HD void write_words(void* at, const Words& words) {
#ifdef __CUDA_ARCH__
  *static_cast<uint4*>(at) = make_uint4(words.w[0], words.w[1], words.w[2], words.w[3]);
#else
  if (!aligned(at)) throw std::logic_error("misaligned 16-byte write");
  memcpy(at, &words, sizeof words);
#endif
}

PYCSE_HD void unpack(const Words& words, const bf16*, float* x) {
  for (int k = 0; k < 4; ++k) {
    x[2 * k] = bit_cast<float>(words.w[k] << 16);
    x[2 * k + 1] = bit_cast<float>(words.w[k] & 0xffff0000u);
  }
}
PYCSE_HD void unpack(const Words& words, const float*, float* x) {
  for (int k = 0; k < 4; ++k) x[k] = bit_cast<float>(words.w[k]);
}
PYCSE_HD void unpack(const Words& words, const double*, double* x) {
  for (int k = 0; k < 2; ++k) x[k] = bit_cast<double>(uint64_t(words.w[2 * k + 1]) << 32 | words.w[2 * k]);
}

PYCSE_HD Words packed(const bf16*, const float* x) {
  return {{pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7])}};
}
PYCSE_HD Words packed(const float*, const float* x) {
  return {{bit_cast<uint32_t>(x[0]), bit_cast<uint32_t>(x[1]), bit_cast<uint32_t>(x[2]), bit_cast<uint32_t>(x[3])}};
}
PYCSE_HD Words packed(const double*, const double* x) {
  const uint64_t a = bit_cast<uint64_t>(x[0]), b = bit_cast<uint64_t>(x[1]);
  return {{uint32_t(a), uint32_t(a >> 32), uint32_t(b), uint32_t(b >> 32)}};
}

// W elements at `at`: 16 bytes at a time where `wide` promises their alignment.
template <int W, class T>
PYCSE_HD void read(const T* at, bool wide, acc_t<T>* x) {
  if constexpr (W % kWidth<T> == 0) {
    if (wide) {
      for (int k = 0; k < W; k += kWidth<T>) unpack(read_words(at + k), at, x + k);
      return;
    }
  }
  for (int k = 0; k < W; ++k) x[k] = load(at[k]);
}

template <int W, class T>
PYCSE_HD void write(T* at, bool wide, const acc_t<T>* x) {
  if constexpr (W % kWidth<T> == 0) {
    if (wide) {
      for (int k = 0; k < W; k += kWidth<T>) write_words(at + k, packed(at, x + k));
      return;
    }
  }
  for (int k = 0; k < W; ++k) store(at[k], x[k]);
}

}  // namespace pycse
