// Denormals as zero, for as long as a scope lasts and on this thread only: in results (FTZ) and in
// operands (DAZ).
#pragma once

#include <immintrin.h>

namespace nibblock {
namespace {

class FlushDenormals {
 public:
  FlushDenormals() : before_(_mm_getcsr()) {
    _mm_setcsr(before_ | 0x8040u);
    // Keeps loads, and with them what is computed from them, from moving out of the scope.
    __asm__ volatile("" ::: "memory");
  }
  ~FlushDenormals() {
    __asm__ volatile("" ::: "memory");
    _mm_setcsr(before_);
  }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned before_;
};

}  // namespace
}  // namespace nibblock
