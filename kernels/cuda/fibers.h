// A thread block on the host, for tests: its threads are fibers of one host thread, which change over where threads of
// a block meet (barriers, ballots, shuffles). Between two meetings a thread runs alone, in ascending order of threads
// or in descending: what one reads that another writes without a barrier between them comes out differently.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

namespace pycse::cuda {

class Fibers {
 public:
  struct Barrier { int arrived = 0, round = 0; };

 private:
  static constexpr size_t kStack = 128 << 10;
  struct Fiber {
    jmp_buf at;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool done = false;
    Barrier* before = nullptr;  // waits here while its round is this
    int round = 0;
    bool ready() const { return !done && (!before || before->round != round); }
  };

  std::vector<Fiber> fibers_;
  std::vector<Barrier> warps_;
  Barrier block_;
  std::vector<uint64_t> slots_;
  std::function<void()> body_;
  std::exception_ptr error_;
  jmp_buf main_;
  ucontext_t start_, back_;
  int current_ = 0;

  static Fibers*& running() {
    static thread_local Fibers* fibers = nullptr;
    return fibers;
  }
  // A fiber starts by its context and then changes over by setjmp and longjmp, which make no system call.
  static void enter() {
    Fibers& all = now();
    if (_setjmp(all.fibers_[all.current_].at) == 0) swapcontext(&all.start_, &all.back_);
    Fibers& later = now();
    try {
      later.body_();
    } catch (...) { later.error_ = std::current_exception(); }
    later.fibers_[later.current_].done = true;
    _longjmp(later.main_, 1);
  }
  void resume() {
    if (_setjmp(main_) == 0) _longjmp(fibers_[current_].at, 1);
  }

 public:
  static Fibers& now() { return *running(); }

  int index() const { return current_; }
  int size() const { return int(fibers_.size()); }
  void sync() { wait(block_, size()); }
  void sync_warp() { wait(warps_[current_ / 32], 32); }

  // Here until `threads` threads are.
  void wait(Barrier& barrier, int threads) {
    if (++barrier.arrived == threads) {
      barrier.arrived = 0;
      ++barrier.round;
    } else {
      wait_round(barrier);
    }
  }
  // The others' turn.
  void yield() {
    fibers_[current_].before = nullptr;
    if (_setjmp(fibers_[current_].at) == 0) _longjmp(main_, 1);
  }
  // Until the round ends.
  void wait_round(Barrier& barrier) {
    Fiber& fiber = fibers_[current_];
    fiber.before = &barrier, fiber.round = barrier.round;
    if (_setjmp(fiber.at) == 0) _longjmp(main_, 1);
  }

  // What every lane of the warp brings, for f(values), the warp's 32.
  template <class A, class F>
  auto meet(A x, F f) {
    static_assert(sizeof(A) <= sizeof(uint64_t));
    const int first = current_ / 32 * 32;
    memcpy(&slots_[current_], &x, sizeof x);
    sync_warp();
    A all[32];
    for (int lane = 0; lane < 32; ++lane) memcpy(&all[lane], &slots_[first + lane], sizeof x);
    const auto result = f(all);
    sync_warp();
    return result;
  }

  // body() by `threads` threads, whole warps.
  void run(int threads, bool ascending, std::function<void()> body) {
    body_ = std::move(body);
    fibers_ = std::vector<Fiber>(threads);
    warps_.assign(threads / 32, {});
    slots_.assign(threads, 0);
    block_ = {};
    error_ = nullptr;
    running() = this;
    for (current_ = 0; current_ < threads; ++current_) {
      getcontext(&start_);
      start_.uc_stack.ss_sp = fibers_[current_].stack.get();
      start_.uc_stack.ss_size = kStack;
      start_.uc_link = nullptr;
      makecontext(&start_, enter, 0);
      swapcontext(&back_, &start_);
    }
    bool progress = true, left = true;
    while (left && progress && !error_) {
      progress = left = false;
      for (int k = 0; k < threads && !error_; ++k) {
        current_ = ascending ? k : threads - 1 - k;
        if (fibers_[current_].ready()) {
          progress = true;
          resume();
        }
        left |= !fibers_[current_].done;
      }
    }
    if (left && !error_) error_ = std::make_exception_ptr(std::logic_error("not all threads reach a barrier"));
    running() = nullptr;
    if (error_) std::rethrow_exception(error_);
  }
};

}  // namespace pycse::cuda
