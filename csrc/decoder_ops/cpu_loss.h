// Cross-entropy of rows of scores, and its gradient in their place.
//
// A row of a large vocabulary (200 KB) stays in the second cache over the three passes, so memory
// is read once and written once. torch's log_softmax and what makes a gradient of it are six passes
// over all rows of a chunk, with two exponentials an element.
#pragma once

#include <math.h>

#include "cpu_layer.h"

namespace nibblock {
namespace {

constexpr int kSums = 4;  // vectors of running sums: an exponential is 20 operations in a row

NB_INLINE float largest(const float* x, int64_t n) {
  F8 top[kSums];
  for (int j = 0; j < kSums; ++j) top[j] = F8{} - INFINITY;
  int64_t i = 0;
  for (; i + kSums * kLanes <= n; i += kSums * kLanes) {
    for (int j = 0; j < kSums; ++j) {
      const F8 v = load8(x + i + j * kLanes);
      top[j] = v > top[j] ? v : top[j];
    }
  }
  float most = -INFINITY;
  for (; i < n; ++i) most = x[i] > most ? x[i] : most;
  for (int j = 0; j < kSums * kLanes; ++j) {
    const float v = top[j / kLanes][j % kLanes];
    most = v > most ? v : most;
  }
  return most;
}

// exp(x - shift) in place of x; their sum. NaN stays.
NB_INLINE float exponentials(float* x, int64_t n, float shift) {
  F8 sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kLanes <= n; i += kSums * kLanes) {
    for (int j = 0; j < kSums; ++j) {
      const F8 e = exp_clamped(load8(x + i + j * kLanes) - shift);
      sums[j] += e;
      store8(x + i + j * kLanes, e);
    }
  }
  float rest = 0.0f;
  for (; i < n; i += kLanes) {
    const F8 e = exp_clamped(load_some<F32>(x + i, n - i) - shift);
    store_some<F32>(x + i, e, n - i);
    for (int64_t j = 0; j < kLanes && i + j < n; ++j) rest += x[i + j];
  }
  return total((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

void softmax_grad_rows(const SoftmaxGradParams& p) {
  over_rows(p.parallel, p.rows, p.width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* x = p.scores + r * p.width;
      const float at_label = x[p.labels[r]], most = largest(x, p.width);
      const float sum = exponentials(x, p.width, most), inverse = 1.0f / sum;
      p.losses[r] = static_cast<float>(log(static_cast<double>(sum)) + (most - at_label));
      for (int64_t i = 0; i < p.width; i += kLanes) {
        store_some<F32>(x + i, load_some<F32>(x + i, p.width - i) * inverse, p.width - i);
      }
      x[p.labels[r]] -= 1.0f;
    }
  });
}

}  // namespace
}  // namespace nibblock
