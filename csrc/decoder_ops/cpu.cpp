// The bodies of decoder_ops, for the baseline instruction set.
#include "decoder_ops.h"

#include <math.h>

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

}  // namespace

void add_rms_norm(const AddRmsNormParams& p) {
  by_type(p, add_rms_norm_as<F32>, add_rms_norm_as<BF16>, add_rms_norm_as<F16>);
}
void rotate(const RotateParams& p) { by_type(p, rotate_as<F32>, rotate_as<BF16>, rotate_as<F16>); }
void silu_mul(const SiluMulParams& p) {
  by_type(p, silu_mul_as<F32>, silu_mul_as<BF16>, silu_mul_as<F16>);
}

}  // namespace nibblock
