// Checks of tensors that came in lists: messages name the list and the position, as in
// "masked_adamw_flat_: grads[3] must be float32 as params[3], got float16".
#pragma once

#include <math.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

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

// torch's numbers of the dtypes and devices that lists have, asked for once.
struct Codes {
  int32_t f32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16();
  int32_t i32 = aoti_torch_dtype_int32(), i64 = aoti_torch_dtype_int64();
  int32_t boolean = aoti_torch_dtype_bool(), cpu = aoti_torch_device_type_cpu();
};
inline const Codes& codes() {
  static const Codes known;
  return known;
}

enum class Access { kNone, kRead, kWrite };

// What the checks ask of a tensor, each asked of torch once. A long list is read in one tight loop
// of these: after a backward none of its tensors' descriptions is cached, and so the processor
// waits for those of several tensors at a time.
struct Facts {
  const Tensor* tensor;
  int32_t code, device_type;
  int64_t dims;
  const int64_t *shape, *steps;
  void* data = nullptr;  // unless Access::kNone; not to be written after kRead

  // NOLINTNEXTLINE: a tensor stands for its facts.
  Facts(const Tensor& t, Access access = Access::kNone) : tensor(&t) {
    const AtenTensorHandle h = t.get();
    int64_t *sizes, *strides;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(h, &code));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(h, &device_type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(h, &dims));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(h, &sizes));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(h, &strides));
    shape = sizes;
    steps = strides;
    if (access == Access::kRead) data = const_cast<void*>(t.const_data_ptr());
    if (access == Access::kWrite) data = t.mutable_data_ptr();
  }

  int64_t dim() const { return dims; }
  int64_t size(int64_t i) const { return shape[i]; }
  int64_t stride(int64_t i) const { return steps[i]; }
  bool is_cpu() const { return device_type == codes().cpu; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0; i < dims; ++i) n *= shape[i];
    return n;
  }
  bool is_contiguous() const {
    int64_t step = 1;
    bool plain = true;
    for (int64_t i = dims - 1; i >= 0; --i) {
      plain &= shape[i] == 1 || steps[i] == step;
      step *= shape[i];
    }
    return plain || step == 0;
  }
  ScalarType scalar_type() const {
    const Codes& c = codes();
    if (code == c.f32) return ScalarType::Float;
    if (code == c.bf16) return ScalarType::BFloat16;
    if (code == c.i32) return ScalarType::Int;
    if (code == c.i64) return ScalarType::Long;
    if (code == c.boolean) return ScalarType::Bool;
    return tensor->scalar_type();
  }
};

inline std::string shape_text(const Facts& t) { return shape_text(*t.tensor); }

// Of a list that lives as long: facts point at its tensors.
std::vector<Facts> facts_of(Tensors&& list, Access access) = delete;
inline std::vector<Facts> facts_of(const Tensors& list, Access access) {
  std::vector<Facts> out;
  out.reserve(list.size());
  for (const Tensor& t : list) out.emplace_back(t, access);
  return out;
}

inline bool same_shape(const Facts& a, const Facts& b) {
  bool same = a.dims == b.dims;
  for (int64_t i = 0; same && i < a.dims; ++i) same = a.shape[i] == b.shape[i];
  return same;
}

// One tensor of a list, with what it takes to name it. The good path builds no string.
struct Item {
  const char* op;
  const char* list;
  size_t at;
  const Facts& tensor;

  std::string text() const { return std::string(list) + "[" + std::to_string(at) + "]"; }
  std::string peer(const char* name) const {
    return std::string(name) + "[" + std::to_string(at) + "]";
  }
  void want_type(ScalarType type, const char* name) const {
    STD_TORCH_CHECK(tensor.scalar_type() == type, op, ": ", text(), " must be ", name, ", got ",
                    dtype_name(tensor.scalar_type()));
  }
  void want_same_type(const Facts& other, const char* name) const {
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
  void want_shape_of(const Facts& other, const char* name) const {
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
    if (tensor.is_contiguous()) {
      return static_cast<const int32_t*>(tensor.data ? tensor.data
                                                     : tensor.tensor->const_data_ptr());
    }
    keep->push_back(torch::stable::contiguous(*tensor.tensor));
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
