// A tile of a matrix product by one thread block: C (M x N) = A (M x K) B (K x N), K in steps through shared memory.
//
//   each step    A's and B's tiles arrive by asynchronous 16-byte copies, kStages steps in flight
//   16-bit       tensor cores, mma.m16n8k16 with fp32 sums; operands by ldmatrix, transposed where K is not contiguous
//   fp32, fp64   fused multiply-adds, a patch of C for each thread
//
// The host runs the same code: phases thread by thread, matrix instructions for the 32 lanes at once by the layouts of
// the PTX manual, and copies only once they have been waited for.
#pragma once
#include "../common/storage.h"
#include "block.h"

#ifndef __CUDACC__
#include <deque>
#include <vector>
#endif

namespace pycse::cuda {

constexpr int kTileThreads = 128;
// 72 KB for the largest tiles: three blocks on a multiprocessor of sm_90, two on sm_80, one on sm_86 and sm_89.
constexpr int kStages = 3;

template <class T> constexpr int kDepth = 128 / int(sizeof(T));  // K of a step: rows of 128 bytes
template <class T> constexpr bool kMatrixUnits = sizeof(T) == 2;

// R x C elements in shared memory. The 16-byte chunks of a row are permuted so that 8 rows of one column of chunks,
// which ldmatrix and the fp32 loop read together, lie in different banks.
template <class T, int R, int C>
struct Layout {
  static constexpr int kChunks = C / kWidth<T>, kBytes = R * C * int(sizeof(T)), kCopies = R * kChunks / kTileThreads;
  static constexpr int kRowsOfAllBanks = kChunks < 8 ? 8 / kChunks : 1;  // 128 bytes
  static_assert(R * kChunks % kTileThreads == 0 && kTileThreads % kChunks == 0);
  PYCSE_HD static int at(int row, int chunk) {
    const int key = kChunks >= 8 ? row & 7 : row / kRowsOfAllBanks & (kChunks - 1);
    return row * C + (chunk ^ key) * kWidth<T>;
  }
};

// Where a chunk comes from: n elements at `at`, 0 behind them.
template <class T> struct From {
  const T* at;
  int n;
};

template <class T>
PYCSE_HD Words gather(const T* at, int n) {
  Words words = {{0, 0, 0, 0}};
  PYCSE_UNROLL
  for (int k = 0; k < kWidth<T>; ++k) {
    if (k >= n) continue;
    if constexpr (sizeof(T) == 2) {
      words.w[k / 2] |= uint32_t(bit_cast<uint16_t>(at[k])) << 16 * (k % 2);
    } else if constexpr (sizeof(T) == 4) {
      words.w[k] = bit_cast<uint32_t>(at[k]);
    } else {
      const uint64_t u = bit_cast<uint64_t>(at[k]);
      words.w[2 * k] = uint32_t(u), words.w[2 * k + 1] = uint32_t(u >> 32);
    }
  }
  return words;
}

// Elements whose bit is not set become 0, NaN too. Bit 0 is the first element's.
template <class T>
PYCSE_HD Words masked(Words words, uint32_t bits) {
  PYCSE_UNROLL
  for (int k = 0; k < 4; ++k) {
    if constexpr (sizeof(T) == 2) words.w[k] &= (bits >> 2 * k & 1) * 0xffffu | (bits >> (2 * k + 1) & 1) * 0xffff0000u;
    if constexpr (sizeof(T) == 4) words.w[k] &= 0u - (bits >> k & 1);
    if constexpr (sizeof(T) == 8) words.w[k] &= 0u - (bits >> k / 2 & 1);
  }
  return words;
}

#ifdef __CUDACC__

// What each thread has to itself.
template <class S> struct Own {
  S value;
  __device__ __forceinline__ S& operator[](int) { return value; }
};

struct DeviceTile {
  char* memory;  // shared

  template <class F> __device__ __forceinline__ void threads(F f) const { f(int(threadIdx.x)); }
  template <class F> __device__ __forceinline__ void warps(F f) const { f(int(threadIdx.x / 32)); }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  // All groups but the last `Left` are there, this thread's part of them. A chunk that is not Partial is whole or
  // empty.
  template <int Left> __device__ __forceinline__ void wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
  }
  template <bool Partial, class T> __device__ __forceinline__ void copy(T* to, From<T> from) const {
    const int bytes = Partial ? from.n * int(sizeof(T)) : from.n ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(unsigned(__cvta_generic_to_shared(to))),
                 "l"(from.at), "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ void copy_word(uint32_t* to, const uint32_t* from, bool valid) const {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(unsigned(__cvta_generic_to_shared(to))),
                 "l"(from), "r"(valid ? 4 : 0)
                 : "memory");
  }
};

// Four 8 x 8 matrices of 16-bit elements, and a lane's part of 16 x 8 sums.
struct Fragment { uint32_t r[4]; };
struct Sums { float c[4]; };

// at(lane) is the element at which a row of matrix lane / 8 begins, its row lane % 8.
template <bool Transposed, class T, class At>
__device__ __forceinline__ void load_fragment(Fragment& f, const T* tile, At at) {
  const unsigned from = unsigned(__cvta_generic_to_shared(tile + at(int(threadIdx.x % 32))));
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(f.r[0]), "=r"(f.r[1]), "=r"(f.r[2]), "=r"(f.r[3])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(f.r[0]), "=r"(f.r[1]), "=r"(f.r[2]), "=r"(f.r[3])
                 : "r"(from)
                 : "memory");
}

// c += a b, b in matrices 2 half and 2 half + 1 of a fragment.
template <class T>
__device__ __forceinline__ void multiply(Sums& s, const Fragment& a, const Fragment& b, int half) {
  float* c = s.c;
  if constexpr (std::is_same_v<T, bf16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[2 * half]), "r"(b.r[2 * half + 1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[2 * half]), "r"(b.r[2 * half + 1]));
}

// f(row, column, values): two neighbours of the 16 x 8 sums at a time.
template <class F>
__device__ __forceinline__ void each_pair(const Sums& s, F f) {
  const int lane = threadIdx.x % 32;
  f(lane / 4, lane % 4 * 2, s.c);
  f(lane / 4 + 8, lane % 4 * 2, s.c + 2);
}

#else

template <class S> struct Own {
  std::vector<S> values = std::vector<S>(kTileThreads);
  S& operator[](int thread) { return values[thread]; }
};

class HostTile {
  struct Copy {
    void* to;
    const void* from;
    size_t bytes, whole;
  };
  std::vector<Copy> open_;
  std::deque<std::vector<Copy>> groups_;
  std::vector<Words> storage_;

 public:
  char* memory;

  explicit HostTile(size_t bytes) : storage_(bytes / sizeof(Words)) {
    memory = reinterpret_cast<char*>(storage_.data());
    memset(memory, 0xff, bytes);  // NaN
  }
  template <class F> void threads(F f) const {
    for (int k = 0; k < kTileThreads; ++k) f(k);
  }
  template <class F> void warps(F f) const {
    for (int k = 0; k < kTileThreads / 32; ++k) f(k);
  }
  void sync() const {}
  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }
  template <int Left> void wait() {
    for (; groups_.size() > Left; groups_.pop_front())
      for (const Copy& copy : groups_.front()) {
        memset(copy.to, 0, copy.whole);
        memcpy(copy.to, copy.from, copy.bytes);
      }
  }
  template <bool Partial, class T> void copy(T* to, From<T> from) {
    if (!aligned(to) || !aligned(from.at)) throw std::logic_error("misaligned 16-byte copy");
    if (!Partial && from.n % kWidth<T>) throw std::logic_error("a part of a chunk");
    open_.push_back({to, from.at, from.n * sizeof(T), 16});
  }
  void copy_word(uint32_t* to, const uint32_t* from, bool valid) { open_.push_back({to, from, valid ? 4u : 0u, 4}); }
};

struct Fragment { uint32_t r[32][4]; };
struct Sums { float c[32][4]; };

template <bool Transposed, class T, class At>
void load_fragment(Fragment& f, const T* tile, At at) {
  const T* rows[32];
  for (int lane = 0; lane < 32; ++lane) {
    rows[lane] = tile + at(lane);
    if (!aligned(rows[lane])) throw std::logic_error("misaligned row of a matrix");
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int k = 0; k < 4; ++k) {
      const int i = lane / 4, j = lane % 4 * 2;
      const T low = Transposed ? rows[8 * k + j][i] : rows[8 * k + i][j];
      const T high = Transposed ? rows[8 * k + j + 1][i] : rows[8 * k + i][j + 1];
      f.r[lane][k] = uint32_t(high.bits) << 16 | low.bits;
    }
}

template <class T>
void multiply(Sums& s, const Fragment& a, const Fragment& b, int half) {
  const auto element = [](uint32_t word, int k) { return load(T{uint16_t(word >> 16 * (k % 2))}); };
  for (int lane = 0; lane < 32; ++lane)
    for (int x = 0; x < 4; ++x) {
      const int i = lane / 4 + x / 2 * 8, j = lane % 4 * 2 + x % 2;
      for (int k = 0; k < 16; ++k) {
        const uint32_t left = a.r[i % 8 * 4 + k % 8 / 2][i / 8 + k / 8 * 2];
        const uint32_t right = b.r[j * 4 + k % 8 / 2][2 * half + k / 8];
        s.c[lane][x] += element(left, k) * element(right, k);
      }
    }
}

template <class F>
void each_pair(const Sums& s, F f) {
  for (int lane = 0; lane < 32; ++lane) {
    f(lane / 4, lane % 4 * 2, s.c[lane]);
    f(lane / 4 + 8, lane % 4 * 2, s.c[lane] + 2);
  }
}

#endif

// The sums C of a block. A stands in shared memory as M x K where AK, else as K x M; B as N x K where BK, else as K x
// N.
template <class T, int M, int N, bool AK, bool BK, bool = kMatrixUnits<T>>
class Product;

template <class T, int M, int N, bool AK, bool BK>
class Product<T, M, N, AK, BK, true> {
  static constexpr int kAcross = M < 64 ? 4 : N < 128 ? 1 : 2, kDown = 4 / kAcross;  // warps
  static constexpr int kRows = M / kDown / 16, kPairs = N / kAcross / 16;  // of 16 x 16 in a warp's part
  struct Part { Sums s[kRows][2 * kPairs]; };
#ifdef __CUDACC__
  Own<Part> part_;
#else
  std::vector<Part> part_ = std::vector<Part>(kTileThreads / 32);
#endif

 public:
  using LayoutA = Layout<T, AK ? M : kDepth<T>, AK ? kDepth<T> : M>;
  using LayoutB = Layout<T, BK ? N : kDepth<T>, BK ? kDepth<T> : N>;

  template <class Block> PYCSE_BODY void clear(Block& block) {
    block.warps([&](int warp) { part_[warp] = {}; });
  }

  template <class Block> PYCSE_BODY void step(Block& block, const T* a, const T* b) {
    block.warps([&](int warp) {
      const int m0 = warp / kAcross * (M / kDown), n0 = warp % kAcross * (N / kAcross);
      PYCSE_UNROLL
      for (int k0 = 0; k0 < kDepth<T>; k0 += 16) {
        Fragment left[kRows];
        PYCSE_UNROLL
        for (int i = 0; i < kRows; ++i)
          load_fragment<!AK>(left[i], a, [&](int lane) {
            const int m = m0 + 16 * i;
            return AK ? LayoutA::at(m + lane % 16, k0 / 8 + lane / 16)
                      : LayoutA::at(k0 + lane % 8 + lane / 16 * 8, m / 8 + lane / 8 % 2);
          });
        PYCSE_UNROLL
        for (int j = 0; j < kPairs; ++j) {
          Fragment right;
          load_fragment<!BK>(right, b, [&](int lane) {
            const int n = n0 + 16 * j;
            return BK ? LayoutB::at(n + lane % 8 + lane / 16 * 8, k0 / 8 + lane / 8 % 2)
                      : LayoutB::at(k0 + lane % 16, n / 8 + lane / 16);
          });
          PYCSE_UNROLL
          for (int i = 0; i < kRows; ++i) {
            multiply<T>(part_[warp].s[i][2 * j], left[i], right, 0);
            multiply<T>(part_[warp].s[i][2 * j + 1], left[i], right, 1);
          }
        }
      }
    });
  }

  // f(m, n, values, Count<2>): C at (m, n) and (m, n + 1), n even.
  template <class Block, class F> PYCSE_BODY void each(Block& block, F f) {
    block.warps([&](int warp) {
      const int m0 = warp / kAcross * (M / kDown), n0 = warp % kAcross * (N / kAcross);
      PYCSE_UNROLL
      for (int i = 0; i < kRows; ++i) {
        PYCSE_UNROLL
        for (int j = 0; j < 2 * kPairs; ++j)
          each_pair(part_[warp].s[i][j],
                    [&](int m, int n, const float* c) { f(m0 + 16 * i + m, n0 + 8 * j + n, c, Count<2>()); });
      }
    });
  }
};

template <class T, int M, int N, bool AK, bool BK>
class Product<T, M, N, AK, BK, false> {
  static constexpr int V = kWidth<T>, kEach = M * N / kTileThreads;  // of C, a thread
  static constexpr int kColumns = kEach >= 64 ? 8 : kEach >= 16 ? 4 : 2, kRows = kEach / kColumns;
  static constexpr int kAcross = N / kColumns, kDown = M / kRows;  // threads
  static_assert(kAcross * kDown == kTileThreads && kColumns % V == 0 && kRows % V == 0);
  struct Part { T c[kRows][kColumns]; };
  Own<Part> part_;

  // The k-th of a thread's rows or columns: where K is contiguous they lie `threads` apart, else in groups of V.
  template <bool KContiguous>
  PYCSE_BODY static int index(int own, int threads, int k) {
    return KContiguous ? own + k * threads : (k / V * threads + own) * V + k % V;
  }

  // V steps along K of a thread's rows or columns.
  template <bool KContiguous, int Count, class Where>
  PYCSE_BODY static void fetch(const T* tile, int own, int threads, int k0, T (&x)[Count][V]) {
    T v[V];
    if constexpr (KContiguous) {
      PYCSE_UNROLL
      for (int i = 0; i < Count; ++i) unpack(read_words(tile + Where::at(own + i * threads, k0 / V)), tile, x[i]);
    } else {
      PYCSE_UNROLL
      for (int k = 0; k < V; ++k) {
        PYCSE_UNROLL
        for (int i = 0; i < Count / V; ++i) {
          unpack(read_words(tile + Where::at(k0 + k, i * threads + own)), tile, v);
          PYCSE_UNROLL
          for (int y = 0; y < V; ++y) x[i * V + y][k] = v[y];
        }
      }
    }
  }

 public:
  using LayoutA = Layout<T, AK ? M : kDepth<T>, AK ? kDepth<T> : M>;
  using LayoutB = Layout<T, BK ? N : kDepth<T>, BK ? kDepth<T> : N>;

  template <class Block> PYCSE_BODY void clear(Block& block) {
    block.threads([&](int thread) { part_[thread] = {}; });
  }

  template <class Block> PYCSE_BODY void step(Block& block, const T* a, const T* b) {
    block.threads([&](int thread) {
      auto& c = part_[thread].c;
      const int down = thread / kAcross, across = thread % kAcross;
      PYCSE_ROLL
      for (int k0 = 0; k0 < kDepth<T>; k0 += V) {
        T left[kRows][V], right[kColumns][V];
        fetch<AK, kRows, LayoutA>(a, down, kDown, k0, left);
        fetch<BK, kColumns, LayoutB>(b, across, kAcross, k0, right);
        PYCSE_UNROLL
        for (int k = 0; k < V; ++k) {
          PYCSE_UNROLL
          for (int i = 0; i < kRows; ++i) {
            PYCSE_UNROLL
            for (int j = 0; j < kColumns; ++j) c[i][j] += left[i][k] * right[j][k];
          }
        }
      }
    });
  }

  // f(m, n, value, Count<1>)
  template <class Block, class F> PYCSE_BODY void each(Block& block, F f) {
    block.threads([&](int thread) {
      const int down = thread / kAcross, across = thread % kAcross;
      PYCSE_UNROLL
      for (int i = 0; i < kRows; ++i) {
        PYCSE_UNROLL
        for (int j = 0; j < kColumns; ++j)
          f(index<AK>(down, kDown, i), index<BK>(across, kAcross, j), &part_[thread].c[i][j], Count<1>());
      }
    });
  }
};

struct NoBits {};

// Copies a tile: source(column)(row) says where the chunk at (row, column) comes from. A thread keeps its column.
template <class Where, bool Partial, class T, class Block, class Source>
PYCSE_BODY void stage(Block& block, int thread, T* tile, bool wide, Source source) {
  constexpr int kApart = kTileThreads / Where::kChunks;
  const int chunk = thread % Where::kChunks, first = thread / Where::kChunks;
  const auto row_of = source(chunk * kWidth<T>);
  if (wide) {
    PYCSE_UNROLL
    for (int k = 0; k < Where::kCopies; ++k) {
      const int row = first + k * kApart;
      block.template copy<Partial>(tile + Where::at(row, chunk), row_of(row));
    }
  } else {
    PYCSE_ROLL
    for (int k = 0; k < Where::kCopies; ++k) {
      const int row = first + k * kApart;
      const From<T> from = row_of(row);
      write_words(tile + Where::at(row, chunk), gather(from.at, from.n));
    }
  }
}

// The bit of the first of a chunk's elements: bit `shift` of the word at `at`, or none where at is null.
struct ChunkBits {
  const uint32_t* at;
  int shift;
};

template <class P, class T, bool Masked>
constexpr int kStageBytes =
    P::LayoutA::kBytes + P::LayoutB::kBytes + (Masked ? P::LayoutB::kCopies * kTileThreads * 4 : 0);

// C = sum over the steps. a(step), b(step): sources as above. bits(step)(column)(row): the mask of B's chunk there.
template <class T, bool Partial, class P, class Block, class A, class B, class Mask>
PYCSE_BODY void product(Block& block, P& sums, int steps, bool wide_a, bool wide_b, A a, B b, Mask bits) {
  constexpr bool kMasked = !std::is_same_v<Mask, NoBits>;
  constexpr int kStage = kStageBytes<P, T, kMasked>;
  using LayoutB = typename P::LayoutB;
  const auto tile_a = [&](int step) { return reinterpret_cast<T*>(block.memory + step % kStages * kStage); };
  const auto tile_b = [&](int step) {
    return reinterpret_cast<T*>(block.memory + step % kStages * kStage + P::LayoutA::kBytes);
  };
  const auto words = [&](int step) {  // one for each chunk of B that a thread copies
    return reinterpret_cast<uint32_t*>(block.memory + step % kStages * kStage + P::LayoutA::kBytes + LayoutB::kBytes);
  };
  const auto row_of = [](int thread, int k) {
    return thread / LayoutB::kChunks + k * (kTileThreads / LayoutB::kChunks);
  };

  const auto request = [&](int step) {
    if (step < steps)
      block.threads([&](int thread) {
        stage<typename P::LayoutA, Partial>(block, thread, tile_a(step), wide_a, a(step));
        stage<LayoutB, Partial>(block, thread, tile_b(step), wide_b, b(step));
        if constexpr (kMasked) {
          const auto mask = bits(step)(thread % LayoutB::kChunks * kWidth<T>);
          PYCSE_UNROLL
          for (int k = 0; k < LayoutB::kCopies; ++k) {
            const ChunkBits at = mask(row_of(thread, k));
            block.copy_word(words(step) + k * kTileThreads + thread, at.at, at.shift >= 0);
          }
        }
      });
    block.commit();  // an empty group counts too
  };

  sums.clear(block);
  for (int step = 0; step < kStages - 1; ++step) request(step);
  for (int step = 0; step < steps; ++step) {
    block.template wait<kStages - 2>();
    if constexpr (kMasked)
      block.threads([&](int thread) {  // what this thread copied itself, before the others see it
        const int chunk = thread % LayoutB::kChunks;
        const auto mask = bits(step)(chunk * kWidth<T>);
        PYCSE_UNROLL
        for (int k = 0; k < LayoutB::kCopies; ++k) {
          T* at = tile_b(step) + LayoutB::at(row_of(thread, k), chunk);
          const int shift = mask(row_of(thread, k)).shift;
          write_words(at, masked<T>(read_words(at), words(step)[k * kTileThreads + thread] >> (shift & 31)));
        }
      });
    block.sync();
    request(step + kStages - 1);  // into the tile of the step before, which all have left
    sums.step(block, tile_a(step), tile_b(step));
  }
  block.template wait<0>();
  block.sync();
}

// Rounds C to O in shared memory, then stores whole chunks: plus(n) is added to column n, and target(n)(m) says where
// the chunk at (m, n) goes, how many elements of it, and (with Masked) which of them by bits.
template <class O> struct To {
  O* at;
  int n;
  uint32_t bits;
};

template <class O, int M, int N, bool Masked, class P, class Block, class Plus, class Target>
PYCSE_BODY void finish(Block& block, P& sums, bool wide, Plus plus, Target target) {
  using Where = Layout<O, M, N>;
  constexpr int V = kWidth<O>;
  O* tile = reinterpret_cast<O*>(block.memory);
  sums.each(block, [&](int m, int n, const acc_t<O>* c, auto count) {
    O* at = tile + Where::at(m, n / V) + n % V;
    if constexpr (decltype(count)::value == 2) {
      const acc_t<O> x = c[0] + plus(n), y = c[1] + plus(n + 1);
      if constexpr (std::is_same_v<O, bf16>) *reinterpret_cast<uint32_t*>(at) = pack_bf16(x, y);
      else if constexpr (std::is_same_v<O, f16>) *reinterpret_cast<uint32_t*>(at) = pack_f16(x, y);
      else at[0] = x, at[1] = y;
    } else {
      store(at[0], c[0] + plus(n));
    }
  });
  block.sync();
  block.threads([&](int thread) {
    const int chunk = thread % Where::kChunks;
    const auto row_of = target(chunk * V);
    for (int k = 0; k < Where::kCopies; ++k) {
      const int row = thread / Where::kChunks + k * (kTileThreads / Where::kChunks);
      const To<O> to = row_of(row);
      O* from = tile + Where::at(row, chunk);
      if constexpr (Masked) write_words(from, masked<O>(read_words(from), to.bits));
      if (wide && to.n >= V) {
        write_words(to.at, read_words(from));
      } else {
        for (int x = 0; x < to.n && x < V; ++x) to.at[x] = from[x];
      }
    }
  });
}

template <class P, class T, bool Masked, class O, int M, int N>
constexpr int kTileBytes = kStages * kStageBytes<P, T, Masked> > M * N * int(sizeof(O))
                               ? kStages * kStageBytes<P, T, Masked>
                               : M * N * int(sizeof(O));

}  // namespace pycse::cuda
