// What the masked updates need of AVX-512 beyond csrc/block_sparse_linear/floats_avx512.h: exact
// division and square root, scattered entries, masks, and sums in float64.
#pragma once

#include "../block_sparse_linear/floats_avx512.h"

namespace nibblock {
namespace {

struct Update512 : Floats512 {
  static constexpr bool kExpand = true;
  using D = __m512d;

  static inline F subf(F a, F b) { return _mm512_sub_ps(a, b); }
  static inline F divf(F a, F b) { return _mm512_div_ps(a, b); }
  static inline F sqrtf(F a) { return _mm512_sqrt_ps(a); }

  // Past the caches; p is a multiple of the vector's bytes.
  static inline void stream_as(FloatBits::F32, void* p, F v) {
    _mm512_stream_ps(static_cast<float*>(p), v);
  }
  static inline void stream_as(FloatBits::BF16, void* p, F v) {
    alignas(32) uint16_t half[16];
    store_as(FloatBits::BF16{}, half, v);
    _mm256_stream_si256(static_cast<__m256i*>(p),
                        _mm256_load_si256(reinterpret_cast<const __m256i*>(half)));
  }

  static inline F gather(FloatBits::F32, const void* p, const int32_t* index) {
    return _mm512_i32gather_ps(_mm512_loadu_si512(index), p, 4);
  }
  static inline F gather(FloatBits::F32, const void* p, const int64_t* index) {
    const __m256 low = _mm512_i64gather_ps(_mm512_loadu_si512(index), p, 4);
    const __m256 high = _mm512_i64gather_ps(_mm512_loadu_si512(index + 8), p, 4);
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
  }
  static inline void scatter(FloatBits::F32, void* p, const int32_t* index, F v) {
    _mm512_i32scatter_ps(p, _mm512_loadu_si512(index), v, 4);
  }
  static inline void scatter(FloatBits::F32, void* p, const int64_t* index, F v) {
    _mm512_i64scatter_ps(p, _mm512_loadu_si512(index), _mm512_castps512_ps256(v), 4);
    _mm512_i64scatter_ps(p, _mm512_loadu_si512(index + 8), _mm512_extractf32x8_ps(v, 1), 4);
  }
  template <class I>
  static inline F gather(FloatBits::BF16 tag, const void* p, const I* index) {
    alignas(32) uint16_t half[16];
    for (int i = 0; i < 16; ++i) half[i] = static_cast<const uint16_t*>(p)[index[i]];
    return load_as(tag, half);
  }
  template <class I>
  static inline void scatter(FloatBits::BF16 tag, void* p, const I* index, F v) {
    alignas(32) uint16_t half[16];
    store_as(tag, half, v);
    for (int i = 0; i < 16; ++i) static_cast<uint16_t*>(p)[index[i]] = half[i];
  }

  // Bit i: whether byte i of 16 is set; `count` of them are there.
  using Mask = __mmask16;
  static inline Mask mask_of(const uint8_t* p, int64_t count) {
    const Mask live = count >= 16 ? 0xffff : static_cast<Mask>((1u << count) - 1);
    const __m128i bytes = _mm_maskz_loadu_epi8(live, p);
    return _mm_test_epi8_mask(bytes, bytes);
  }
  static inline int64_t ones(Mask k) { return __builtin_popcount(k); }
  static inline F load_masked(FloatBits::F32, Mask k, const void* p) {
    return _mm512_maskz_loadu_ps(k, p);
  }
  static inline F load_masked(FloatBits::BF16, Mask k, const void* p) {
    const __m256i h = _mm256_maskz_loadu_epi16(k, p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  static inline void store_masked(FloatBits::F32, Mask k, void* p, F v) {
    _mm512_mask_storeu_ps(p, k, v);
  }
  static inline void store_masked(FloatBits::BF16 tag, Mask k, void* p, F v) {
    alignas(32) uint16_t half[16];
    store_as(tag, half, v);
    _mm256_mask_storeu_epi16(p, k, _mm256_load_si256(reinterpret_cast<const __m256i*>(half)));
  }
  // v where k is set, +0 elsewhere.
  static inline F keep(Mask k, F v) { return _mm512_maskz_mov_ps(k, v); }
  // The packed floats at p, one for each lane of k; the others are zero.
  static inline F expand(Mask k, const float* p) {
    const Mask low = static_cast<Mask>((1u << ones(k)) - 1);
    return _mm512_maskz_expand_ps(k, _mm512_maskz_loadu_ps(low, p));
  }
  static inline void compress(Mask k, float* p, F v) {
    const Mask low = static_cast<Mask>((1u << ones(k)) - 1);
    // Not VCOMPRESSPS to memory: some CPUs take a hundred cycles for it.
    _mm512_mask_storeu_ps(p, low, _mm512_maskz_compress_ps(k, v));
  }

  static inline D zerod() { return _mm512_setzero_pd(); }
  // sum + the squares of v, exact products in float64; half its lanes a time.
  static inline D add_squares(D sum, F v) {
    const D low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const D high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    return _mm512_fmadd_pd(high, high, _mm512_fmadd_pd(low, low, sum));
  }
  static inline double total(D sum) {
    alignas(64) double lane[8];
    _mm512_store_pd(lane, sum);
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) +
           ((lane[1] + lane[5]) + (lane[3] + lane[7]));
  }
};

}  // namespace
}  // namespace nibblock
