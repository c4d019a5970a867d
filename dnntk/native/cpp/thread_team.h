// Threads that persist between calls: to start a thread takes as long as a hundred layers of a
// narrow network.

#pragma once

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace dnntk {
namespace {

// How a thread rounds and what it does with denormal numbers.
#if defined(__SSE2__)
using FloatMode = unsigned int;
inline FloatMode float_mode() { return __builtin_ia32_stmxcsr(); }
inline void set_float_mode(FloatMode mode) { __builtin_ia32_ldmxcsr(mode); }
#elif defined(__aarch64__)
using FloatMode = uint64_t;
inline FloatMode float_mode() {
  FloatMode mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
inline void set_float_mode(FloatMode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#else
struct FloatMode {};
inline FloatMode float_mode() { return {}; }
inline void set_float_mode(FloatMode) {}
#endif

// The core that a thread runs on. If the system wakes a helper thread on its caller's core, the two
// share that core and wait for each other: so the helper moves to another core.
#if defined(__linux__) && defined(__GLIBC__)
class CoreAffinity {
 public:
  static CoreAffinity current() { return {sched_getcpu(), pthread_self()}; }

  // Moves the calling thread from this core to another one that this object's thread may use, if
  // any.
  void move_away() const {
    if (sched_getcpu() != processor_) return;
    cpu_set_t allowed;
    if (pthread_getaffinity_np(thread_, sizeof allowed, &allowed) != 0) return;
    if (processor_ < 0 || processor_ >= CPU_SETSIZE) return;
    CPU_CLR(processor_, &allowed);
    if (CPU_COUNT(&allowed) > 0) pthread_setaffinity_np(pthread_self(), sizeof allowed, &allowed);
  }

 private:
  CoreAffinity(int processor, pthread_t thread) : processor_(processor), thread_(thread) {}
  int processor_;
  pthread_t thread_;
};
#else
struct CoreAffinity {
  static CoreAffinity current() { return {}; }
  void move_away() const {}
};
#endif

// A thread's pauses while it polls: it spins, then yields, and after 200 us it sleeps. On a busy
// machine a thread that only yielded would use up its time slice, and would not run when the others
// wait for it.
class Backoff {
 public:
  explicit Backoff(int spins = 0) : spins_(spins) {}

  void pause() {
    if (spins_ > 0) {
      --spins_;
      return;
    }
    const auto now = std::chrono::steady_clock::now();
    if (!late_) {
      late_ = true;
      end_ = now + std::chrono::microseconds(200);
    }
    if (now < end_) std::this_thread::yield();
    else std::this_thread::sleep_for(std::chrono::microseconds(20));
  }

 private:
  int spins_;
  bool late_ = false;
  std::chrono::steady_clock::time_point end_;
};

class ThreadTeam {
 public:
  // work(0) on this thread, and work(1), ..., work(count - 1) each on its own helper thread, all
  // at the same time; `work` must not throw. Calls at the same time get different helpers.
  template <class Work>
  static void run(int64_t count, const Work& work) {
    std::vector<Helper*> helpers;
    try {
      while (int64_t(helpers.size()) + 1 < count) helpers.push_back(take());
    } catch (...) {
      give(helpers);
      throw;
    }
    alignas(64) std::atomic<int64_t> working{count - 1};
    auto call = [](const void* work, int64_t k) { (*static_cast<const Work*>(work))(k); };
    const CoreAffinity caller = CoreAffinity::current();
    const FloatMode mode = float_mode();
    for (int64_t k = 1; k < count; ++k)
      helpers[k - 1]->start({call, &work, k, &working, caller, mode});
    work(0);
    Backoff backoff;
    for (SpinWait spin; working.load(std::memory_order_acquire) != 0;)
      if (!spin.time_left()) backoff.pause();
    give(helpers);
  }

 private:
  // Polls for 100 us before sleeping: steps that follow at once find the threads awake.
  class SpinWait {
   public:
    bool time_left() {
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
      return std::chrono::steady_clock::now() < end_;
    }

   private:
    std::chrono::steady_clock::time_point end_ =
        std::chrono::steady_clock::now() + std::chrono::microseconds(100);
  };

  struct Task {
    void (*call)(const void* work, int64_t number);
    const void* work;
    int64_t number;
    std::atomic<int64_t>* working;
    CoreAffinity caller;
    FloatMode mode;
  };

  // A task is handed over in one cache line: between distant cores, moving another line takes as
  // long as a layer.
  class Helper {
   public:
    Helper() { std::thread([this] { loop(); }).detach(); }

    void start(const Task& task) {
      task_ = task;
      if (state_.exchange(kCalled, std::memory_order_acq_rel) != kAsleep) return;
      { std::lock_guard<std::mutex> lock(mutex_); }  // it checks `called` before it waits
      called_.notify_one();
    }

   private:
    enum State { kIdle, kAsleep, kCalled };

    void loop() {
      for (;;) {
        SpinWait spin;
        while (!called() && spin.time_left()) {}
        if (!called()) {
          std::unique_lock<std::mutex> lock(mutex_);
          State idle = kIdle;
          state_.compare_exchange_strong(idle, kAsleep, std::memory_order_acq_rel);
          called_.wait(lock, [this] { return called(); });
        }
        Task task = task_;
        state_.store(kIdle, std::memory_order_relaxed);
        // The caller's mode, or results with denormal numbers would depend on the thread.
        set_float_mode(task.mode);
        task.caller.move_away();
        task.call(task.work, task.number);
        task.working->fetch_sub(1, std::memory_order_acq_rel);
      }
    }

    bool called() const { return state_.load(std::memory_order_acquire) == kCalled; }

    alignas(64) std::atomic<State> state_{kIdle};
    Task task_{nullptr, nullptr, 0, nullptr, CoreAffinity::current(), {}};
    alignas(64) std::mutex mutex_;
    std::condition_variable called_;
  };

  // Never destroyed: its threads may still run when the process ends. A forked process has none of
  // them and starts with an empty list.
  struct Idle {
    std::mutex mutex;
    std::vector<Helper*> helpers;
  };
  static Idle*& idle() {
    static Idle* idle_helpers = [] {
      pthread_atfork(nullptr, nullptr, [] { idle() = new Idle; });
      return new Idle;
    }();
    return idle_helpers;
  }

  static Helper* take() {
    Idle& all = *idle();
    {
      std::lock_guard<std::mutex> lock(all.mutex);
      if (!all.helpers.empty()) {
        Helper* helper = all.helpers.back();
        all.helpers.pop_back();
        return helper;
      }
      all.helpers.reserve(all.helpers.capacity() + 1);  // so that `give` never fails
    }
    return new Helper;
  }

  static void give(const std::vector<Helper*>& helpers) {
    Idle& all = *idle();
    std::lock_guard<std::mutex> lock(all.mutex);
    all.helpers.insert(all.helpers.end(), helpers.begin(), helpers.end());
  }
};

// Makes `count` threads wait for one another.
class Barrier {
 public:
  explicit Barrier(int64_t count) : count_(count) {}

  // False if `failed`: another thread will not arrive.
  bool wait(const std::atomic<bool>* failed = nullptr) {
    const int64_t turn = turn_.load(std::memory_order_acquire);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
      waiting_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return true;
    }
    for (Backoff backoff(1000); turn_.load(std::memory_order_acquire) == turn; backoff.pause())
      if (failed != nullptr && *failed) return false;
    return true;
  }

 private:
  const int64_t count_;
  std::atomic<int64_t> waiting_{0}, turn_{0};
};

}  // namespace
}  // namespace dnntk
