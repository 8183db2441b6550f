// The bodies of the norms, the rotation and silu * up, forward and backward, compiled for the
// baseline and for AVX2: the same loops, the same bits. Rows are independent, so any number of
// threads gives them; what is summed over rows (a norm's weight gradient) is cut by their count.
#pragma once

#include <math.h>

#include "decoder_ops.h"
#include "elements.h"

namespace nibblock {
namespace {

constexpr int64_t kLayerWork = 1 << 15;  // elements below which one thread is faster

// body(first, last) over rows, on as many threads as so many elements are worth.
template <class F>
NB_INLINE void over_rows(const Parallel* parallel, int64_t rows, int64_t width, F body) {
  parallel_for(rows * width < kLayerWork ? kSerial : *parallel, rows, body);
}

// Two vectors of running sums, so that the additions do not wait for each other.
template <class T>
NB_INLINE float sum_of_squares(const typename T::Stored* x, int64_t n) {
  F8 even = {}, odd = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const F8 a = T::load8(x + i), b = T::load8(x + i + kLanes);
    even += a * a;
    odd += b * b;
  }
  for (; i < n; i += kLanes) {
    const F8 a = load_some<T>(x + i, n - i);
    if (i % (2 * kLanes) == 0)
      even += a * a;
    else
      odd += a * a;
  }
  return total(even + odd);
}

template <class T>
NB_INLINE float inverse_rms(const typename T::Stored* x, int64_t n, float eps) {
  return 1.0f / sqrtf(sum_of_squares<T>(x, n) / static_cast<float>(n) + eps);
}

template <class T>
void add_rms_norm_as(const AddRmsNormParams& p) {
  using S = typename T::Stored;
  const S* weight = static_cast<const S*>(p.weight);
  over_rows(p.parallel, p.rows, p.width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const S* x = static_cast<const S*>(p.x) + r * p.width;
      S* y = static_cast<S*>(p.y) + r * p.width;
      if (p.delta) {
        const S* delta = static_cast<const S*>(p.delta) + r * p.width;
        S* sum = static_cast<S*>(p.sum) + r * p.width;
        for (int64_t i = 0; i < p.width; i += kLanes) {
          const int64_t n = p.width - i;
          store_some<T>(sum + i, load_some<T>(x + i, n) + load_some<T>(delta + i, n), n);
        }
        x = sum;
      }
      const float scale = inverse_rms<T>(x, p.width, p.eps);
      for (int64_t i = 0; i < p.width; i += kLanes) {
        const int64_t n = p.width - i;
        const F8 normed = T::round8(load_some<T>(x + i, n) * scale);
        store_some<T>(y + i, normed * load_some<T>(weight + i, n), n);
      }
    }
  });
}

// dx = s (w dy - x s^2 mean(w dy x)), s = rsqrt(mean(x^2) + eps), and in `sums` dy x s over the
// rows of a chunk.
template <class T>
void rms_norm_grad_as(const RmsNormGradParams& p) {
  using S = typename T::Stored;
  const S* weight = static_cast<const S*>(p.weight);
  over_rows(p.parallel, p.chunks(), p.width * kNormRows, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      float* sums = p.sums ? p.sums + chunk * p.width : nullptr;
      for (int64_t i = 0; sums && i < p.width; ++i) sums[i] = 0.0f;
      const int64_t end = min64(p.rows, (chunk + 1) * kNormRows);
      for (int64_t r = chunk * kNormRows; r < end; ++r) {
        const S* x = static_cast<const S*>(p.x) + r * p.width;
        const S* dy = static_cast<const S*>(p.dy) + r * p.width;
        S* dx = static_cast<S*>(p.dx) + r * p.width;
        const float scale = inverse_rms<T>(x, p.width, p.eps);
        F8 products = {};
        for (int64_t i = 0; i < p.width; i += kLanes) {
          const int64_t n = p.width - i;
          const F8 g = load_some<T>(dy + i, n), v = load_some<T>(x + i, n);
          products += g * load_some<T>(weight + i, n) * v;
          if (sums) store_some<F32>(sums + i, load_some<F32>(sums + i, n) + g * (v * scale), n);
        }
        const float back = scale * scale * (total(products) / static_cast<float>(p.width));
        for (int64_t i = 0; i < p.width; i += kLanes) {
          const int64_t n = p.width - i;
          const F8 g = load_some<T>(dy + i, n) * load_some<T>(weight + i, n);
          store_some<T>(dx + i, scale * (g - load_some<T>(x + i, n) * back), n);
        }
      }
    }
  });
}

// (a, b) -> (a cos - b sin, b cos + a sin) of a head's two halves; backwards the transposed map. y
// may be x.
template <class T>
void rotate_as(const RotateParams& p) {
  using S = typename T::Stored;
  const int64_t half = p.dim / 2;
  over_rows(p.parallel, p.rows, p.heads * p.dim, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t table = r % p.tables * p.dim;
      const S *cos = static_cast<const S*>(p.cos) + table, *sin = static_cast<const S*>(p.sin);
      sin += table;
      // Where a half of the result takes the sine from, and which of its products is negative.
      const S *sin_a = p.inverse ? sin + half : sin, *sin_b = p.inverse ? sin : sin + half;
      for (int64_t h = 0; h < p.heads; ++h) {
        const S* a = static_cast<const S*>(p.x) + r * p.x_stride + h * p.dim;
        S* y = static_cast<S*>(p.y) + r * p.y_stride + h * p.dim;
        for (int64_t i = 0; i < half; i += kLanes) {
          const int64_t n = half - i;
          const F8 u = load_some<T>(a + i, n), v = load_some<T>(a + half + i, n);
          const F8 from_v = T::round8(v * load_some<T>(sin_a + i, n));
          const F8 from_u = T::round8(u * load_some<T>(sin_b + i, n));
          const F8 first = T::round8(u * load_some<T>(cos + i, n));
          const F8 second = T::round8(v * load_some<T>(cos + half + i, n));
          store_some<T>(y + i, p.inverse ? first + from_v : first - from_v, n);
          store_some<T>(y + half + i, p.inverse ? second - from_u : second + from_u, n);
        }
      }
    }
  });
}

template <class T>
void silu_mul_as(const SiluMulParams& p) {
  using S = typename T::Stored;
  over_rows(p.parallel, p.rows, p.width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const S* gate = static_cast<const S*>(p.gate) + r * p.stride;
      const S* up = static_cast<const S*>(p.up) + r * p.stride;
      S* y = static_cast<S*>(p.y) + r * p.width;
      for (int64_t i = 0; i < p.width; i += kLanes) {
        const int64_t n = p.width - i;
        const F8 g = load_some<T>(gate + i, n);
        const F8 silu = T::round8(g / (1.0f + exp_clamped(-g)));
        store_some<T>(y + i, silu * load_some<T>(up + i, n), n);
      }
    }
  });
}

// With s = 1 / (1 + exp(-gate)): dup = dy gate s, dgate = dy up s (1 + gate (1 - s)).
template <class T>
void silu_mul_grad_as(const SiluMulGradParams& p) {
  using S = typename T::Stored;
  over_rows(p.parallel, p.rows, p.width, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * p.width; at < end * p.width; at += kLanes) {
      const int64_t n = end * p.width - at;
      const F8 g = load_some<T>(static_cast<const S*>(p.gate) + at, n);
      const F8 dy = load_some<T>(static_cast<const S*>(p.dy) + at, n);
      const F8 up = load_some<T>(static_cast<const S*>(p.up) + at, n);
      const F8 s = 1.0f / (1.0f + exp_clamped(-g));
      store_some<T>(static_cast<S*>(p.dgate) + at, dy * up * (s * (1.0f + g * (1.0f - s))), n);
      store_some<T>(static_cast<S*>(p.dup) + at, dy * (g * s), n);
    }
  });
}

}  // namespace
}  // namespace nibblock
