// How the bodies of decoder_ops read, write and exponentiate elements, eight at a time.
#pragma once

#include "../common/kernel.h"
#include "../common/types.h"

namespace nibblock {
namespace {

// Eight lanes: one register of AVX2, two of the baseline; the same operations either way. (GCC does
// not vectorise these loops by itself: it would have to compare what the source does not.)
typedef float F8 __attribute__((vector_size(32)));
typedef uint16_t H8 __attribute__((vector_size(16)));
typedef uint32_t U8 __attribute__((vector_size(32)));
constexpr int64_t kLanes = 8;

template <class V>
NB_INLINE V load_as(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// bfloat16, ties to even; NaN stays NaN (quiet): f32_to_bf16, eight at a time.
NB_INLINE U8 bf16_bits(F8 v) {
  const U8 bits = (U8)v;
  const U8 even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : even;
}

struct F32 {
  using Stored = float;
  static float load(float v) { return v; }
  static float store(float v) { return v; }
  NB_INLINE F8 load8(const float* p) { return load_as<F8>(p); }
  NB_INLINE void store8(float* p, F8 v) { __builtin_memcpy(p, &v, sizeof v); }
  NB_INLINE F8 round8(F8 v) { return v; }  // to what a stored element holds
};
struct BF16 {
  using Stored = uint16_t;
  static float load(uint16_t v) { return bf16_to_f32(v); }
  static uint16_t store(float v) { return f32_to_bf16(v); }
  NB_INLINE F8 load8(const uint16_t* p) {
    return (F8)(__builtin_convertvector(load_as<H8>(p), U8) << 16);
  }
  NB_INLINE void store8(uint16_t* p, F8 v) {
    const H8 h = __builtin_convertvector(bf16_bits(v), H8);
    __builtin_memcpy(p, &h, sizeof h);
  }
  NB_INLINE F8 round8(F8 v) { return (F8)(bf16_bits(v) << 16); }
};
struct F16 {
  using Stored = uint16_t;
  static float load(uint16_t v) { return f16_to_f32(v); }
  static uint16_t store(float v) { return f32_to_f16(v); }
  NB_INLINE F8 load8(const uint16_t* p) {
    float v[kLanes];
    for (int i = 0; i < kLanes; ++i) v[i] = load(p[i]);
    return load_as<F8>(v);
  }
  NB_INLINE void store8(uint16_t* p, F8 v) {
    for (int i = 0; i < kLanes; ++i) p[i] = store(v[i]);
  }
  NB_INLINE F8 round8(F8 v) {
    for (int i = 0; i < kLanes; ++i) v[i] = load(store(v[i]));
    return v;
  }
};

NB_INLINE F8 load8(const float* p) { return F32::load8(p); }
NB_INLINE F8 load8(const uint16_t* p) { return BF16::load8(p); }  // (attend has no float16)
NB_INLINE void store8(float* p, F8 v) { F32::store8(p, v); }

// n elements, at most 8; the lanes behind them are zero, and are not written.
template <class T>
NB_INLINE F8 load_some(const typename T::Stored* p, int64_t n) {
  if (n >= kLanes) return T::load8(p);
  typename T::Stored some[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) some[i] = p[i];
  return T::load8(some);
}
template <class T>
NB_INLINE void store_some(typename T::Stored* p, F8 v, int64_t n) {
  if (n >= kLanes) return T::store8(p, v);
  typename T::Stored some[kLanes];
  T::store8(some, v);
  for (int64_t i = 0; i < n; ++i) p[i] = some[i];
}

NB_INLINE float total(F8 v) {
  typedef float F4 __attribute__((vector_size(16)));
  const F4 low = __builtin_shufflevector(v, v, 0, 1, 2, 3);
  const F4 four = low + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  const F4 two = four + __builtin_shufflevector(four, four, 2, 3, 0, 1);
  return two[0] + two[1];
}

// exp(v) for v <= 88, within 2 ulp: v = n ln 2 + r with |r| <= ln 2 / 2, a polynomial for exp(r),
// and n added to the exponent. Below -87 it stays at exp(-87): silu only needs 1 + exp, and
// v / (1 + exp(-v)) there; to a softmax it is nothing. NaN stays.
NB_INLINE F8 exp_clamped(F8 v) {
  typedef int32_t I8 __attribute__((vector_size(32)));
  const F8 low = F8{} - 87.0f, high = F8{} + 88.0f;
  v = v < low ? low : v;
  v = v > high ? high : v;
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const F8 n = (v * 1.44269504f + shift) - shift;
  // ln 2 in two parts: n * 0.693359375 is exact.
  const F8 r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  F8 e = F8{} + 1.0f / 5040.0f;
  e = e * r + 1.0f / 720.0f;
  e = e * r + 1.0f / 120.0f;
  e = e * r + 1.0f / 24.0f;
  e = e * r + 1.0f / 6.0f;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  return (F8)((I8)e + (__builtin_convertvector(n, I8) << 23));
}

template <class P, class F32Body, class BF16Body, class F16Body>
auto by_type(const P& p, F32Body f32, BF16Body bf16, F16Body f16) {
  if (p.type == Dtype::kF32) return f32(p);
  if (p.type == Dtype::kBF16) return bf16(p);
  return f16(p);
}

}  // namespace
}  // namespace nibblock
