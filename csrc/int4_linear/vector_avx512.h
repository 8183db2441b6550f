// Vector operations for AVX-512 (F, BW, DQ, VL), without and with VNNI. One vector is a panel's 16
// rows.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "../common/types.h"

namespace nibblock {
namespace {

struct Avx512Base {
  static constexpr int kLanes = 16, kBytes = 64;
  static constexpr int kRows = 6, kCols = 4;  // integer tile: 24 accumulators of 32 registers
  static constexpr int kDirectRows = kRows, kDirectCols = kCols, kDecodeCols = kCols;
  static constexpr bool kStepwise = false;
  static constexpr int kRowsF = 6, kColsF = 4;  // float tile (dx)
  static constexpr int64_t kDxRows = 512, kDxDepth = 64, kDxTiles = 1;
  static constexpr int kDxHeight = 12, kDxCols = 2;  // integer tile of dx: a group of 32
  static constexpr int64_t kDxUnits = 3;
  static constexpr int64_t kPrefetch = 1024;
  static constexpr int kPairLines = 0;  // VPDPBUSD adds in 32 bits
  static constexpr bool kSignedCodes = false;
  using I = __m512i;
  using F = __m512;

  static inline I load(const void* p) { return _mm512_loadu_si512(p); }
  static inline void store(void* p, I v) { _mm512_storeu_si512(p, v); }
  static inline I set1(int32_t v) { return _mm512_set1_epi32(v); }
  static inline I and_(I a, I b) { return _mm512_and_si512(a, b); }
  static inline I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static inline I sub16(I a, I b) { return _mm512_sub_epi16(a, b); }
  static inline I mulhrs(I a, I b) { return _mm512_mulhrs_epi16(a, b); }
  static inline I madd(I a, I b) { return _mm512_madd_epi16(a, b); }
  // The words of a, then those of b, as bytes.
  static inline I pack8(I a, I b) {
    const I order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    return _mm512_permutexvar_epi64(order, _mm512_packs_epi16(a, b));
  }
  static inline int32_t hsum(I v) { return static_cast<int32_t>(_mm512_reduce_add_epi32(v)); }
  static inline float hsumf(F v) { return _mm512_reduce_add_ps(v); }
  // bytes[2i], bytes[2i+1]: of 16 rows in 32-bit lanes, k0 k4 k1 k5 and k2 k6 k3 k7 of line i.
  // quads[i]: of 16 k in 32-bit lanes, rows 4i .. 4i+3; for int16, rows 0 2 1 3 of them, so that
  // the even bytes are a pair.
  template <int ACT>
  static inline void turn(const I* bytes, I* quads) {
    const __m128i quad = ACT == 8
                             ? _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)
                             : _mm_setr_epi8(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15);
    const I order = _mm512_broadcast_i32x4(quad);
    const I k = _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    I v[4];
    for (int i = 0; i < 4; ++i) v[i] = _mm512_shuffle_epi8(bytes[i], order);
    for (int odd = 0; odd < 2; ++odd) {  // 128-bit lanes: the rows 4i .. 4i+3 of each
      const I a =
          odd ? _mm512_shuffle_i32x4(v[0], v[1], 0xdd) : _mm512_shuffle_i32x4(v[0], v[1], 0x88);
      const I b =
          odd ? _mm512_shuffle_i32x4(v[2], v[3], 0xdd) : _mm512_shuffle_i32x4(v[2], v[3], 0x88);
      quads[odd] = _mm512_permutexvar_epi32(k, _mm512_shuffle_i32x4(a, b, 0x88));
      quads[odd + 2] = _mm512_permutexvar_epi32(k, _mm512_shuffle_i32x4(a, b, 0xdd));
    }
  }
  template <int S>
  static inline I shr16(I a) {
    return _mm512_srli_epi16(a, S);
  }
  template <int S>
  static inline I shr32(I a) {
    return _mm512_srli_epi32(a, S);
  }
  static inline I broadcast(const uint8_t* p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
  }
  using Operand = I;  // a vector of codes in a panel, as dot takes it
  static inline Operand operand(const uint8_t* p) { return load(p); }
  static inline F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static inline F set1f(float v) { return _mm512_set1_ps(v); }
  static inline F loadf(const void* p) { return _mm512_loadu_ps(p); }
  static inline void storef(void* p, F v) { _mm512_storeu_ps(p, v); }
  static inline F addf(F a, F b) { return _mm512_add_ps(a, b); }
  static inline F mulf(F a, F b) { return _mm512_mul_ps(a, b); }
  static inline F fmaf(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static inline void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }
  // 8 halves at a time, whatever the vector width.
  static inline void load_f16(const void* p, float* out) {
    _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))));
  }
  static inline void store_f16(const float* in, void* p) {
    _mm_storeu_si128(static_cast<__m128i*>(p),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in), _MM_FROUND_TO_NEAREST_INT));
  }
  // 16 bytes, and what VPSHUFB finds there for the places in the bytes of v.
  static inline I load_table(const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline I lookup(I table, I v) { return _mm512_shuffle_epi8(table, v); }
  static inline F load_half(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static inline F load_int8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  // out[j * stride ..] = the 16 lanes of row j after transposing 16 vectors.
  static inline void transpose_store(const F* v, float* out, int64_t stride) {
    F a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
      a[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
      a[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16;
         i += 4) {  // 128-bit lane q of b[i + j]: columns 4q + j, rows i .. i + 3
      b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
      b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
      b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
      b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (int j = 0; j < 4; ++j) {
      const F even = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88),
              odd = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);
      const F even2 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
      const F odd2 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
      storef(out + j * stride, _mm512_shuffle_f32x4(even, even2, 0x88));
      storef(out + (4 + j) * stride, _mm512_shuffle_f32x4(odd, odd2, 0x88));
      storef(out + (8 + j) * stride, _mm512_shuffle_f32x4(even, even2, 0xdd));
      storef(out + (12 + j) * stride, _mm512_shuffle_f32x4(odd, odd2, 0xdd));
    }
  }
};

struct Avx512 : Avx512Base {
  template <int ACT>
  static inline I dot(I acc, I w, I x) {
    static_assert(ACT == 16, "without VNNI int8 activations gain nothing: VPMADDUBSW saturates");
    return _mm512_add_epi32(acc, _mm512_madd_epi16(w, x));
  }
};

#if defined(__AVX512VNNI__) || defined(NIBBLOCK_EMULATE_AVX512)
struct Avx512Vnni : Avx512Base {
  // In assembly because GCC 12 copies the accumulator before each of these intrinsics.
  template <int ACT>
  static inline __attribute__((always_inline)) I dot(I acc, I w, I x) {
#ifdef NIBBLOCK_EMULATE_AVX512
    return ACT == 16 ? _mm512_dpwssd_epi32(acc, w, x) : _mm512_dpbusd_epi32(acc, w, x);
#endif
    if (ACT == 16) {
      __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    } else {
      __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    }
    return acc;
  }
};
#endif

}  // namespace
}  // namespace nibblock
