// SPDX-License-Identifier: Apache-2.0
// Threads that wait for work. Parts are handed out one at a time, so a slow thread gets fewer.
#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace mw {
namespace {

struct Task {
  const std::function<void(int64_t, int64_t)>* work;
  int64_t count, size;
  std::atomic<int64_t> next{0};

  void run() {
    for (;;) {
      const int64_t first = next.fetch_add(size);
      if (first >= count) return;
      (*work)(first, first + size < count ? first + size : count);
    }
  }
};

class Pool {
 public:
  // Runs a task on the caller and `helpers` threads. False: another caller has the pool.
  bool run(Task& task, int helpers) {
    std::unique_lock<std::mutex> mine(callers_, std::try_to_lock);
    if (!mine.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> guard(state_);
      while (int(threads_.size()) < helpers) {
        const int number = int(threads_.size());
        threads_.emplace_back([this, number] { serve(number); });
      }
      task_ = &task;
      helpers_ = busy_ = helpers;
      ++turn_;
    }
    wake_.notify_all();
    task.run();
    std::unique_lock<std::mutex> lock(state_);
    done_.wait(lock, [this] { return busy_ == 0; });
    task_ = nullptr;
    return true;
  }

 private:
  void serve(int number) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(state_);
    for (;;) {
      wake_.wait(lock, [&] { return turn_ != seen; });
      seen = turn_;
      if (number >= helpers_) continue;
      Task* task = task_;
      lock.unlock();
      task->run();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex callers_, state_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Task* task_ = nullptr;
  int helpers_ = 0, busy_ = 0;
  uint64_t turn_ = 0;
};

// Never destroyed: its threads wait until the process ends. A forked child has none of them, so it
// begins with a new pool.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
  static const bool prepared = [] {
    pool = new Pool;
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif
    return true;
  }();
  (void)prepared;
  return *pool;
}

constexpr int64_t kPartsPerThread = 4;

}  // namespace

void parallel(int threads, int64_t count, int64_t unit,
              const std::function<void(int64_t, int64_t)>& work) {
  const int64_t units = (count + unit - 1) / unit;
  if (threads > units) threads = int(units);
  if (threads <= 1) return work(0, count);
  const int64_t parts = threads * kPartsPerThread;
  Task task;
  task.work = &work;
  task.count = count;
  task.size = (units + parts - 1) / parts * unit;
  if (!the_pool().run(task, threads - 1)) work(0, count);
}

}  // namespace mw
