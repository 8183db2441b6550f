// What the masked updates need of AVX2 beyond csrc/block_sparse_linear/floats_avx2.h: exact
// division and square root, scattered entries, and sums in float64.
#pragma once

#include "../block_sparse_linear/floats_avx2.h"

namespace nibblock {
namespace {

struct Update2 : Floats2 {
  static constexpr bool kExpand = false;  // partial chunks of a bool mask go as lists of positions
  using D = __m256d;

  static inline F subf(F a, F b) { return _mm256_sub_ps(a, b); }
  static inline F divf(F a, F b) { return _mm256_div_ps(a, b); }
  static inline F sqrtf(F a) { return _mm256_sqrt_ps(a); }

  // Past the caches; p is a multiple of the vector's bytes.
  static inline void stream_as(FloatBits::F32, void* p, F v) {
    _mm256_stream_ps(static_cast<float*>(p), v);
  }
  static inline void stream_as(FloatBits::BF16, void* p, F v) {
    alignas(16) uint16_t half[8];
    store_as(FloatBits::BF16{}, half, v);
    _mm_stream_si128(static_cast<__m128i*>(p),
                     _mm_load_si128(reinterpret_cast<const __m128i*>(half)));
  }

  static inline F gather(FloatBits::F32, const void* p, const int32_t* index) {
    const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
    return _mm256_i32gather_ps(static_cast<const float*>(p), at, 4);
  }
  static inline F gather(FloatBits::F32, const void* p, const int64_t* index) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index + 4));
    const float* f = static_cast<const float*>(p);
    return _mm256_set_m128(_mm256_i64gather_ps(f, b, 4), _mm256_i64gather_ps(f, a, 4));
  }
  template <class I>
  static inline void scatter(FloatBits::F32, void* p, const I* index, F v) {
    alignas(32) float lane[8];
    _mm256_store_ps(lane, v);
    for (int i = 0; i < 8; ++i) static_cast<float*>(p)[index[i]] = lane[i];
  }
  template <class I>
  static inline F gather(FloatBits::BF16 tag, const void* p, const I* index) {
    alignas(16) uint16_t half[8];
    for (int i = 0; i < 8; ++i) half[i] = static_cast<const uint16_t*>(p)[index[i]];
    return load_as(tag, half);
  }
  template <class I>
  static inline void scatter(FloatBits::BF16 tag, void* p, const I* index, F v) {
    alignas(16) uint16_t half[8];
    store_as(tag, half, v);
    for (int i = 0; i < 8; ++i) static_cast<uint16_t*>(p)[index[i]] = half[i];
  }

  static inline D zerod() { return _mm256_setzero_pd(); }
  // sum + the squares of v, exact products in float64; half its lanes a time.
  static inline D add_squares(D sum, F v) {
    const D low = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
    const D high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    return _mm256_fmadd_pd(high, high, _mm256_fmadd_pd(low, low, sum));
  }
  static inline double total(D sum) {
    alignas(32) double lane[4];
    _mm256_store_pd(lane, sum);
    return (lane[0] + lane[2]) + (lane[1] + lane[3]);
  }
};

}  // namespace
}  // namespace nibblock
