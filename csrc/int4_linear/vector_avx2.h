// Vector operations for AVX2 + FMA + F16C. A panel's 16 rows are taken in two halves of 8 lanes.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "../common/types.h"

namespace nibblock {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8, kBytes = 32;
  // Integer tile: 12 sums, a broadcast and a product in 16 registers; codes come from L1 with each
  // multiply. No sum may spill: on Zen 3 reloading what was just stored takes longer than a step.
  static constexpr int kRows = 3, kCols = 4;
  static constexpr int kDirectRows = 4, kDirectCols = 2, kDecodeCols = 4;
  static constexpr bool kStepwise = true;
  static constexpr int kRowsF = 6, kColsF = 2;  // float tile (dx)
  static constexpr int64_t kDxRows = 256, kDxDepth = 64, kDxTiles = 6;
  static constexpr int kDxHeight = kRows, kDxCols = kCols;  // integer tile of dx: 32 k or less
  static constexpr int64_t kDxUnits = 3;
  static constexpr int64_t kPrefetch = 1024;
  static constexpr int kPairLines = 0;         // Avx2Bytes
  static constexpr bool kSignedCodes = false;  // Avx2Turned
  using I = __m256i;
  using F = __m256;

  static inline I load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static inline void store(void* p, I v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static inline I set1(int32_t v) { return _mm256_set1_epi32(v); }
  static inline I and_(I a, I b) { return _mm256_and_si256(a, b); }
  static inline I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static inline I sub16(I a, I b) { return _mm256_sub_epi16(a, b); }
  static inline I mulhrs(I a, I b) { return _mm256_mulhrs_epi16(a, b); }
  static inline I madd(I a, I b) { return _mm256_madd_epi16(a, b); }
  // The words of a, then those of b, as bytes.
  static inline I pack8(I a, I b) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8);
  }
  static inline int32_t hsum(I v) {
    const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i two = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
  }
  static inline float hsumf(F v) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  // bytes[0], bytes[1]: of 8 rows in 32-bit lanes, k0 k4 k1 k5 and k2 k6 k3 k7. quads[i]: of 8 k in
  // 32-bit lanes, rows 4i .. 4i+3; for int16, rows 0 2 1 3 of them, so that the even bytes are a
  // pair.
  template <int ACT>
  static inline void turn(const I* bytes, I* quads) {
    const I order = ACT == 8
                        ? _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                           0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)
                        : _mm256_setr_epi8(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15,  //
                                           0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15);
    const I a = _mm256_shuffle_epi8(bytes[0], order), b = _mm256_shuffle_epi8(bytes[1], order);
    const I k = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    quads[0] = _mm256_permutevar8x32_epi32(_mm256_permute2x128_si256(a, b, 0x20), k);
    quads[1] = _mm256_permutevar8x32_epi32(_mm256_permute2x128_si256(a, b, 0x31), k);
  }
  template <int S>
  static inline I shr16(I a) {
    return _mm256_srli_epi16(a, S);
  }
  template <int S>
  static inline I shr32(I a) {
    return _mm256_srli_epi32(a, S);
  }
  static inline I broadcast(const uint8_t* p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
  }
  // In assembly to keep each multiply beside its addition: GCC 12 otherwise starts all products
  // first and spills the accumulators.
  template <int ACT>
  static inline __attribute__((always_inline)) I dot(I acc, I w, I x) {
    static_assert(ACT == 16, "VPMADDUBSW would saturate with 8-bit codes");
    I product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
            : "+x"(acc), "=&x"(product)
            : "x"(w), "x"(x));
    return acc;
  }
  // A vector of codes in a panel, as dot takes it.
  struct Operand {
    const I* at;
  };
  static inline Operand operand(const uint8_t* p) { return {reinterpret_cast<const I*>(p)}; }
  template <int ACT>
  static inline __attribute__((always_inline)) I dot(I acc, Operand w, I x) {
    static_assert(ACT == 16, "VPMADDUBSW would saturate with 8-bit codes");
    I product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
            : "+x"(acc), "=&x"(product)
            : "x"(x), "m"(*w.at));
    return acc;
  }
  static inline F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static inline I to_integer(F v) { return _mm256_cvtps_epi32(v); }
  static inline F as_float(I v) { return _mm256_castsi256_ps(v); }
  static inline I max(I a, I b) { return _mm256_max_epi32(a, b); }
  // The low 16 bits of each lane in both its halves.
  static inline I twice16(I v) {
    return _mm256_or_si256(_mm256_and_si256(v, set1(0xffff)), _mm256_slli_epi32(v, 16));
  }
  // In each lane `below` where v < limit, else `other`.
  static inline F select_below(F v, float limit, float below, float other) {
    return _mm256_blendv_ps(set1f(other), set1f(below), _mm256_cmp_ps(v, set1f(limit), _CMP_LT_OQ));
  }
  static inline F quotient_or_zero(float a, F b) {
    const F quotient = _mm256_div_ps(set1f(a), b);
    return _mm256_andnot_ps(_mm256_cmp_ps(b, _mm256_setzero_ps(), _CMP_EQ_OQ), quotient);
  }
  static inline F set1f(float v) { return _mm256_set1_ps(v); }
  static inline F loadf(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
  static inline void storef(void* p, F v) { _mm256_storeu_ps(static_cast<float*>(p), v); }
  static inline F addf(F a, F b) { return _mm256_add_ps(a, b); }
  static inline F mulf(F a, F b) { return _mm256_mul_ps(a, b); }
  static inline F fmaf(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
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
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline I lookup(I table, I v) { return _mm256_shuffle_epi8(table, v); }
  static inline F load_half(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline F load_int8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  // out[j * stride ..] = the 8 lanes of row j after transposing 8 vectors.
  static inline void transpose_store(const F* v, float* out, int64_t stride) {
    const F a0 = _mm256_unpacklo_ps(v[0], v[1]), a1 = _mm256_unpackhi_ps(v[0], v[1]);
    const F a2 = _mm256_unpacklo_ps(v[2], v[3]), a3 = _mm256_unpackhi_ps(v[2], v[3]);
    const F a4 = _mm256_unpacklo_ps(v[4], v[5]), a5 = _mm256_unpackhi_ps(v[4], v[5]);
    const F a6 = _mm256_unpacklo_ps(v[6], v[7]), a7 = _mm256_unpackhi_ps(v[6], v[7]);
    const F b0 = _mm256_shuffle_ps(a0, a2, 0x44), b1 = _mm256_shuffle_ps(a0, a2, 0xee);
    const F b2 = _mm256_shuffle_ps(a1, a3, 0x44), b3 = _mm256_shuffle_ps(a1, a3, 0xee);
    const F b4 = _mm256_shuffle_ps(a4, a6, 0x44), b5 = _mm256_shuffle_ps(a4, a6, 0xee);
    const F b6 = _mm256_shuffle_ps(a5, a7, 0x44), b7 = _mm256_shuffle_ps(a5, a7, 0xee);
    const F lo[4] = {b0, b1, b2, b3}, hi[4] = {b4, b5, b6, b7};
    for (int j = 0; j < 4; ++j) {
      storef(out + j * stride, _mm256_permute2f128_ps(lo[j], hi[j], 0x20));
      storef(out + (j + 4) * stride, _mm256_permute2f128_ps(lo[j], hi[j], 0x31));
    }
  }
};

// int8 activations with 4-bit codes. VPMADDUBSW multiplies 32 pairs and adds neighbours in 16 bits;
// a pair of products is at most 2 * 15 * 127 = 3810, so eight of them fit before they have to be
// widened: 18 instructions for 8 * 32 multiply-adds, where VPMADDWD takes 32. With 8-bit codes one
// pair alone would saturate: those stay with int16. The 32-bit sums
// of a tile wait on the stack meanwhile.
struct Avx2Bytes : Avx2 {
  static constexpr int kRows = 6, kCols = 2;
  static constexpr int kDxHeight = kRows, kDxCols = kCols;
  static constexpr int kPairLines = 4;  // a line of 8 k is two steps
  template <int ACT>
  static inline __attribute__((always_inline)) I dot(I acc, I w, I x) {
    static_assert(ACT == 8, "int16 activations are Avx2's");
    return _mm256_add_epi32(acc, sum_pairs(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
  }
  // In assembly for the same reason as Avx2::dot.
  static inline __attribute__((always_inline)) I add_pairs(I pairs, I w, I x) {
    I product;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
            : "+x"(pairs), "=&x"(product)
            : "x"(w), "x"(x));
    return pairs;
  }
  static inline I sum_pairs(I pairs, I ones) { return _mm256_madd_epi16(pairs, ones); }
  // 1 in 16 bits, made where it stands: held over a tile's products, it would push one of their
  // operands out of the registers.
  static inline I ones_here() {
    I ones;
    __asm__ volatile("vpcmpeqw %0, %0, %0\n\tvpsrlw $15, %0, %0" : "=x"(ones));
    return ones;
  }
};

// For dx. There scaled rows are made anew for every group, while what codes need is done once: the
// zero point is off the codes, which are signed, and rows are unsigned, 128 too large, which the
// sums take off by column. A pair is at most 2 * 255 * 8 = 4080, and eight of them 32640.
struct Avx2Turned : Avx2Bytes {
  static constexpr bool kSignedCodes = true;
  static inline __attribute__((always_inline)) I add_pairs(I pairs, I w, I x) {
    return Avx2Bytes::add_pairs(pairs, x, w);
  }
  static inline I xor_(I a, I b) { return _mm256_xor_si256(a, b); }
  template <int S>
  static inline I shl32(I a) {
    return _mm256_slli_epi32(a, S);
  }
  static inline I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static inline I sub8(I a, I b) { return _mm256_sub_epi8(a, b); }
  // The words of a, then those of b, as bytes, with the eights 1 and 2 exchanged.
  static inline I pack8(I a, I b) { return _mm256_packs_epi16(a, b); }
  // The sums of the lanes of four vectors, as floats: they may exceed 32 bits.
  static inline void sums_of_four(const I* v, float* out) {
    const F all = _mm256_hadd_ps(_mm256_hadd_ps(to_float(v[0]), to_float(v[1])),
                                 _mm256_hadd_ps(to_float(v[2]), to_float(v[3])));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
};

}  // namespace
}  // namespace nibblock
