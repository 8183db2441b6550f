// Ceilings of AVX2: reading, copying, fp32 FMA. See ceilings.h.
#include <immintrin.h>

#include "ceilings.h"

namespace nibblock {
namespace ceilings {

uint64_t read_avx2(const uint8_t* base, size_t span, size_t lines) {
  __m256i sum[kStreams];
  for (int s = 0; s < kStreams; ++s) sum[s] = _mm256_setzero_si256();
  for (size_t i = 0; i < lines; ++i) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) {
      const __m256i* p = reinterpret_cast<const __m256i*>(base + s * span + i * 64);
      sum[s] = _mm256_add_epi64(sum[s],
                                _mm256_add_epi64(_mm256_loadu_si256(p), _mm256_loadu_si256(p + 1)));
    }
  }
  for (int s = 1; s < kStreams; ++s) sum[0] = _mm256_add_epi64(sum[0], sum[s]);
  alignas(32) uint64_t out[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(out), sum[0]);
  return out[0] + out[1] + out[2] + out[3];
}

void copy_avx2(const uint8_t* from, uint8_t* to, size_t span, size_t lines) {
  for (size_t i = 0; i < lines; ++i) {
    for (int s = 0; s < kStreams; ++s) {
      const size_t at = s * span + i * 64;
      const __m256i* p = reinterpret_cast<const __m256i*>(from + at);
      __m256i* q = reinterpret_cast<__m256i*>(to + at);
      const __m256i a = _mm256_loadu_si256(p), b = _mm256_loadu_si256(p + 1);
      _mm256_stream_si256(q, a);
      _mm256_stream_si256(q + 1, b);
    }
  }
  _mm_sfence();
}

void burst_fma_avx2(const Operands& o, int64_t iterations) {
  __m256 acc[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) acc[i] = _mm256_loadu_ps(o.f32 + 64 + 8 * i);
  const __m256 a[2] = {_mm256_loadu_ps(o.f32), _mm256_loadu_ps(o.f32 + 8)};
  const __m256 b[2] = {_mm256_loadu_ps(o.f32 + 16), _mm256_loadu_ps(o.f32 + 24)};
  for (int64_t t = 0; t < iterations; ++t) {
#pragma GCC unroll 16
    for (int i = 0; i < kAccumulators; ++i)
      acc[i] = _mm256_fmadd_ps(a[i & 1], b[i >> 1 & 1], acc[i]);
  }
  for (int i = 0; i < kAccumulators; ++i) __asm__ volatile("" ::"x"(acc[i]));
}

}  // namespace ceilings
}  // namespace nibblock
