// torch glue of the block-sparse ops for the CPU: checks, tensors -> params, launch. Stable ABI
// only; shapes and meaning of every argument are documented in python/nibblock/ops.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>

#include "../glue/check.h"
#include "../glue/int4.h"
#include "block_sparse_linear.h"

namespace nibblock {
namespace {

using namespace glue;
using OptTensor = std::optional<Tensor>;

// Checks `layout` (and makes it contiguous): its dtype, its size, and that no index leaves its
// range. What else a layout must be was checked when it was built.
BlockLayout check_layout(const char* op, Tensor& layout, int64_t n, int64_t k, int64_t block) {
  STD_TORCH_CHECK(block == 16 || block == 32 || block == 64 || block == 128, op,
                  ": block must be 16, 32, 64 or 128, got ", block);
  STD_TORCH_CHECK(n >= 0, op, ": out_features must be at least 0, got ", n);
  STD_TORCH_CHECK(k >= 0, op, ": in_features must be at least 0, got ", k);
  check_cpu(op, "layout", layout);
  STD_TORCH_CHECK(layout.scalar_type() == ScalarType::Int, op, ": layout must be int32, got ",
                  dtype_name(layout.scalar_type()));
  const int64_t fixed = block_layout_size(n, k, block, 0);
  const int64_t left = layout.numel() - fixed;
  STD_TORCH_CHECK(layout.dim() == 1 && left >= 0 && left % 3 == 0, op, ": layout must be [", fixed,
                  " + 3 Z] for out_features=", n, ", in_features=", k, ", block=", block, ", got ",
                  shape_text(layout), "; build it with block_layout()");
  if (!layout.is_contiguous()) layout = torch::stable::contiguous(layout);
  const BlockLayout s =
      block_layout(static_cast<const int32_t*>(layout.const_data_ptr()), n, k, block, left / 3);
  STD_TORCH_CHECK(block_layout_in_range(s), op,
                  ": layout must hold indices inside out_features=", n, ", in_features=", k,
                  ", got others; build it with block_layout()");
  return s;
}

Dtype check_values(const char* op, Tensor& values, const BlockLayout& s) {
  const ScalarType t = values.scalar_type();
  STD_TORCH_CHECK(t == ScalarType::Float || t == ScalarType::BFloat16, op,
                  ": values must be float32 or bfloat16, got ", dtype_name(t));
  check_cpu(op, "values", values);
  STD_TORCH_CHECK(values.dim() == 3 && values.size(0) == s.count && values.size(1) == s.block &&
                      values.size(2) == s.block,
                  op, ": values must be [", s.count, ", ", s.block, ", ", s.block, "], got ",
                  shape_text(values));
  if (!values.is_contiguous()) values = torch::stable::contiguous(values);
  return t == ScalarType::Float ? Dtype::kF32 : Dtype::kBF16;
}

Dtype check_input(const char* op, const char* name, const Tensor& x) {
  const Dtype type = check_float(op, name, x.scalar_type());
  STD_TORCH_CHECK(x.dim() >= 1, op, ": ", name, " must have at least 1 dimension, got a scalar");
  check_cpu(op, name, x);
  return type;
}

// Null, or the data of a [n] bias kept alive in `keep`.
const void* check_bias(const char* op, const OptTensor& bias, int64_t n, Dtype* type,
                       Tensor* keep) {
  if (!bias) return nullptr;
  *type = check_float(op, "bias", bias->scalar_type());
  check_cpu(op, "bias", *bias);
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, op, ": bias must be [", n, "], got ",
                  shape_text(*bias));
  *keep = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
  return keep->const_data_ptr();
}

void check_status(const char* op, Status s, int64_t m, const BlockLayout& l) {
  if (s == kOk) return;
  if (s == kNoKernel && cpu_isa_error()) STD_TORCH_CHECK(false, cpu_isa_error());
  STD_TORCH_CHECK(s != kOutOfMemory, op, ": out of memory for the workspace of [", m, ", ", l.k,
                  "]");
  STD_TORCH_CHECK(false, op, ": internal error ", static_cast<int>(s), " (m=", m, ", n=", l.n,
                  ", k=", l.k, ", block=", l.block, ", blocks=", l.count,
                  "); please report with python -m nibblock info --json");
}

Tensor product(const char* op, const Tensor& x, const char* x_name, Tensor values, Tensor layout,
               const OptTensor& bias, const OptTensor& y0, int64_t n, int64_t k, int64_t block,
               bool forward) {
  BlockSparseParams p;
  p.xtype = check_input(op, x_name, x);
  p.s = check_layout(op, layout, n, k, block);
  p.vtype = check_values(op, values, p.s);
  Tensor keep_bias = values, keep_x = values, keep_y0 = values;
  p.bias_type = Dtype::kF32;
  p.bias = check_bias(op, bias, n, &p.bias_type, &keep_bias);
  Tensor y = empty_like_rows(x, forward ? n : k);
  p.y0 = nullptr;
  p.y0_stride = 0;
  if (y0) {
    STD_TORCH_CHECK(y0->scalar_type() == x.scalar_type(), op, ": y0 must be ",
                    dtype_name(x.scalar_type()), " as x, got ", dtype_name(y0->scalar_type()));
    check_cpu(op, "y0", *y0);
    bool same = y0->dim() == y.dim();
    for (int64_t i = 0; same && i < y.dim(); ++i) same = y0->size(i) == y.size(i);
    STD_TORCH_CHECK(same, op, ": y0 must be ", shape_text(y), ", got ", shape_text(*y0));
    const Rows rows = as_rows(*y0, &keep_y0);
    p.y0 = rows.data;
    p.y0_stride = rows.stride;
  }
  const Rows rows = as_rows(x, &keep_x);
  const Parallel parallel = torch_parallel();
  p.values = values.const_data_ptr();
  p.m = rows.count;
  p.x = rows.data;
  p.x_stride = rows.stride;
  p.y = y.mutable_data_ptr();
  p.y_stride = forward ? n : k;
  p.parallel = &parallel;
  const BlockSparseTable table =
      forward ? block_sparse_linear_table() : block_sparse_linear_dx_table();
  if (y.numel() > 0) check_status(op, block_sparse_run(table, p, nullptr), p.m, p.s);
  return y;
}

int64_t last_size(const Tensor& t) { return t.dim() >= 1 ? t.size(t.dim() - 1) : 0; }

Tensor block_sparse_linear_op(const Tensor& x, const Tensor& values, const Tensor& layout,
                              const OptTensor& bias, const OptTensor& y0, int64_t out_features,
                              int64_t block) {
  return product("block_sparse_linear", x, "x", values, layout, bias, y0, out_features,
                 last_size(x), block, true);
}

Tensor block_sparse_linear_dx_op(const Tensor& grad, const Tensor& values, const Tensor& layout,
                                 int64_t in_features, int64_t block) {
  return product("block_sparse_linear_dx", grad, "grad", values, layout, std::nullopt, std::nullopt,
                 last_size(grad), in_features, block, false);
}

Tensor block_weight_grad_op(const Tensor& grad, const Tensor& x, Tensor layout, int64_t block,
                            ScalarType dtype) {
  const char* op = "block_weight_grad";
  BlockWeightGradParams p;
  p.gtype = check_input(op, "grad", grad);
  check_input(op, "x", x);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), op, ": grad must be ",
                  dtype_name(x.scalar_type()), " as x, got ", dtype_name(grad.scalar_type()));
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op,
                  ": dtype must be float32 or bfloat16, got ", dtype_name(dtype));
  bool same = grad.dim() == x.dim();
  for (int64_t i = 0; same && i + 1 < x.dim(); ++i) same = grad.size(i) == x.size(i);
  STD_TORCH_CHECK(same, op, ": grad must have the leading dimensions of x, ", shape_text(x),
                  ", got ", shape_text(grad));
  p.s = check_layout(op, layout, last_size(grad), last_size(x), block);
  const int64_t shape[3] = {p.s.count, block, block};
  Tensor out =
      torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(shape, 3), dtype);
  Tensor keep_g = layout, keep_x = layout;
  const Rows g = as_rows(grad, &keep_g), rows = as_rows(x, &keep_x);
  const Parallel parallel = torch_parallel();
  p.m = rows.count;
  p.g = g.data;
  p.g_stride = g.stride;
  p.x = rows.data;
  p.x_stride = rows.stride;
  p.out = out.mutable_data_ptr();
  p.out_type = dtype == ScalarType::Float ? Dtype::kF32 : Dtype::kBF16;
  p.parallel = &parallel;
  check_status(op, block_weight_grad_run(block_weight_grad_table(), p, nullptr), p.m, p.s);
  return out;
}

Tensor fused(const char* op, const Tensor& x, const char* x_name, Tensor packed,
             const OptTensor& bias, int64_t n, int64_t k, int64_t group, int64_t bits, bool affine,
             ScalarType scale_dtype, const std::string& compute, Tensor values, Tensor layout,
             int64_t block, const OptTensor& lora_a, const OptTensor& lora_c, bool forward) {
  Int4BlockSparseParams f;
  Int4LinearParams& p = f.base;
  p.xtype = check_input(op, x_name, x);
  p.w = check_format(op, packed, n, k, group, bits, affine, scale_dtype);
  p.compute = check_compute(op, compute);
  Tensor keep_bias = packed, keep_x = packed, keep_a = packed, keep_c = packed;
  p.bias_type = Dtype::kF32;
  p.bias = check_bias(op, bias, n, &p.bias_type, &keep_bias);
  f.s = check_layout(op, layout, n, k, block);
  f.vtype = check_values(op, values, f.s);
  f.values = values.const_data_ptr();
  f.rank = 0;
  f.a = f.c = nullptr;
  f.ltype = Dtype::kF32;
  STD_TORCH_CHECK(lora_a.has_value() == lora_c.has_value(), op,
                  ": lora_c must be given exactly when lora_a is, got only one of them");
  if (lora_a) {
    f.ltype = check_float(op, "lora_a", lora_a->scalar_type());
    check_cpu(op, "lora_a", *lora_a);
    check_cpu(op, "lora_c", *lora_c);
    STD_TORCH_CHECK(lora_c->scalar_type() == lora_a->scalar_type(), op, ": lora_c must be ",
                    dtype_name(lora_a->scalar_type()), " as lora_a, got ",
                    dtype_name(lora_c->scalar_type()));
    STD_TORCH_CHECK(lora_a->dim() == 2 && lora_a->size(1) == k, op, ": lora_a must be [rank, ", k,
                    "], got ", shape_text(*lora_a));
    f.rank = lora_a->size(0);
    STD_TORCH_CHECK(lora_c->dim() == 2 && lora_c->size(0) == n && lora_c->size(1) == f.rank, op,
                    ": lora_c must be [", n, ", ", f.rank, "], got ", shape_text(*lora_c));
    keep_a = torch::stable::contiguous(*lora_a);
    keep_c = torch::stable::contiguous(*lora_c);
    f.a = keep_a.const_data_ptr();
    f.c = keep_c.const_data_ptr();
  }
  Tensor y = empty_like_rows(x, forward ? n : k);
  const Rows rows = as_rows(x, &keep_x);
  const Parallel parallel = torch_parallel();
  p.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  p.m = rows.count;
  p.x = rows.data;
  p.x_stride = rows.stride;
  p.y = y.mutable_data_ptr();
  p.y_stride = forward ? n : k;
  p.parallel = &parallel;
  p.add = nullptr;
  const Int4BlockSparseTable table =
      forward ? int4_block_sparse_linear_table() : int4_block_sparse_linear_dx_table();
  if (y.numel() > 0) check_status(op, int4_block_sparse_run(table, f, nullptr), p.m, f.s);
  return y;
}

Tensor int4_block_sparse_linear_op(const Tensor& x, const Tensor& packed, const OptTensor& bias,
                                   int64_t out_features, int64_t group_size, int64_t bits,
                                   bool affine, ScalarType scale_dtype, const Text& compute,
                                   const Tensor& values, const Tensor& layout, int64_t block,
                                   const OptTensor& lora_a, const OptTensor& lora_c) {
  return fused("int4_block_sparse_linear", x, "x", packed, bias, out_features, last_size(x),
               group_size, bits, affine, scale_dtype, compute, values, layout, block, lora_a,
               lora_c, true);
}

Tensor int4_block_sparse_linear_dx_op(const Tensor& grad, const Tensor& packed, int64_t in_features,
                                      int64_t group_size, int64_t bits, bool affine,
                                      ScalarType scale_dtype, const Text& compute,
                                      const Tensor& values, const Tensor& layout, int64_t block,
                                      const OptTensor& lora_a, const OptTensor& lora_c) {
  return fused("int4_block_sparse_linear_dx", grad, "grad", packed, std::nullopt, last_size(grad),
               in_features, group_size, bits, affine, scale_dtype, compute, values, layout, block,
               lora_a, lora_c, false);
}

}  // namespace
}  // namespace nibblock

STABLE_TORCH_LIBRARY_IMPL(nibblock, CPU, m) {
  m.impl("block_sparse_linear", TORCH_BOX(&nibblock::block_sparse_linear_op));
  m.impl("_block_sparse_linear_forward", TORCH_BOX(&nibblock::block_sparse_linear_op));
  m.impl("block_sparse_linear_dx", TORCH_BOX(&nibblock::block_sparse_linear_dx_op));
  m.impl("block_weight_grad", TORCH_BOX(&nibblock::block_weight_grad_op));
  m.impl("int4_block_sparse_linear", TORCH_BOX(&nibblock::int4_block_sparse_linear_op));
  m.impl("_int4_block_sparse_linear_forward", TORCH_BOX(&nibblock::int4_block_sparse_linear_op));
  m.impl("int4_block_sparse_linear_dx", TORCH_BOX(&nibblock::int4_block_sparse_linear_dx_op));
}
