// What the block-sparse kernels need of AVX-512 beyond csrc/int4_linear/vector_avx512.h: vectors of
// 16 float32 from and to the three float types, and sums across lanes.
#pragma once

#include "../int4_linear/vector_avx512.h"

namespace nibblock {
namespace {

struct FloatBits {  // element types by name, so that a template can ask for one
  struct F32 {};
  struct BF16 {};
  struct F16 {};
};

struct Floats512 : Avx512Base {
  // Rows of x in a register tile of `cols` vectors: 16 x 1, 12 x 2 or 6 x 4 sums of 32 registers.
  static constexpr int tile_rows(int cols) { return cols == 1 ? 16 : cols == 2 ? 12 : 6; }
  static constexpr bool kRowsInPlace = false;  // up to 16 rows a tile

  // a + v, and the bits of a where v is 0 or -0: -0 + 0 would be +0, but -0 - (+0) is -0.
  static inline F add_keeping(F a, F v) {
    return _mm512_sub_ps(a, _mm512_sub_ps(_mm512_setzero_ps(), v));
  }
  // Always inline: GCC 12 takes a function that only prefetches for one without effects and may
  // drop its calls.
  static inline __attribute__((always_inline)) void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }
  static inline F load_as(FloatBits::F32, const void* p) { return _mm512_loadu_ps(p); }
  static inline F load_as(FloatBits::BF16, const void* p) {
    const __m256i h = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  static inline F load_as(FloatBits::F16, const void* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  }
  static inline F load_i16(const void* p) {
    const __m256i h = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(h));
  }
  static inline void store_as(FloatBits::F32, void* p, F v) { _mm512_storeu_ps(p, v); }
  static inline void store_as(FloatBits::BF16, void* p, F v) {  // f32_to_bf16 of common/types.h
    const __m512i b = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i r = _mm512_mask_or_epi32(up, nan, b, _mm512_set1_epi32(0x00400000));
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
  }
  static inline void store_as(FloatBits::F16, void* p, F v) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  // Lane i of the result is the sum of the lanes of v[i].
  static inline F sum_lanes(const F* v) {
    F quad[4];
    for (int i = 0; i < 4; ++i) {
      const F ab = _mm512_add_ps(_mm512_unpacklo_ps(v[4 * i], v[4 * i + 1]),
                                 _mm512_unpackhi_ps(v[4 * i], v[4 * i + 1]));
      const F cd = _mm512_add_ps(_mm512_unpacklo_ps(v[4 * i + 2], v[4 * i + 3]),
                                 _mm512_unpackhi_ps(v[4 * i + 2], v[4 * i + 3]));
      const __m512d p = _mm512_castps_pd(ab), q = _mm512_castps_pd(cd);
      quad[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)),
                              _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
    }
    const F low = _mm512_add_ps(_mm512_shuffle_f32x4(quad[0], quad[1], 0x88),
                                _mm512_shuffle_f32x4(quad[0], quad[1], 0xdd));
    const F high = _mm512_add_ps(_mm512_shuffle_f32x4(quad[2], quad[3], 0x88),
                                 _mm512_shuffle_f32x4(quad[2], quad[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88),
                         _mm512_shuffle_f32x4(low, high, 0xdd));
  }
};

}  // namespace
}  // namespace nibblock
