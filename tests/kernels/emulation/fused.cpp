// fused.h on the host: its machine by the PTX ISA.
#include <algorithm>
#include <functional>
#include <type_traits>
#include <vector>

#include "../../../kernels/cuda/fused.h"
#include "host.h"

namespace pycse::cuda {

// The copy engine: the box of `rows` x 64 elements at (column, row) to 128-byte rows, swizzled; zeros outside. `at`
// stands for the address in shared memory.
static void load_box(std::vector<bf16>& memory, uint32_t at, const Vectors& matrix, int rows, int row, int column) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < kTileK; ++c) {
      const bool inside = row + r < matrix.n && column + c < matrix.D;
      memory[swizzled(at + r * 128 + c * 2) / 2] =
          inside ? static_cast<const bf16*>(matrix.z)[(row + r) * matrix.ld + column + c] : bf16{0};
    }
}

// wgmma m64n256k16: element (row, k) of an operand where its descriptor says. The address advances within a row before
// the swizzle, which is of the address itself.
static float operand(const std::vector<bf16>& memory, uint64_t descriptor, int row, int k) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, eight_rows = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) throw std::logic_error("not the 128-byte swizzle");
  return load(memory[swizzled(start + row / 8 * eight_rows + row % 8 * 128 + k * 2) / 2]);
}

// Hopper as fused_block sees it. What is asynchronous happens as early as it may (fibers in ascending order: copies; in
// descending
// order: products and stores) or as late as it may: what is not waited for comes out wrong.
struct MemoryBarrier {
  int expected = 0, arrived = 0, bytes = 0, phase = 0;
  void arrive(int copied) {
    bytes -= copied;
    if (arrived < expected || bytes != 0) return;
    arrived = 0;
    ++phase;
  }
};
struct SharedBlock {
  static constexpr uint32_t kBase = 1024;  // its address
  std::vector<bf16> memory = std::vector<bf16>((kBase + kSharedBytes) / 2, bf16{0xffff});
  MemoryBarrier full[kSteps], empty[kSteps];
  Fibers::Barrier groups[2];
};
struct Cluster {
  std::vector<SharedBlock> blocks;
  Vectors a, b;
  const Panel& G;
  int N, first, stride;
  struct Copy {
    MemoryBarrier* barrier;
    std::function<void()> run;
  };
  std::vector<Copy> copies;  // on their way
};

class HostMachine {
  Cluster& cluster_;
  SharedBlock& block_;
  const bool late_copies_ = !ascending;
  struct Product {
    uint64_t a, b;
    int add;
  };
  std::vector<std::vector<Product>> products_{1};  // groups that are not yet waited for; the last is open
  std::vector<std::vector<std::function<void()>>> stores_{1};

  // A thread's part of D, by the PTX ISA's figure of the fragment.
  void multiply_now(float* acc, const Product& now) const {
    const int t = thread() % 128;
    float left[2][16];
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 16; ++k)
        left[half][k] = operand(block_.memory, now.a, 16 * (t / 32) + t % 32 / 4 + 8 * half, k);
    for (int n = 0; n < 128; n += n % 2 ? 3 : 1) {  // registers n and n + 2 are of one column
      const int column = n / 4 * 8 + 2 * (t % 4) + (n & 1);
      float sum[2] = {now.add ? acc[n] : 0, now.add ? acc[n + 2] : 0};
      for (int k = 0; k < 16; ++k) {
        const float right = operand(block_.memory, now.b, column, k);
        for (int half = 0; half < 2; ++half) sum[half] += left[half][k] * right;
      }
      acc[n] = sum[0], acc[n + 2] = sum[1];
    }
  }
  void copy(SharedBlock& to, MemoryBarrier* full, int at, const Vectors& matrix, int rows, int row, int column) {
    const auto run = [=, &to] {
      load_box(to.memory, SharedBlock::kBase + at, matrix, rows, row, column);
      full->arrive(rows * 128);
    };
    if (late_copies_) cluster_.copies.push_back({full, run});
    else run();
  }

 public:
  HostMachine(Cluster& cluster) : cluster_(cluster), block_(cluster.blocks[rank()]) {}

  int thread() const { return thread_index() % kThreads; }
  int rank() const { return thread_index() / kThreads; }
  int first() const { return cluster_.first; }
  int stride() const { return cluster_.stride; }
  char* memory() const { return reinterpret_cast<char*>(block_.memory.data()) + SharedBlock::kBase; }
  void prefetch(const float*) const {}
  void put(int at, uint32_t word) const { memcpy(memory() + at, &word, 4); }
  uint32_t address(int at) const { return SharedBlock::kBase + at; }
  void sync() const { Fibers::now().sync(); }
  void sync_group(int group) const { Fibers::now().wait(block_.groups[group], 128); }
  template <int> void give_registers() const {}
  template <int> void take_registers() const {}

  MemoryBarrier* full(int slot) const { return &block_.full[slot]; }
  MemoryBarrier* empty(int slot) const { return &block_.empty[slot]; }
  void init(MemoryBarrier* barrier, int arrivals) const { *barrier = {arrivals}; }
  void fence_init() const {}
  void wait(MemoryBarrier* barrier, uint32_t parity) {
    for (int turns = 0; uint32_t(barrier->phase & 1) == parity; ++turns) {
      if (turns > 10000) throw std::logic_error("a barrier's phase never ends");
      auto& copies = cluster_.copies;
      const auto mine =
          std::find_if(copies.begin(), copies.end(), [&](const auto& copy) { return copy.barrier == barrier; });
      if (mine != copies.end()) {
        const auto run = mine->run;
        copies.erase(mine);
        run();
      } else {
        Fibers::now().yield();
      }
    }
  }
  void arrive_expecting(MemoryBarrier* barrier, int bytes) const {
    ++barrier->arrived;
    barrier->arrive(-bytes);
  }
  void arrive_at(MemoryBarrier* barrier, int block) const {
    MemoryBarrier& there = cluster_.blocks[block].empty[barrier - block_.empty];
    if (++there.arrived > there.expected) throw std::logic_error("more arrivals than the barrier expects");
    there.arrive(0);
  }

  void load_a(int at, int column, int row, MemoryBarrier* barrier) {
    copy(block_, barrier, at, cluster_.a, kTileM, row, column);
  }
  void load_b(int at, int column, int row, MemoryBarrier* barrier) {
    for (SharedBlock& block : cluster_.blocks)
      copy(block, block.full + (barrier - block_.full), at, cluster_.b, kTileN / int(cluster_.blocks.size()), row,
           column);
  }
  void fence_stores() const {}
  void store_G(int at, int column, int row) {
    const auto run = [this, at, column, row] {
      const Panel& G = cluster_.G;
      for (int r = 0; r < kGroupRows && row + r < G.c; ++r)
        for (int n = 0; n < kChunk && column + n < cluster_.N; ++n)
          memcpy(static_cast<bf16*>(G.S) + (row + r) * G.ld + column + n, memory() + at + swizzled(r * 128 + n * 2), 2);
    };
    if (late_copies_) run();
    else stores_.back().push_back(run);
  }
  void commit_stores() { stores_.emplace_back(); }
  template <int Left> void wait_read() {
    for (; stores_.size() > Left + 1; stores_.erase(stores_.begin()))
      for (const auto& run : stores_.front()) run();
  }
  void wait_stored() { wait_read<0>(); }

  void multiply_fence() const {}
  void multiply(float (&acc)[128], uint64_t a, uint64_t b, int add) {
    if (late_copies_) return multiply_now(acc, {a, b, add});
    if (!add) std::fill_n(acc, 128, nan<float>());
    products_.back().push_back({a, b, add});
  }
  void multiply_commit() { products_.emplace_back(); }
  template <int Left> void multiply_wait(float (&acc)[128]) {
    for (; products_.size() > Left + 1; products_.erase(products_.begin()))
      for (const Product& now : products_.front()) multiply_now(acc, now);
    Fibers::now().sync_warp();  // .sync.aligned
  }
};

void fused(const Contrastive& p, Vectors z1hat, Vectors z2, const Panel& panel, void* partial, bool grad, int size,
           Queue) {
  const Fused q = {panel.c, panel.i0, z1hat.D, static_cast<float*>(partial)};
  const auto run = [&](auto size, auto grad, auto masked) {
    constexpr int kSize = decltype(size)::value;
    constexpr int kClusters = 2;
    for (int first = 0; first < kClusters; ++first) {
      Cluster cluster{std::vector<SharedBlock>(kSize), z1hat, z2, panel, p.N, first, kClusters, {}};
      Fibers().run(kSize * kThreads, ascending, [&] {
        HostMachine machine(cluster);
        fused_block<kSize, decltype(grad)::value, decltype(masked)::value>(machine, p, q);
      });
      if (!cluster.copies.empty()) throw std::logic_error("a block ends before its copies");
    }
    columns_of(panel.c, [&](auto slice, int k) { finish_row<decltype(grad)::value>(slice, p, panel, q.partial, k); });
  };
  fused_variant(p, grad, [&](auto grad, auto masked) {
    if (size == 2) run(std::integral_constant<int, 2>(), grad, masked);
    else run(std::integral_constant<int, 1>(), grad, masked);
  });
}

bool fused_runs(Queue) { return true; }

}  // namespace pycse::cuda
