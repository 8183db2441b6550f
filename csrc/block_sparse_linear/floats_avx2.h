// What the block-sparse kernels need of AVX2 beyond csrc/int4_linear/vector_avx2.h: vectors of 8
// float32 from and to the three float types, and sums across lanes.
#pragma once

#include "../int4_linear/vector_avx2.h"

namespace nibblock {
namespace {

struct FloatBits {  // element types by name, so that a template can ask for one
  struct F32 {};
  struct BF16 {};
  struct F16 {};
};

struct Floats2 : Avx2 {
  static constexpr int tile_rows(int) { return 6; }  // 6 x 2 sums of 16 registers
  static constexpr bool kRowsInPlace = true;

  // a + v, and the bits of a where v is 0 or -0: -0 + 0 would be +0, but -0 - (+0) is -0.
  static inline F add_keeping(F a, F v) {
    return _mm256_sub_ps(a, _mm256_sub_ps(_mm256_setzero_ps(), v));
  }
  // Always inline: GCC 12 takes a function that only prefetches for one without effects and may
  // drop its calls.
  static inline __attribute__((always_inline)) void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }
  static inline F load_as(FloatBits::F32, const void* p) { return loadf(p); }
  static inline F load_as(FloatBits::BF16, const void* p) {
    const __m128i h = _mm_loadu_si128(static_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  static inline F load_as(FloatBits::F16, const void* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  static inline F load_i16(const void* p) {
    const __m128i h = _mm_loadu_si128(static_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(h));
  }
  static inline void store_as(FloatBits::F32, void* p, F v) { storef(p, v); }
  static inline void store_as(FloatBits::BF16, void* p, F v) {  // f32_to_bf16 of common/types.h
    const __m256i b = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(b, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(b, _mm256_set1_epi32(0x00400000));
    const __m256i r = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
    const __m128i packed =
        _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
    _mm_storeu_si128(static_cast<__m128i*>(p), packed);
  }
  static inline void store_as(FloatBits::F16, void* p, F v) {
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  // Lane i of the result is the sum of the lanes of v[i].
  static inline F sum_lanes(const F* v) {
    const F a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const F b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
};

}  // namespace
}  // namespace nibblock
