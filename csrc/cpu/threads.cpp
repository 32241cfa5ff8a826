#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

namespace miwv::cpu {
namespace {

// One call of parallel_for, on the caller's stack.
struct Job {
  Body body;
  const void* context;
  int64_t count, grain;
  std::atomic<int64_t> next{0};
  int wanted;      // helpers that may still join; guarded by Pool::mutex_, like the next
  int joined = 0;  // helpers at work

  Job(Body body, const void* context, int64_t count, int64_t grain, int wanted)
      : body(body), context(context), count(count), grain(grain), wanted(wanted) {}

  void work() {
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) return;
      body(context, begin, std::min(begin + grain, count));
    }
  }
};

// Threads that wait for jobs of any number of callers. A caller never waits for a helper that hasn't begun, so a busy
// pool makes a call slower but can't block it.
class Pool {
 public:
  void run(Job& job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(job.wanted);
      jobs_.push_back(&job);
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), &job), jobs_.end());
    done_.wait(lock, [&] { return job.joined == 0; });
  }

 private:
  void grow(int size) {
    for (; num_threads_ < size; ++num_threads_) {
      try {
        std::thread([this] { help(); }).detach();
      } catch (const std::system_error&) {
        return;  // the system has no more threads: the caller does their share
      }
    }
  }

  void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return !jobs_.empty(); });
      Job& job = *jobs_.front();
      if (--job.wanted == 0) jobs_.pop_front();
      ++job.joined;
      lock.unlock();
      job.work();
      lock.lock();
      if (--job.joined == 0) done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::deque<Job*> jobs_;
  int num_threads_ = 0;
};

std::atomic<Pool*> current_pool{nullptr};

// Never destroyed: its threads may run until the process ends.
Pool& pool() {
  Pool* existing = current_pool.load(std::memory_order_acquire);
  if (existing) return *existing;
  // A child has none of its parent's threads, and a mutex of theirs may be locked for ever: it starts with a new pool.
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { current_pool.store(nullptr, std::memory_order_relaxed); });
  static_cast<void>(registered);
  auto* created = new Pool;
  if (current_pool.compare_exchange_strong(existing, created)) return *created;
  delete created;
  return *existing;
}

}  // namespace

void parallel_for(int64_t count, int64_t grain, int num_threads, Body body, const void* context) {
  const int64_t pieces = (count + grain - 1) / grain;
  const int helpers = static_cast<int>(std::min<int64_t>(num_threads, pieces)) - 1;
  if (helpers < 1) {
    body(context, 0, count);
    return;
  }
  Job job(body, context, count, grain, helpers);
  pool().run(job);
}

}  // namespace miwv::cpu
