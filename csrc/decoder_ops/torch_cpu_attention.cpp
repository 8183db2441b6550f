// torch glue of causal_attention and its gradient for the CPU. Private ops, as those of
// torch_cpu.cpp: nn/_lean.py calls them where the shapes are known. Stable ABI only.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../glue/check.h"
#include "decoder_ops.h"

namespace nibblock {
namespace {

using namespace glue;

// t is [batch, length, heads, dim] on the CPU, of query's dtype, its last dimension contiguous.
void check_heads(const char* op, const char* name, const Tensor& t, const Tensor& query) {
  STD_TORCH_CHECK(t.scalar_type() == query.scalar_type(), op, ": ", name, " must be ",
                  dtype_name(query.scalar_type()), " as query, got ", dtype_name(t.scalar_type()));
  check_cpu(op, name, t);
  STD_TORCH_CHECK(t.dim() == 4, op, ": ", name, " must be [batch, length, heads, dim], got ",
                  shape_text(t));
  STD_TORCH_CHECK(t.size(3) <= 1 || t.strides()[3] == 1, op, ": ", name,
                  " must be contiguous along its last dimension, got strides");
}

void check_shape_of(const char* op, const char* name, const Tensor& t, const Tensor& like,
                    const char* like_name) {
  STD_TORCH_CHECK(same_shape(t, like), op, ": ", name, " must be ", shape_text(like), " as ",
                  like_name, ", got ", shape_text(t));
}

CausalAttentionParams take_heads(const char* op, const Tensor& query, const Tensor& key,
                                 const Tensor& value, double scale) {
  CausalAttentionParams p;
  p.type = check_float(op, "query", query.scalar_type());
  check_heads(op, "query", query, query);
  check_heads(op, "key", key, query);
  check_heads(op, "value", value, query);
  p.batch = query.size(0);
  p.length = query.size(1);
  p.heads = query.size(2);
  p.dim = query.size(3);
  p.kv_heads = key.size(2);
  STD_TORCH_CHECK(p.dim > 0 && p.dim % 16 == 0, op,
                  ": query must be [batch, length, heads, a multiple of 16], got ",
                  shape_text(query));
  STD_TORCH_CHECK(key.size(0) == p.batch && key.size(1) == p.length && key.size(3) == p.dim &&
                      p.kv_heads > 0 && p.heads > 0 && p.heads % p.kv_heads == 0,
                  op, ": key must be [", p.batch, ", ", p.length, ", a divisor of ", p.heads, ", ",
                  p.dim, "], got ", shape_text(key));
  check_shape_of(op, "value", value, key, "key");
  for (int i = 0; i < 3; ++i) {
    p.q_stride[i] = query.strides()[i];
    p.k_stride[i] = key.strides()[i];
    p.v_stride[i] = value.strides()[i];
  }
  p.q = query.const_data_ptr();
  p.k = key.const_data_ptr();
  p.v = value.const_data_ptr();
  p.scale = static_cast<float>(scale);
  p.y = nullptr;
  p.lse = nullptr;
  return p;
}

std::tuple<Tensor, Tensor> causal_attention_op(const Tensor& query, const Tensor& key,
                                               const Tensor& value, double scale) {
  const char* op = "_causal_attention";
  CausalAttentionParams p = take_heads(op, query, key, value, scale);
  Tensor y = empty_like_rows(query, p.dim);
  const int64_t shape[3] = {p.batch, p.heads, p.length};
  Tensor lse = torch::stable::new_empty(query, torch::headeronly::IntHeaderOnlyArrayRef(shape, 3),
                                        ScalarType::Float);
  if (y.numel() == 0) return {y, lse};
  p.y = y.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  const Parallel parallel = torch_parallel();
  p.parallel = &parallel;
  STD_TORCH_CHECK(causal_attention(p) == kOk, op, ": out of memory");
  return {y, lse};
}

std::tuple<Tensor, Tensor, Tensor> causal_attention_grad_op(const Tensor& grad, const Tensor& query,
                                                            const Tensor& key, const Tensor& value,
                                                            const Tensor& out, const Tensor& lse,
                                                            double scale) {
  const char* op = "_causal_attention_grad";
  CausalAttentionGradParams g;
  g.forward = take_heads(op, query, key, value, scale);
  const CausalAttentionParams& p = g.forward;
  const Tensor* const whole[] = {&grad, &out};
  const char* const names[] = {"grad", "out"};
  for (int i = 0; i < 2; ++i) {
    check_heads(op, names[i], *whole[i], query);
    check_shape_of(op, names[i], *whole[i], query, "query");
    STD_TORCH_CHECK(whole[i]->is_contiguous(), op, ": ", names[i],
                    " must be contiguous, got strides");
  }
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.dim() == 3 &&
                      lse.size(0) == p.batch && lse.size(1) == p.heads && lse.size(2) == p.length &&
                      lse.is_contiguous(),
                  op, ": lse must be a contiguous float32 [", p.batch, ", ", p.heads, ", ",
                  p.length, "], got ", dtype_name(lse.scalar_type()), " ", shape_text(lse));
  check_cpu(op, "lse", lse);
  Tensor dq = empty_like_rows(query, p.dim), dk = empty_like_rows(key, p.dim);
  Tensor dv = empty_like_rows(value, p.dim);
  if (dq.numel() == 0) return {dq, dk, dv};
  g.dy = grad.const_data_ptr();
  g.y = out.const_data_ptr();
  g.lse = static_cast<const float*>(lse.const_data_ptr());
  g.dq = dq.mutable_data_ptr();
  g.dk = dk.mutable_data_ptr();
  g.dv = dv.mutable_data_ptr();
  const Parallel parallel = torch_parallel();
  g.forward.parallel = &parallel;
  STD_TORCH_CHECK(causal_attention_grad(g) == kOk, op, ": out of memory");
  return {dq, dk, dv};
}

}  // namespace
}  // namespace nibblock

STABLE_TORCH_LIBRARY_IMPL(nibblock, CPU, m) {
  m.impl("_causal_attention", TORCH_BOX(&nibblock::causal_attention_op));
  m.impl("_causal_attention_grad", TORCH_BOX(&nibblock::causal_attention_grad_op));
}
