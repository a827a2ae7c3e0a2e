// OpenMP as ThreadSanitizer can follow it: what GCC calls for a parallel region, its barriers and its dynamic loops,
// made of std::thread. The kernels are compiled as always and linked with this file in libgomp's place, whose barriers
// and locks ThreadSanitizer cannot see. Nothing here orders threads that OpenMP would not order: loops count with
// relaxed atomics.
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr int kLoops = 4096;  // dynamic loops of a region

struct Team {
  const int size;
  std::mutex lock;
  std::condition_variable all_here;
  int arrived = 0;
  long phase = 0;
  std::unique_ptr<std::atomic<long>[]> taken{new std::atomic<long>[kLoops]()};  // iterations given out, of each loop
  explicit Team(int n) : size(n) {}

  void barrier() {
    std::unique_lock<std::mutex> held(lock);
    if (++arrived == size) {
      arrived = 0, ++phase;
      all_here.notify_all();
      return;
    }
    all_here.wait(held, [this, mine = phase] { return phase != mine; });
  }
};

struct Thread {
  Team* team = nullptr;
  int index = 0, loops = 0;
  long start = 0, end = 0, step = 1, chunk = 1;
};
thread_local Thread self;

bool next(long* from, long* to) {
  const long begin = self.team->taken[self.loops - 1].fetch_add(self.chunk, std::memory_order_relaxed);
  const long count = (self.end - self.start + self.step - 1) / self.step;
  if (begin >= count) return false;
  *from = self.start + begin * self.step;
  *to = self.start + (begin + self.chunk < count ? begin + self.chunk : count) * self.step;
  return true;
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return self.index; }
int omp_get_num_threads() { return self.team ? self.team->size : 1; }

// Every third team is smaller than what was asked for, as OpenMP may make it.
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  static int regions = 0;
  Team team(threads > 1 && ++regions % 3 == 0 ? int(threads) - 1 : int(threads));
  const auto run = [&](int index) {
    self = Thread{&team, index};
    body(data);
    self = Thread{};
  };
  std::vector<std::thread> others;
  for (int k = 1; k < team.size; ++k) others.emplace_back(run, k);
  run(0);
  for (std::thread& other : others) other.join();
}

void GOMP_barrier() { self.team->barrier(); }

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* from, long* to) {
  if (++self.loops > kLoops || step <= 0) std::abort();
  self.start = start, self.end = end, self.step = step, self.chunk = chunk;
  return next(from, to);
}
bool GOMP_loop_nonmonotonic_dynamic_next(long* from, long* to) { return next(from, to); }
void GOMP_loop_end() { GOMP_barrier(); }
void GOMP_loop_end_nowait() {}

// Atomic updates that the processor has no instruction for, and reductions.
static std::mutex atomic;
void GOMP_atomic_start() { atomic.lock(); }
void GOMP_atomic_end() { atomic.unlock(); }
}
