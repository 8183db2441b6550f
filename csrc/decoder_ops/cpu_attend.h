// The body of attend, compiled for the baseline and for AVX2: the same loops, the same bits.
//
// A task is one key head of one sequence with the query heads that read it, so that each key is
// loaded once for all of them. Scores of a head stand in one row; softmax subtracts the largest.
// All sums run in a fixed order, whatever the width of the instructions and the number of threads.
#pragma once

#include <math.h>

#include "decoder_ops.h"
#include "elements.h"

namespace nibblock {
namespace {

constexpr int64_t kChunk = 32;  // outputs of a head that stay in registers over all keys
constexpr int64_t kParallelWork = 1 << 17;  // multiply-adds below which one thread is faster

NB_INLINE int64_t padded_keys(const AttendParams& p) { return (p.keys + 7) / kLanes * kLanes; }

// a and b hold a multiple of 8 numbers.
NB_INLINE float dot(const float* a, const float* b, int64_t n) {
  F8 even = {}, odd = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    even += load8(a + i) * load8(b + i);
    odd += load8(a + i + kLanes) * load8(b + i + kLanes);
  }
  if (i < n) even += load8(a + i) * load8(b + i);
  return total(even + odd);
}

// scores[keys] -> exp(scores - max), padded to n, a multiple of 8; returns their sum.
NB_INLINE float exponentials(float* scores, int64_t keys, int64_t n) {
  F8 max = load8(scores), strange = {};
  for (int64_t t = 0; t < n; t += kLanes) {
    const F8 s = load8(scores + t);
    max = s > max ? s : max;
    strange += s * 0.0f;  // NaN where a score is infinite or NaN
  }
  float most = max[0];
  for (int i = 1; i < kLanes; ++i) most = max[i] > most ? max[i] : most;
  if (total(strange) != 0.0f) {  // as the C library has it: NaN stays, -inf is 0 beside a number
    most = scores[0];            // (of the keys alone: all of them may lie below the padding)
    for (int64_t t = 1; t < keys; ++t) most = scores[t] > most ? scores[t] : most;
    for (int64_t t = 0; t < n; ++t) scores[t] = t < keys ? expf(scores[t] - most) : 0.0f;
  } else {
    for (int64_t t = 0; t < n; t += kLanes)
      store8(scores + t, exp_clamped(load8(scores + t) - most));
  }
  F8 sums = {};
  for (int64_t t = 0; t < n; t += kLanes) sums += load8(scores + t);
  return total(sums);
}

// y[0 .. Width) = by * sum over t of scores[t] * v[t * stride + i].
template <class T, int Width>
NB_INLINE void mix(const float* scores, int64_t keys, const typename T::Stored* v, int64_t stride,
                   float by, typename T::Stored* y) {
  F8 sums[Width / kLanes] = {};
  for (int64_t t = 0; t < keys; ++t, v += stride) {
    NB_UNROLL
    for (int i = 0; i < Width / kLanes; ++i) sums[i] += scores[t] * load8(v + i * kLanes);
  }
  for (int i = 0; i < Width; ++i) y[i] = T::store(sums[i / kLanes][i % kLanes] * by);
}

template <class T>
void attend_task(const AttendParams& p, int64_t task, float* memory) {
  using S = typename T::Stored;
  const int64_t b = task / p.kv_heads, kv = task % p.kv_heads;
  const int64_t group = p.heads / p.kv_heads, row = padded_keys(p);
  float *q = memory, *key = q + group * p.dim, *scores = key + p.dim;
  const S* from = static_cast<const S*>(p.q) + b * p.q_stride[0] + kv * group * p.q_stride[1];
  for (int64_t h = 0; h < group; ++h) {
    for (int64_t i = 0; i < p.dim; i += kLanes)
      store8(q + h * p.dim + i, load8(from + h * p.q_stride[1] + i) * p.scale);
    // Padding of no weight: far below any score, and nothing is read of v for it.
    for (int64_t t = p.keys; t < row; ++t) scores[h * row + t] = -3e38f;
  }
  const S* k = static_cast<const S*>(p.k) + b * p.k_stride[0] + kv * p.k_stride[1];
  for (int64_t t = 0; t < p.keys; ++t, k += p.k_stride[2]) {
    for (int64_t i = 0; i < p.dim; i += kLanes) store8(key + i, load8(k + i));
    for (int64_t h = 0; h < group; ++h) scores[h * row + t] = dot(q + h * p.dim, key, p.dim);
  }
  const S* v = static_cast<const S*>(p.v) + b * p.v_stride[0] + kv * p.v_stride[1];
  S* y = static_cast<S*>(p.y) + (b * p.heads + kv * group) * p.dim;
  for (int64_t h = 0; h < group; ++h, y += p.dim) {
    const float* s = scores + h * row;
    const float by = 1.0f / exponentials(scores + h * row, p.keys, row);
    int64_t i = 0;
    for (; i + kChunk <= p.dim; i += kChunk)
      mix<T, kChunk>(s, p.keys, v + i, p.v_stride[2], by, y + i);
    for (; i < p.dim; i += kLanes) mix<T, kLanes>(s, p.keys, v + i, p.v_stride[2], by, y + i);
  }
}

template <class T>
Status attend_as(const AttendParams& p) {
  const int64_t group = p.heads / p.kv_heads;
  Status status = kOk;
  auto body = [&](int64_t begin, int64_t end) {
    const int64_t floats = (group + 1) * p.dim + group * padded_keys(p);
    float* memory = static_cast<float*>(aligned_malloc(floats * 4));
    if (!memory) {
      status = kOutOfMemory;
      return;
    }
    for (int64_t task = begin; task < end; ++task) attend_task<T>(p, task, memory);
    free(memory);
  };
  const bool small = 2 * p.batch * p.heads * p.keys * p.dim < kParallelWork;
  parallel_for(small ? kSerial : *p.parallel, p.batch * p.kv_heads, body);
  return status;
}

Status attend_any(const AttendParams& p) {
  return p.type == Dtype::kF32 ? attend_as<F32>(p) : attend_as<BF16>(p);
}

}  // namespace
}  // namespace nibblock
