// The bodies of the norms, the rotation and silu * up, compiled for the baseline and for AVX2: the
// same loops, the same bits.
#pragma once

#include <math.h>

#include "decoder_ops.h"
#include "elements.h"

namespace nibblock {
namespace {

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

// y[0 .. n) = silu(gate) * up, n <= 8.
template <class T>
NB_INLINE void silu_mul_lanes(const typename T::Stored* gate, const typename T::Stored* up, int n,
                              typename T::Stored* y) {
  float in[kLanes] = {}, out[kLanes];
  for (int i = 0; i < n; ++i) in[i] = T::load(gate[i]);
  const F8 g = load8(in);
  store8(out, g / (1.0f + exp_clamped(-g)));
  for (int i = 0; i < n; ++i) y[i] = T::store(rounded<T>(out[i]) * T::load(up[i]));
}

template <class T>
void silu_mul_as(const SiluMulParams& p) {
  using S = typename T::Stored;
  for (int64_t r = 0; r < p.rows; ++r) {
    const S* gate = static_cast<const S*>(p.gate) + r * p.stride;
    const S* up = static_cast<const S*>(p.up) + r * p.stride;
    S* y = static_cast<S*>(p.y) + r * p.width;
    int64_t i = 0;
    for (; i + kLanes <= p.width; i += kLanes) silu_mul_lanes<T>(gate + i, up + i, kLanes, y + i);
    if (i < p.width) silu_mul_lanes<T>(gate + i, up + i, static_cast<int>(p.width - i), y + i);
  }
}

}  // namespace
}  // namespace nibblock
