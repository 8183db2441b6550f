// Ceilings of AVX-512: reading, copying, fp32 FMA. See ceilings.h.
#include <immintrin.h>

#include "ceilings.h"

namespace nibblock {
namespace ceilings {

uint64_t read_avx512(const uint8_t* base, size_t span, size_t lines) {
  __m512i sum[kStreams];
  for (int s = 0; s < kStreams; ++s) sum[s] = _mm512_setzero_si512();
  for (size_t i = 0; i < lines; ++i) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s)
      sum[s] = _mm512_add_epi64(sum[s], _mm512_loadu_si512(base + s * span + i * 64));
  }
  for (int s = 1; s < kStreams; ++s) sum[0] = _mm512_add_epi64(sum[0], sum[s]);
  alignas(64) uint64_t out[8];
  _mm512_store_si512(out, sum[0]);
  uint64_t total = 0;
  for (int i = 0; i < 8; ++i) total += out[i];
  return total;
}

void copy_avx512(const uint8_t* from, uint8_t* to, size_t span, size_t lines) {
  for (size_t i = 0; i < lines; ++i) {
    for (int s = 0; s < kStreams; ++s) {
      const size_t at = s * span + i * 64;
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_loadu_si512(from + at));
    }
  }
  _mm_sfence();
}

void burst_fma_avx512(const Operands& o, int64_t iterations) {
  __m512 acc[kAccumulators], a[4], b[4];
  for (int i = 0; i < kAccumulators; ++i) acc[i] = _mm512_loadu_ps(o.f32 + 256 + 16 * i);
  for (int i = 0; i < 4; ++i) a[i] = _mm512_loadu_ps(o.f32 + 16 * i);
  for (int i = 0; i < 4; ++i) b[i] = _mm512_loadu_ps(o.f32 + 64 + 16 * i);
  for (int64_t t = 0; t < iterations; ++t) {
#pragma GCC unroll 16
    for (int i = 0; i < kAccumulators; ++i) acc[i] = _mm512_fmadd_ps(a[i & 3], b[i >> 2], acc[i]);
  }
  for (int i = 0; i < kAccumulators; ++i) __asm__ volatile("" ::"v"(acc[i]));
}

}  // namespace ceilings
}  // namespace nibblock
