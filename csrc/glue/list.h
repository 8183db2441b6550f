// Checks of tensors that came in lists: messages name the list and the position, as in
// "masked_adamw_flat_: grads[3] must be float32 as params[3], got float16".
#pragma once

#include <math.h>

#include <optional>
#include <string>
#include <vector>

#include "../common/cpu_features.h"
#include "../common/status.h"
#include "../masked_update/masked_update.h"
#include "check.h"

namespace nibblock {
namespace glue {

using Tensors = std::vector<Tensor>;

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const int64_t dim = a.dim();
  if (dim != b.dim()) return false;
  const auto x = a.sizes(), y = b.sizes();
  for (int64_t i = 0; i < dim; ++i) {
    if (x[i] != y[i]) return false;
  }
  return true;
}

// One tensor of a list, with what it takes to name it. The good path builds no string.
struct Item {
  const char* op;
  const char* list;
  size_t at;
  const Tensor& tensor;

  std::string text() const { return std::string(list) + "[" + std::to_string(at) + "]"; }
  std::string peer(const char* name) const {
    return std::string(name) + "[" + std::to_string(at) + "]";
  }
  void want_type(ScalarType type, const char* name) const {
    STD_TORCH_CHECK(tensor.scalar_type() == type, op, ": ", text(), " must be ", name, ", got ",
                    dtype_name(tensor.scalar_type()));
  }
  void want_same_type(const Tensor& other, const char* name) const {
    STD_TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), op, ": ", text(), " must be ",
                    dtype_name(other.scalar_type()), " as ", peer(name), ", got ",
                    dtype_name(tensor.scalar_type()));
  }
  Dtype want_weight_type() const {
    const ScalarType type = tensor.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, op, ": ", text(),
                    " must be float32 or bfloat16, got ", dtype_name(type));
    return type == ScalarType::Float ? Dtype::kF32 : Dtype::kBF16;
  }
  void want_cpu() const {
    STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", text(), " must be on cpu, got another device");
  }
  void want_cpu_contiguous() const {
    want_cpu();
    STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", text(),
                    " must be contiguous, got other strides");
  }
  void want_numel(int64_t need) const {
    STD_TORCH_CHECK(tensor.numel() == need, op, ": ", text(), " must hold ", need,
                    " elements, got ", shape_text(tensor));
  }
  void want_shape_of(const Tensor& other, const char* name) const {
    STD_TORCH_CHECK(same_shape(tensor, other), op, ": ", text(), " must be ", shape_text(other),
                    " as ", peer(name), ", got ", shape_text(tensor));
  }
  // [N, K] with contiguous rows.
  void want_rows() const {
    STD_TORCH_CHECK(tensor.dim() == 2, op, ": ", text(), " must be [N, K], got ",
                    shape_text(tensor));
    STD_TORCH_CHECK((tensor.size(1) <= 1 || tensor.stride(1) == 1) &&
                        (tensor.size(0) <= 1 || tensor.stride(0) >= tensor.size(1)),
                    op, ": ", text(), " must have contiguous rows, got other strides");
  }
  // int32 [count, 2]; returns its data, from a copy in `keep` if it is not contiguous.
  const int32_t* want_blocks(int64_t count, std::vector<Tensor>* keep) const {
    want_type(ScalarType::Int, "int32");
    want_cpu();
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(1) == 2 &&
                        (count < 0 || tensor.size(0) == count),
                    op, ": ", text(), " must be [", count < 0 ? "Z" : std::to_string(count),
                    ", 2] (row block, column block), got ", shape_text(tensor));
    if (tensor.is_contiguous()) return static_cast<const int32_t*>(tensor.const_data_ptr());
    keep->push_back(torch::stable::contiguous(tensor));
    return static_cast<const int32_t*>(keep->back().const_data_ptr());
  }
  void want_blocks_inside(const int32_t* blocks, int64_t count, int64_t n, int64_t k,
                          int64_t block) const {
    const int64_t rows = (n + block - 1) / block, cols = (k + block - 1) / block;
    STD_TORCH_CHECK(masked_blocks_ok(blocks, count, rows, cols), op, ": ", text(),
                    " must be sorted, distinct and in the ", rows, " x ", cols, " blocks of a [", n,
                    ", ", k, "] weight with block ", block, ", got others");
  }
};

inline void want_block(const char* op, int64_t block) {
  STD_TORCH_CHECK(block == 16 || block == 32 || block == 64 || block == 128, op,
                  ": block must be 16, 32, 64 or 128, got ", block);
}

// The value of an optional tensor of one float32.
inline float scalar_of(const char* op, const char* name, const std::optional<Tensor>& value,
                       float otherwise) {
  if (!value) return otherwise;
  STD_TORCH_CHECK(value->scalar_type() == ScalarType::Float, op, ": ", name,
                  " must be float32, got ", dtype_name(value->scalar_type()));
  STD_TORCH_CHECK(value->is_cpu(), op, ": ", name, " must be on cpu, got another device");
  STD_TORCH_CHECK(value->numel() == 1, op, ": ", name, " must hold 1 element, got ",
                  shape_text(*value));
  return *static_cast<const float*>(value->const_data_ptr());
}

inline void want_ok(const char* op, Status s) {
  if (s == kOk) return;
  if (s == kNoKernel && cpu_isa_error()) STD_TORCH_CHECK(false, cpu_isa_error());
  STD_TORCH_CHECK(false, op, ": internal error ", static_cast<int>(s),
                  "; please report with python -m nibblock info --json");
}

}  // namespace glue
}  // namespace nibblock
