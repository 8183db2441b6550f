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

// exp(v) for v <= 88, within 2 ulp: v = n ln 2 + r with |r| <= ln 2 / 2, a polynomial for exp(r),
// and n added to the exponent. Branch-free, so that the loop around it vectorises. Below -87 it
// stays at exp(-87): silu_mul only needs 1 + exp, and v / (1 + exp(-v)) there.
NB_INLINE float exp_clamped(float v) {
  v = v < -87.0f ? -87.0f : v;
  v = v > 88.0f ? 88.0f : v;
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = (v * 1.44269504f + shift) - shift;
  // ln 2 in two parts: n * 0.693359375 is exact.
  const float r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  float e = 1.0f / 5040.0f;
  e = e * r + 1.0f / 720.0f;
  e = e * r + 1.0f / 120.0f;
  e = e * r + 1.0f / 24.0f;
  e = e * r + 1.0f / 6.0f;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  const int32_t bits = static_cast<int32_t>(n) * (1 << 23);
  return bits_to_f32(f32_to_bits(e) + static_cast<uint32_t>(bits));
}

template <class P, class F32Body, class BF16Body, class F16Body>
auto by_type(const P& p, F32Body f32, BF16Body bf16, F16Body f16) {
  if (p.type == Dtype::kF32) return f32(p);
  if (p.type == Dtype::kBF16) return bf16(p);
  return f16(p);
}

}  // namespace
}  // namespace nibblock
