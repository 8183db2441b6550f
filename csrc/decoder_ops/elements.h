// How the bodies of decoder_ops read, write and exponentiate single elements.
#pragma once

#include "../common/kernel.h"
#include "../common/types.h"

namespace nibblock {
namespace {

struct F32 {
  using Stored = float;
  static float load(float v) { return v; }
  static float store(float v) { return v; }
};
struct BF16 {
  using Stored = uint16_t;
  static float load(uint16_t v) { return bf16_to_f32(v); }
  static uint16_t store(float v) { return f32_to_bf16(v); }
};
struct F16 {
  using Stored = uint16_t;
  static float load(uint16_t v) { return f16_to_f32(v); }
  static uint16_t store(float v) { return f32_to_f16(v); }
};

template <class T>
NB_INLINE float rounded(float v) {
  return T::load(T::store(v));
}

// Eight lanes: one register of AVX2, two of the baseline; the same operations either way. (GCC does
// not vectorise the loops below by itself: it would have to compare what the source does not.)
typedef float F8 __attribute__((vector_size(32)));
constexpr int64_t kLanes = 8;

NB_INLINE F8 load8(const float* p) {
  F8 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
NB_INLINE F8 load8(const uint16_t* p) {  // bfloat16
  typedef uint16_t U8 __attribute__((vector_size(16)));
  typedef uint32_t W8 __attribute__((vector_size(32)));
  U8 v;
  __builtin_memcpy(&v, p, sizeof v);
  return (F8)(__builtin_convertvector(v, W8) << 16);
}
NB_INLINE void store8(float* p, F8 v) { __builtin_memcpy(p, &v, sizeof v); }

// exp(v) for v <= 88, within 2 ulp: v = n ln 2 + r with |r| <= ln 2 / 2, a polynomial for exp(r),
// and n added to the exponent. Below -87 it stays at exp(-87): silu_mul only needs 1 + exp, and
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
