// The bodies of decoder_ops, for the baseline instruction set.
#include "decoder_ops.h"

#include <math.h>

#include "../common/kernel.h"

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

// Sixteen running sums, so that the additions neither wait for each other nor depend on the width
// of the instructions; combined in a fixed order.
template <class T>
float sum_of_squares(const typename T::Stored* x, int64_t n) {
  float sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    NB_UNROLL
    for (int j = 0; j < 16; ++j) {
      const float v = T::load(x[i + j]);
      sums[j] += v * v;
    }
  }
  for (int j = 0; i < n; ++i, ++j) {
    const float v = T::load(x[i]);
    sums[j] += v * v;
  }
  for (int half = 8; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  return sums[0];
}

template <class T>
void add_rms_norm_as(const AddRmsNormParams& p) {
  using S = typename T::Stored;
  const S* weight = static_cast<const S*>(p.weight);
  for (int64_t r = 0; r < p.rows; ++r) {
    const S* x = static_cast<const S*>(p.x) + r * p.width;
    S* y = static_cast<S*>(p.y) + r * p.width;
    if (p.delta) {
      const S* delta = static_cast<const S*>(p.delta) + r * p.width;
      S* sum = static_cast<S*>(p.sum) + r * p.width;
      for (int64_t i = 0; i < p.width; ++i) sum[i] = T::store(T::load(x[i]) + T::load(delta[i]));
      x = sum;
    }
    const float mean = sum_of_squares<T>(x, p.width) / static_cast<float>(p.width);
    const float scale = 1.0f / sqrtf(mean + p.eps);
    for (int64_t i = 0; i < p.width; ++i)
      y[i] = T::store(rounded<T>(T::load(x[i]) * scale) * T::load(weight[i]));
  }
}

template <class T>
void rotate_as(const RotateParams& p) {
  using S = typename T::Stored;
  const int64_t half = p.dim / 2;
  for (int64_t r = 0; r < p.rows; ++r) {
    const S* cos = static_cast<const S*>(p.cos) + r * p.table_stride;
    const S* sin = static_cast<const S*>(p.sin) + r * p.table_stride;
    for (int64_t h = 0; h < p.heads; ++h) {
      S* a = static_cast<S*>(p.y) + r * p.y_stride + h * p.dim;
      S* b = a + half;
      for (int64_t i = 0; i < half; ++i) {
        const float u = T::load(a[i]), v = T::load(b[i]);
        a[i] = T::store(rounded<T>(u * T::load(cos[i])) + rounded<T>(-v * T::load(sin[i])));
        b[i] = T::store(rounded<T>(v * T::load(cos[half + i])) +
                        rounded<T>(u * T::load(sin[half + i])));
      }
    }
  }
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

template <class T>
void silu_mul_as(const SiluMulParams& p) {
  using S = typename T::Stored;
  for (int64_t r = 0; r < p.rows; ++r) {
    const S* gate = static_cast<const S*>(p.gate) + r * p.stride;
    const S* up = static_cast<const S*>(p.up) + r * p.stride;
    S* y = static_cast<S*>(p.y) + r * p.width;
    for (int64_t i = 0; i < p.width; ++i) {
      const float g = T::load(gate[i]);
      // NaN passes both clamps of exp_clamped as a number, but g itself keeps it.
      y[i] = T::store(rounded<T>(g / (1.0f + exp_clamped(-g))) * T::load(up[i]));
    }
  }
}

template <class P, class F32Body, class BF16Body, class F16Body>
void by_type(const P& p, F32Body f32, BF16Body bf16, F16Body f16) {
  if (p.type == Dtype::kF32) return f32(p);
  if (p.type == Dtype::kBF16) return bf16(p);
  f16(p);
}

}  // namespace

void add_rms_norm(const AddRmsNormParams& p) {
  by_type(p, add_rms_norm_as<F32>, add_rms_norm_as<BF16>, add_rms_norm_as<F16>);
}
void rotate(const RotateParams& p) { by_type(p, rotate_as<F32>, rotate_as<BF16>, rotate_as<F16>); }
void silu_mul(const SiluMulParams& p) {
  by_type(p, silu_mul_as<F32>, silu_mul_as<BF16>, silu_mul_as<F16>);
}

}  // namespace nibblock
