// AVX-512 and its VNNI and BF16 instructions in software, for machines that have AVX2 alone: what
// `make emulate` puts before the compiler's own header, so that kernel files compile as they are.
//
// SIMDe (https://github.com/simd-everywhere/simde, in Debian libsimde-dev) has most of them. What
// 0.7.4 lacks and the kernels use is written here lane by lane, after the instruction reference.
#pragma once
#include_next <immintrin.h>

#include <stdint.h>
#include <string.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

namespace avx512_emulation {

template <class T, int N>
struct Lanes {
  T v[N];
};

template <class To, class From>
static inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a view of the same bytes");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// N lanes of Source, each converted.
template <class To, class From, class Target, class Source, int N>
static inline To convert(From a) {
  const auto in = as<Lanes<Source, sizeof(From) / sizeof(Source)>>(a);
  Lanes<Target, N> out;
  for (int i = 0; i < N; ++i) out.v[i] = static_cast<Target>(in.v[i]);
  return as<To>(out);
}

// Lanes whose bit is 0 are neither read nor written, and come out as 0.
template <class To, class T>
static inline To load(uint64_t mask, const void* p) {
  constexpr int N = sizeof(To) / sizeof(T);
  Lanes<T, N> out = {};
  for (int i = 0; i < N; ++i) {
    if (mask >> i & 1) memcpy(&out.v[i], static_cast<const T*>(p) + i, sizeof(T));
  }
  return as<To>(out);
}
template <class T, class From>
static inline void store(void* p, uint64_t mask, From a) {
  constexpr int N = sizeof(From) / sizeof(T);
  const auto in = as<Lanes<T, N>>(a);
  for (int i = 0; i < N; ++i) {
    if (mask >> i & 1) memcpy(static_cast<T*>(p) + i, &in.v[i], sizeof(T));
  }
}
template <class P, class From>
static inline void stream(P* p, From a) {
  memcpy(static_cast<void*>(p), &a, sizeof a);
}

template <class I, int N>
static inline __m512 gather(__m512i index, const void* p, int scale) {
  const auto at = as<Lanes<I, N>>(index);
  Lanes<float, 16> out = {};
  for (int i = 0; i < N; ++i) {
    memcpy(&out.v[i], static_cast<const char*>(p) + static_cast<int64_t>(at.v[i]) * scale, 4);
  }
  return as<__m512>(out);
}
template <class I, int N, class From>
static inline void scatter(void* p, __m512i index, From a, int scale) {
  const auto at = as<Lanes<I, N>>(index);
  const auto in = as<Lanes<float, N>>(a);
  for (int i = 0; i < N; ++i) {
    memcpy(static_cast<char*>(p) + static_cast<int64_t>(at.v[i]) * scale, &in.v[i], 4);
  }
}

static inline __m256 half(__m512 a, int i) { return as<Lanes<__m256, 2>>(a).v[i]; }

static inline __m512 shuffle(__m512 a, __m512 b, int control) {
  const auto x = as<Lanes<__m128, 4>>(a), y = as<Lanes<__m128, 4>>(b);
  const Lanes<__m128, 4> out = {{x.v[control & 3], x.v[control >> 2 & 3], y.v[control >> 4 & 3],
                                 y.v[control >> 6 & 3]}};
  return as<__m512>(out);
}

static inline __m512 expand(uint16_t mask, __m512 a) {
  const auto in = as<Lanes<float, 16>>(a);
  Lanes<float, 16> out = {};
  for (int i = 0, next = 0; i < 16; ++i) {
    if (mask >> i & 1) out.v[i] = in.v[next++];
  }
  return as<__m512>(out);
}

static inline uint16_t test_bytes(__m128i a, __m128i b) {
  const auto x = as<Lanes<uint8_t, 16>>(a), y = as<Lanes<uint8_t, 16>>(b);
  uint16_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<uint16_t>((x.v[i] & y.v[i]) != 0) << i;
  return mask;
}

static inline __m512 from_halves(__m256i a) {
  const auto in = as<Lanes<__m128i, 2>>(a);
  const Lanes<__m256, 2> out = {{_mm256_cvtph_ps(in.v[0]), _mm256_cvtph_ps(in.v[1])}};
  return as<__m512>(out);
}
static inline __m256i to_halves(__m512 a) {
  const Lanes<__m128i, 2> out = {{_mm256_cvtps_ph(half(a, 0), 0), _mm256_cvtps_ph(half(a, 1), 0)}};
  return as<__m256i>(out);
}

// VCVTNEPS2BF16: nearest even, denormals to zero, NaNs quiet.
static inline uint16_t to_bf16(uint32_t bits) {
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
  if ((bits & 0x7f800000u) == 0) return static_cast<uint16_t>(bits >> 16 & 0x8000);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
typedef short Bf16x16 __attribute__((vector_size(32)));
typedef short Bf16x32 __attribute__((vector_size(64)));
static inline Bf16x16 to_bf16(__m512 a) {
  const auto in = as<Lanes<uint32_t, 16>>(a);
  Lanes<uint16_t, 16> out;
  for (int i = 0; i < 16; ++i) out.v[i] = to_bf16(in.v[i]);
  return as<Bf16x16>(out);
}
static inline Bf16x32 to_bf16(__m512 high, __m512 low) {
  const Lanes<Bf16x16, 2> out = {{to_bf16(low), to_bf16(high)}};
  return as<Bf16x32>(out);
}

// VPDPWSSD and VPDPBUSD: sums wrap, as the hardware's.
template <class A, class B>
static inline __m512i dot(__m512i sum, __m512i a, __m512i b) {
  constexpr int N = 64 / sizeof(A), kEach = N / 16;
  const auto x = as<Lanes<A, N>>(a);
  const auto y = as<Lanes<B, N>>(b);
  auto out = as<Lanes<uint32_t, 16>>(sum);
  for (int i = 0; i < N; ++i) out.v[i / kEach] += static_cast<uint32_t>(x.v[i] * y.v[i]);
  return as<__m512i>(out);
}

// The upper half of the lanes onto the lower, until one is left.
template <class T, class From>
static inline T sum(From a) {
  auto lanes = as<Lanes<T, 64 / sizeof(T)>>(a);
  for (int n = 32 / sizeof(T); n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lanes.v[i] += lanes.v[i + n];
  }
  return lanes.v[0];
}

}  // namespace avx512_emulation

#define NB_EMULATION avx512_emulation
// (SIMDe's alias of this one names the masked form.)
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32 NB_EMULATION::convert<__m512i, __m128i, int32_t, int8_t, 16>
#undef _mm512_cvtepi16_epi32
#define _mm512_cvtepi16_epi32 NB_EMULATION::convert<__m512i, __m256i, int32_t, int16_t, 16>
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 NB_EMULATION::convert<__m512i, __m256i, int32_t, uint16_t, 16>
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 NB_EMULATION::convert<__m256i, __m512i, int16_t, int32_t, 16>
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps NB_EMULATION::convert<__m512, __m512i, float, int32_t, 16>
#undef _mm512_cvtps_pd
#define _mm512_cvtps_pd NB_EMULATION::convert<__m512d, __m256, double, float, 8>
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps NB_EMULATION::from_halves
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(a, nearest) NB_EMULATION::to_halves(a)
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh(a) NB_EMULATION::to_bf16(a)
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh(high, low) NB_EMULATION::to_bf16(high, low)
#undef _mm512_dpwssd_epi32
#define _mm512_dpwssd_epi32 NB_EMULATION::dot<int16_t, int16_t>
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 NB_EMULATION::dot<uint8_t, int8_t>
#undef _mm512_reduce_add_epi32
#define _mm512_reduce_add_epi32 NB_EMULATION::sum<uint32_t>
#undef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps NB_EMULATION::sum<float>
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps NB_EMULATION::load<__m512, float>
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16 NB_EMULATION::load<__m512i, uint16_t>
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16 NB_EMULATION::load<__m256i, uint16_t>
#undef _mm_maskz_loadu_epi8
#define _mm_maskz_loadu_epi8 NB_EMULATION::load<__m128i, uint8_t>
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps NB_EMULATION::store<float, __m512>
#undef _mm256_mask_storeu_epi16
#define _mm256_mask_storeu_epi16 NB_EMULATION::store<uint16_t, __m256i>
#undef _mm512_stream_ps
#define _mm512_stream_ps NB_EMULATION::stream
#undef _mm512_stream_si512
#define _mm512_stream_si512 NB_EMULATION::stream
#undef _mm512_i32gather_ps
#define _mm512_i32gather_ps NB_EMULATION::gather<int32_t, 16>
#undef _mm512_i64gather_ps
#define _mm512_i64gather_ps(index, p, scale) \
  NB_EMULATION::half(NB_EMULATION::gather<int64_t, 8>(index, p, scale), 0)
#undef _mm512_i32scatter_ps
#define _mm512_i32scatter_ps NB_EMULATION::scatter<int32_t, 16>
#undef _mm512_i64scatter_ps
#define _mm512_i64scatter_ps NB_EMULATION::scatter<int64_t, 8>
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps NB_EMULATION::half
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 NB_EMULATION::shuffle
#undef _mm512_maskz_expand_ps
#define _mm512_maskz_expand_ps NB_EMULATION::expand
#undef _mm_test_epi8_mask
#define _mm_test_epi8_mask NB_EMULATION::test_bytes
