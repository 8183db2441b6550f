// Ceilings of AVX-512 VNNI: VPDPBUSD (bytes) and VPDPWSSD (16-bit words). See ceilings.h.
#include <immintrin.h>

#include "ceilings.h"

namespace nibblock {
namespace ceilings {
namespace {

struct Registers {
  __m512i acc[kAccumulators], a[4], b[4];
};

inline void load(const Operands& o, Registers* r) {
  for (int i = 0; i < kAccumulators; ++i) r->acc[i] = _mm512_loadu_si512(o.bytes + 1024 + 64 * i);
  for (int i = 0; i < 4; ++i) r->a[i] = _mm512_loadu_si512(o.bytes + 64 * i);
  for (int i = 0; i < 4; ++i) r->b[i] = _mm512_loadu_si512(o.bytes + 256 + 64 * i);
}

inline void keep(const Registers& r) {
  for (int i = 0; i < kAccumulators; ++i) __asm__ volatile("" ::"v"(r.acc[i]));
}

}  // namespace

void burst_vnni_int8(const Operands& o, int64_t iterations) {
  Registers r;
  load(o, &r);
  for (int64_t t = 0; t < iterations; ++t) {
#pragma GCC unroll 16
    for (int i = 0; i < kAccumulators; ++i)
      r.acc[i] = _mm512_dpbusd_epi32(r.acc[i], r.a[i & 3], r.b[i >> 2]);
  }
  keep(r);
}

void burst_vnni_int16(const Operands& o, int64_t iterations) {
  Registers r;
  load(o, &r);
  for (int64_t t = 0; t < iterations; ++t) {
#pragma GCC unroll 16
    for (int i = 0; i < kAccumulators; ++i)
      r.acc[i] = _mm512_dpwssd_epi32(r.acc[i], r.a[i & 3], r.b[i >> 2]);
  }
  keep(r);
}

}  // namespace ceilings
}  // namespace nibblock
