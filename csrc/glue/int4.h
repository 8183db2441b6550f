// Checks of the arguments that describe an int4 weight, shared by every op that takes one.
#pragma once

#include <string>

#include "../common/cpu_features.h"
#include "../int4_linear/int4_linear.h"
#include "check.h"
#include "text.h"

namespace nibblock {
namespace glue {

// Checks `packed` against the format and its device by `device`, and makes it contiguous.
inline Int4Format check_format(const char* op, Tensor& packed, int64_t n, int64_t k, int64_t group,
                               int64_t bits, bool affine, ScalarType scale_dtype,
                               void (*device)(const char*, const char*,
                                              const Tensor&) = check_cpu) {
  STD_TORCH_CHECK(bits == 4 || bits == 8, op, ": bits must be 4 or 8, got ", bits);
  STD_TORCH_CHECK(scale_dtype == ScalarType::Half || scale_dtype == ScalarType::Float ||
                      scale_dtype == ScalarType::Char,
                  op, ": scale_dtype must be float16, float32 or int8, got ",
                  dtype_name(scale_dtype));
  STD_TORCH_CHECK(n >= 0, op, ": out_features must be at least 0, got ", n);
  STD_TORCH_CHECK(k >= 0, op, ": in_features must be at least 0, got ", k);
  const Dtype scale_type = scale_dtype == ScalarType::Half    ? Dtype::kF16
                           : scale_dtype == ScalarType::Float ? Dtype::kF32
                                                              : Dtype::kI8;
  STD_TORCH_CHECK(int4_has_group(group, bits, scale_type), op, ": group_size must be ",
                  int4_groups_text(bits), ", got ", group);
  STD_TORCH_CHECK(scale_dtype != ScalarType::Char || int4_has_int8_scales(group, k), op,
                  ": the weight must have ", int4_int8_scales_text(), ", got group_size=", group,
                  ", in_features=", k);
  Int4Format f;
  f.n = n;
  f.k = k;
  f.group = group;
  f.bits = static_cast<int32_t>(bits);
  f.affine = affine;
  f.scale_type = scale_type;
  device(op, "packed", packed);
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte, op, ": packed must be uint8, got ",
                  dtype_name(packed.scalar_type()));
  int4_take_palette(&f, packed.numel());
  const int64_t bytes = int4_geometry(f).bytes;
  STD_TORCH_CHECK(packed.dim() == 1 && packed.numel() == bytes, op,
                  ": packed must be a contiguous [", bytes, "] for out_features=", n,
                  ", in_features=", k, ", group_size=", group, ", bits=", bits,
                  ", affine=", affine ? "True" : "False", ", got ", shape_text(packed));
  if (!packed.is_contiguous()) packed = torch::stable::contiguous(packed);
  return f;
}

// What `format` of _int4_linear_forward holds (python/nibblock/ops/_checks.py, format_code): six
// arguments in one, because each argument of a call through torch costs a third of a microsecond.
struct FormatCode {
  int64_t out_features, group_size, bits;
  bool affine, int8;
  ScalarType scale_dtype;
};

inline FormatCode decode_format(int64_t code) {
  static constexpr int64_t kGroups[8] = {32, 64, 128, 256, -1, 16, 0, 0};
  FormatCode f;
  f.bits = code & 1 ? 8 : 4;
  f.affine = code & 2;
  f.scale_dtype = code & 128 ? ScalarType::Char : code & 4 ? ScalarType::Float : ScalarType::Half;
  f.int8 = code & 8;
  f.group_size = kGroups[(code >> 4) & 7];
  f.out_features = code >> 8;
  return f;
}

// A product's bias, [n], contiguous; `keep` must outlive the product.
inline void take_bias(const char* op, const Tensor& bias, int64_t n, Tensor* keep,
                      Int4LinearParams* p) {
  p->bias_type = check_float(op, "bias", bias.scalar_type());
  check_cpu(op, "bias", bias);
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == n, op, ": bias must be [", n, "], got ",
                  shape_text(bias));
  *keep = bias.is_contiguous() ? bias : torch::stable::contiguous(bias);
  p->bias = keep->const_data_ptr();
}

// What a product returned.
inline void check_product(const char* op, Status s, const Int4LinearParams& p) {
  if (s == kOk) return;
  if (s == kNoKernel && cpu_isa_error()) STD_TORCH_CHECK(false, cpu_isa_error());
  STD_TORCH_CHECK(s != kOutOfMemory, op, ": out of memory for the workspace of [", p.m, ", ", p.w.k,
                  "]");
  STD_TORCH_CHECK(false, op, ": internal error ", static_cast<int>(s), " (m=", p.m, ", n=", p.w.n,
                  ", k=", p.w.k, "); please report with python -m nibblock info --json");
}

inline Compute check_compute(const char* op, const std::string& compute) {
  STD_TORCH_CHECK(compute == "bf16" || compute == "int8", op,
                  ": compute must be \"bf16\" or \"int8\", got \"", compute, "\"");
  return compute == "int8" ? Compute::kInt8 : Compute::kBF16;
}

}  // namespace glue
}  // namespace nibblock
