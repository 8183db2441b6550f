// Ceiling of AVX512-BF16: VDPBF16PS. See ceilings.h.
#include <immintrin.h>

#include "ceilings.h"

namespace nibblock {
namespace ceilings {

void burst_avx512_bf16(const Operands& o, int64_t iterations) {
  __m512 acc[kAccumulators];
  __m512bh a[4], b[4];
  for (int i = 0; i < kAccumulators; ++i) acc[i] = _mm512_loadu_ps(o.f32 + 256 + 16 * i);
  for (int i = 0; i < 4; ++i) a[i] = (__m512bh)_mm512_loadu_si512(o.bf16 + 32 * i);
  for (int i = 0; i < 4; ++i) b[i] = (__m512bh)_mm512_loadu_si512(o.bf16 + 128 + 32 * i);
  for (int64_t t = 0; t < iterations; ++t) {
#pragma GCC unroll 16
    for (int i = 0; i < kAccumulators; ++i) acc[i] = _mm512_dpbf16_ps(acc[i], a[i & 3], b[i >> 2]);
  }
  for (int i = 0; i < kAccumulators; ++i) __asm__ volatile("" ::"v"(acc[i]));
}

}  // namespace ceilings
}  // namespace nibblock
