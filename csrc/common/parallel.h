// The one way a kernel runs on several threads: it cuts its work into tasks by shape alone and
// hands them to whoever called it. Under torch that is torch's own pool (csrc/glue), under NumPy a
// few std::threads (csrc/native). A task never depends on which thread runs it, so results are
// bitwise equal at any number of threads.
#pragma once

#include <stdint.h>

namespace nibblock {

struct Parallel {
  // Runs body(ctx, begin, end) over disjoint ranges that cover [0, tasks); returns when all are
  // done.
  void (*run)(const Parallel* self, int64_t tasks,
              void (*body)(void* ctx, int64_t begin, int64_t end), void* ctx);
  int threads;  // how many threads run() may use: a hint for cutting tasks, never for cutting a sum
};

constexpr Parallel kSerial = {nullptr, 1};  // for work that waking other threads would only delay

template <class F>
static inline void parallel_for(const Parallel& p, int64_t tasks, F& f) {
  if (tasks <= 0) return;
  if (tasks == 1 || p.threads <= 1) {
    f(static_cast<int64_t>(0), tasks);
    return;
  }
  p.run(&p, tasks, [](void* ctx, int64_t b, int64_t e) { (*static_cast<F*>(ctx))(b, e); }, &f);
}

}  // namespace nibblock
