// decoder_ops: what a decoder layer computes between its products. C interface.
//
//     sum = x + delta;  y = sum * rsqrt(mean(sum^2) + eps) * weight          (add_rms_norm)
//     y = x rotated by cos and sin, first half of a head against second half (rotate)
//     y = silu(gate) * up,  silu(v) = v / (1 + exp(-v))                      (silu_mul)
//     y[h] = softmax over t of scale * q[h] . k[h', t], times v[h', t]       (attend)
//     the same for every position of a sequence, t up to its own             (causal_attention)
//     y = softmax(x) - onehot(label)                                         (softmax_grad)
//
// At one token a step each of these is a few hundred numbers, and torch takes 3 to 7 calls of 2 to
// 5 us for it: as long as the int4 products themselves. At many rows its calls are as many passes
// over memory, forward and backward, where these take one. The bodies are plain loops over eight
// lanes, compiled for the baseline and for AVX2; wider instructions would save little: a decode
// step is too short, and many rows are memory's.
//
// Arithmetic is float32. Where torch's sequence of calls rounds to x's dtype, so do these: after
// x + delta, after the normalisation, and after each product and sum of the rotation. Gradients
// round once.
#pragma once

#include "../common/parallel.h"
#include "../common/status.h"
#include "../common/types.h"

namespace nibblock {

struct AddRmsNormParams {
  Dtype type;  // of x, delta, weight, sum and y
  int64_t rows, width;
  const void* x;      // [rows, width]
  const void* delta;  // [rows, width], or null: sum = x
  const void* weight;
  float eps;
  void* sum;  // [rows, width], or null where delta is
  void* y;    // [rows, width]
  const Parallel* parallel;
};
NB_API void add_rms_norm(const AddRmsNormParams& p);

constexpr int64_t kNormRows = 32;  // whose weight gradients one task sums

struct RmsNormGradParams {
  Dtype type;  // of x, weight, dy and dx
  int64_t rows, width;
  const void* x;  // [rows, width], what the norm was taken of
  const void* weight;
  const void* dy;  // [rows, width]
  float eps;
  void* dx;     // [rows, width]
  float* sums;  // [chunks, width]: the weight's gradient is their sum; or null
  const Parallel* parallel;

  int64_t chunks() const { return (rows + kNormRows - 1) / kNormRows; }
};
NB_API void rms_norm_grad(const RmsNormGradParams& p);

struct RotateParams {
  Dtype type;                // of x, y, cos and sin
  int64_t rows, heads, dim;  // dim is even
  const void* x;             // [rows, at least heads * dim]
  int64_t x_stride;
  void* y;  // as x, and may be x
  int64_t y_stride;
  const void* cos;  // [tables, dim]; row r reads table r % tables
  const void* sin;
  int64_t tables;
  bool inverse;  // the transposed map: what a gradient goes through
  const Parallel* parallel;
};
NB_API void rotate(const RotateParams& p);

struct SiluMulParams {
  Dtype type;  // of gate, up and y
  int64_t rows, width;
  const void* gate;  // [rows, width], row stride `stride`, as up
  const void* up;
  int64_t stride;
  void* y;  // [rows, width]
  const Parallel* parallel;
};
NB_API void silu_mul(const SiluMulParams& p);

struct SiluMulGradParams {
  Dtype type;  // of all tensors, each [rows, width] contiguous
  int64_t rows, width;
  const void *gate, *up, *dy;
  void *dgate, *dup;
  const Parallel* parallel;
};
NB_API void silu_mul_grad(const SiluMulGradParams& p);

// Scores of a head become the gradient of the summed cross-entropy, where they stand.
struct SoftmaxGradParams {
  int64_t rows, width;
  float* scores;          // [rows, width] -> softmax, less 1 at the label
  const int64_t* labels;  // [rows], each of 0 to width - 1
  float* losses;          // [rows]: log(sum(exp(scores))) - scores[label]
  const Parallel* parallel;
};
NB_API void softmax_grad(const SoftmaxGradParams& p);

// One query a sequence against all keys of its cache, without a mask. Head h of q reads head
// h * kv_heads / heads of k and v. Strides are in elements; the last dimension is contiguous.
struct AttendParams {
  Dtype type;                                 // of all tensors: kF32 or kBF16
  int64_t batch, heads, kv_heads, keys, dim;  // dim is a multiple of 8
  const void* q;                              // [batch, heads, dim]
  int64_t q_stride[2];
  const void* k;  // [batch, kv_heads, keys, dim]
  int64_t k_stride[3];
  const void* v;
  int64_t v_stride[3];
  float scale;
  void* y;  // [batch, heads, dim] contiguous
  const Parallel* parallel;
};
NB_API Status attend(const AttendParams& p);

// Every position of a sequence against itself and those before it. Strides are in elements, of
// [batch, length, heads, dim]; the last dimension is contiguous. Head h of q reads head
// h * kv_heads / heads of k and v.
struct CausalAttentionParams {
  Dtype type;                                   // of q, k, v and y
  int64_t batch, length, heads, kv_heads, dim;  // dim is a multiple of 16
  const void *q, *k, *v;                        // k and v have kv_heads heads
  int64_t q_stride[3], k_stride[3], v_stride[3];
  float scale;
  void* y;     // [batch, length, heads, dim] contiguous
  float* lse;  // [batch, heads, length]: log(sum(exp(scores)))
  const Parallel* parallel;
};
NB_API Status causal_attention(const CausalAttentionParams& p);

struct CausalAttentionGradParams {
  CausalAttentionParams forward;  // but for its results
  const void *y, *dy;             // [batch, length, heads, dim] contiguous
  const float* lse;
  void *dq, *dk, *dv;  // contiguous
};
NB_API Status causal_attention_grad(const CausalAttentionGradParams& p);

// What the two above choose from.
Status causal_attention_avx2(const CausalAttentionParams& p);
Status causal_attention_avx512(const CausalAttentionParams& p);
Status causal_attention_grad_avx2(const CausalAttentionGradParams& p);
Status causal_attention_grad_avx512(const CausalAttentionGradParams& p);

// What the others choose from.
struct DecoderBodies {
  void (*add_rms_norm)(const AddRmsNormParams& p);
  void (*rms_norm_grad)(const RmsNormGradParams& p);
  void (*rotate)(const RotateParams& p);
  void (*silu_mul)(const SiluMulParams& p);
  void (*silu_mul_grad)(const SiluMulGradParams& p);
  void (*softmax_grad)(const SoftmaxGradParams& p);
  Status (*attend)(const AttendParams& p);
};
DecoderBodies decoder_bodies_avx2();

}  // namespace nibblock
