// torch glue of int4_linear for the CPU: checks, tensors -> params, launch. Stable ABI only; shapes
// and meaning of every argument are documented in python/nibblock/ops/int4_linear.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <vector>

#include "../glue/check.h"
#include "../glue/int4.h"
#include "int4_linear.h"

namespace nibblock {
namespace {

using namespace glue;

Tensor linear(const char* op, const Int4LinearTable& table, const Tensor& x, const char* x_name,
              Tensor packed, const std::optional<Tensor>& bias, int64_t n, int64_t k, int64_t group,
              int64_t bits, bool affine, ScalarType scale_dtype, Compute compute, bool forward) {
  Int4LinearParams p;
  p.xtype = check_float(op, x_name, x.scalar_type());
  STD_TORCH_CHECK(x.dim() >= 1, op, ": ", x_name, " must have at least 1 dimension, got a scalar");
  check_cpu(op, x_name, x);
  p.w = check_format(op, packed, n, k, group, bits, affine, scale_dtype);
  p.compute = compute;
  p.bias = nullptr;
  p.bias_type = Dtype::kF32;
  Tensor keep_bias = packed;
  if (bias) take_bias(op, *bias, n, &keep_bias, &p);
  Tensor keep = packed;
  const Rows rows = as_rows(x, &keep);
  Tensor y = empty_like_rows(x, forward ? n : k);
  const Parallel parallel = torch_parallel();
  p.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  p.m = rows.count;
  p.x = rows.data;
  p.x_stride = rows.stride;
  p.y = y.mutable_data_ptr();
  p.y_stride = forward ? n : k;
  p.parallel = &parallel;
  p.add = nullptr;
  if (y.numel() > 0) check_product(op, int4_linear_run(table, p, nullptr), p);
  return y;
}

Tensor int4_linear_op(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                      int64_t out_features, int64_t group_size, int64_t bits, bool affine,
                      ScalarType scale_dtype, const Text& compute) {
  const int64_t k = x.dim() >= 1 ? x.size(x.dim() - 1) : 0;
  const char* op = "int4_linear";
  return linear(op, int4_linear_table(), x, "x", packed, bias, out_features, k, group_size, bits,
                affine, scale_dtype, check_compute(op, compute), true);
}

Tensor int4_linear_forward_op(const Tensor& x, const Tensor& packed,
                              const std::optional<Tensor>& bias, int64_t format) {
  const char* op = "int4_linear";
  const int64_t k = x.dim() >= 1 ? x.size(x.dim() - 1) : 0;
  const FormatCode f = decode_format(format);
  return linear(op, int4_linear_table(), x, "x", packed, bias, f.out_features, k, f.group_size,
                f.bits, f.affine, f.scale_dtype, f.int8 ? Compute::kInt8 : Compute::kBF16, true);
}

Tensor int4_linear_dx_op(const Tensor& grad, const Tensor& packed, int64_t in_features,
                         int64_t group_size, int64_t bits, bool affine, ScalarType scale_dtype,
                         const Text& compute) {
  const int64_t n = grad.dim() >= 1 ? grad.size(grad.dim() - 1) : 0;
  const char* op = "int4_linear_dx";
  return linear(op, int4_linear_dx_table(), grad, "grad", packed, std::nullopt, n, in_features,
                group_size, bits, affine, scale_dtype, check_compute(op, compute), false);
}

Tensor int4_dequantize_op(Tensor packed, int64_t out_features, int64_t in_features,
                          int64_t group_size, int64_t bits, bool affine, ScalarType scale_dtype,
                          ScalarType dtype) {
  const char* op = "int4_dequantize";
  const Dtype type = check_float(op, "dtype", dtype);
  const Int4Format f =
      check_format(op, packed, out_features, in_features, group_size, bits, affine, scale_dtype);
  const int64_t shape[2] = {out_features, in_features};
  Tensor out =
      torch::stable::new_empty(packed, torch::headeronly::IntHeaderOnlyArrayRef(shape, 2), dtype);
  const Parallel parallel = torch_parallel();
  nibblock::int4_dequantize(f, static_cast<const uint8_t*>(packed.const_data_ptr()), nullptr,
                            out_features, out.mutable_data_ptr(), type, parallel);
  return out;
}

Tensor int4_embedding_op(const Tensor& indices, Tensor packed, int64_t num_embeddings,
                         int64_t embedding_dim, int64_t group_size, int64_t bits, bool affine,
                         ScalarType scale_dtype, ScalarType dtype) {
  const char* op = "int4_embedding";
  const Dtype type = check_float(op, "dtype", dtype);
  const ScalarType it = indices.scalar_type();
  STD_TORCH_CHECK(it == ScalarType::Long || it == ScalarType::Int, op,
                  ": indices must be int64 or int32, got ", dtype_name(it));
  check_cpu(op, "indices", indices);
  const Int4Format f = check_format(op, packed, num_embeddings, embedding_dim, group_size, bits,
                                    affine, scale_dtype);
  const Tensor flat = torch::stable::contiguous(indices);
  const int64_t count = flat.numel();
  std::vector<int64_t> rows(count);
  for (int64_t i = 0; i < count; ++i) {
    rows[i] = it == ScalarType::Long ? static_cast<const int64_t*>(flat.const_data_ptr())[i]
                                     : static_cast<const int32_t*>(flat.const_data_ptr())[i];
    STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < num_embeddings, op, ": indices must be in [0, ",
                    num_embeddings, "), got ", rows[i]);
  }
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < indices.dim(); ++i) shape.push_back(indices.size(i));
  shape.push_back(embedding_dim);
  Tensor out = torch::stable::new_empty(
      packed,
      torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), static_cast<int64_t>(shape.size())),
      dtype);
  const Parallel parallel = torch_parallel();
  nibblock::int4_dequantize(f, static_cast<const uint8_t*>(packed.const_data_ptr()), rows.data(),
                            count, out.mutable_data_ptr(), type, parallel);
  return out;
}

}  // namespace
}  // namespace nibblock

STABLE_TORCH_LIBRARY_IMPL(nibblock, CPU, m) {
  m.impl("int4_linear", TORCH_BOX(&nibblock::int4_linear_op));
  m.impl("_int4_linear_forward", TORCH_BOX(&nibblock::int4_linear_forward_op));
  m.impl("int4_linear_dx", TORCH_BOX(&nibblock::int4_linear_dx_op));
  m.impl("int4_dequantize", TORCH_BOX(&nibblock::int4_dequantize_op));
  m.impl("int4_embedding", TORCH_BOX(&nibblock::int4_embedding_op));
}
