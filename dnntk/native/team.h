// Threads that stay: to start one costs as much as a hundred layers of a narrow network.

#pragma once

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace {

class Team {
 public:
  using Work = std::function<void(int64_t)>;

  // work(0) on this thread, and work(1), ..., work(count - 1) each on one of its own, all at the
  // same time; `work` must not throw. Whoever calls at the same time has other threads.
  static void run(int64_t count, const Work& work) {
    std::vector<Helper*> helpers;
    try {
      while (int64_t(helpers.size()) + 1 < count) helpers.push_back(take());
    } catch (...) {
      give(helpers);
      throw;
    }
    std::atomic<int64_t> working{count - 1};
    for (int64_t k = 1; k < count; ++k) helpers[k - 1]->start({&work, k, &working});
    work(0);
    for (Patience patience; working.load(std::memory_order_acquire) != 0;)
      if (!patience.left()) std::this_thread::yield();
    give(helpers);
  }

 private:
  // How long to look for the next call before sleeping: steps that follow one another at once find
  // the threads awake.
  class Patience {
   public:
    bool left() {
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
      return std::chrono::steady_clock::now() < end_;
    }

   private:
    std::chrono::steady_clock::time_point end_ =
        std::chrono::steady_clock::now() + std::chrono::microseconds(100);
  };

  struct Job {
    const Work* work = nullptr;
    int64_t number = 0;
    std::atomic<int64_t>* working = nullptr;
  };

  class Helper {
   public:
    Helper() { std::thread([this] { live(); }).detach(); }

    void start(const Job& job) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        job_ = job;
        has_job_.store(true, std::memory_order_release);
      }
      called_.notify_one();
    }

   private:
    void live() {
      for (;;) {
        Patience patience;
        while (!has_job_.load(std::memory_order_acquire) && patience.left()) {}
        Job job;
        {
          std::unique_lock<std::mutex> lock(mutex_);
          called_.wait(lock, [this] { return has_job_.load(std::memory_order_relaxed); });
          job = job_;
          has_job_.store(false, std::memory_order_relaxed);
        }
        (*job.work)(job.number);
        job.working->fetch_sub(1, std::memory_order_acq_rel);
      }
    }

    std::mutex mutex_;
    std::condition_variable called_;
    std::atomic<bool> has_job_{false};
    Job job_;
  };

  // Never destroyed: its threads may be at work when the process ends. They do not live on in a
  // fork, which starts with none.
  struct Idle {
    std::mutex mutex;
    std::vector<Helper*> helpers;
  };
  static Idle*& idle() {
    static Idle* one = [] {
      pthread_atfork(nullptr, nullptr, [] { idle() = new Idle; });
      return new Idle;
    }();
    return one;
  }

  static Helper* take() {
    Idle& all = *idle();
    {
      std::lock_guard<std::mutex> lock(all.mutex);
      if (!all.helpers.empty()) {
        Helper* one = all.helpers.back();
        all.helpers.pop_back();
        return one;
      }
      all.helpers.reserve(all.helpers.capacity() + 1);  // so that `give` never fails
    }
    return new Helper;
  }

  static void give(const std::vector<Helper*>& helpers) {
    Idle& all = *idle();
    std::lock_guard<std::mutex> lock(all.mutex);
    for (Helper* one : helpers) all.helpers.push_back(one);
  }
};

}  // namespace
