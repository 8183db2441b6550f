// How tasks are shared among threads: in runs that shrink as tasks become few. Cores of one machine
// are not equally fast (a neighbour on the same core, another guest), and with equal shares all of
// them wait for the slowest: a sixth of the time, on the machines this was measured on.
#pragma once

#include <stdint.h>

#include <atomic>

#include "parallel.h"

namespace nibblock {
namespace {

class TaskRuns {
 public:
  TaskRuns(int64_t tasks, int threads)
      : tasks_(tasks), threads_(threads), least_(tasks / (8 * threads) + 1) {}

  // Runs body over runs of tasks until there are none; every thread calls this.
  void work(void (*body)(void* ctx, int64_t begin, int64_t end), void* ctx) {
    int64_t begin = next_.load(std::memory_order_relaxed);
    while (begin < tasks_) {
      const int64_t left = tasks_ - begin, share = left / (2 * threads_);
      const int64_t end = begin + (share > least_ ? share : least_ < left ? least_ : left);
      if (next_.compare_exchange_weak(begin, end, std::memory_order_relaxed)) {
        body(ctx, begin, end);
        begin = next_.load(std::memory_order_relaxed);
      }
    }
  }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t tasks_, threads_;
  const int64_t least_;  // long enough for memory to be read in streams
};

}  // namespace
}  // namespace nibblock
