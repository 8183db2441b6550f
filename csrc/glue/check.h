// Turning torch tensors into what the torch-free kernels take: dtypes, rows, threads, messages.
// LibTorch stable ABI only. The sentences are the ones python/nibblock/ops raises as TypeError and
// ValueError; here they are the last guard, for direct calls of torch.ops.nibblock.*, and arrive as
// RuntimeError.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

#include "../common/parallel.h"
#include "../common/task_runs.h"
#include "../common/types.h"

namespace nibblock {
namespace glue {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string dtype_name(ScalarType t) {
  switch (t) {
  case ScalarType::Float:
    return "float32";
  case ScalarType::Double:
    return "float64";
  case ScalarType::Half:
    return "float16";
  case ScalarType::BFloat16:
    return "bfloat16";
  case ScalarType::Byte:
    return "uint8";
  case ScalarType::Char:
    return "int8";
  case ScalarType::Short:
    return "int16";
  case ScalarType::Int:
    return "int32";
  case ScalarType::Long:
    return "int64";
  case ScalarType::Bool:
    return "bool";
  case ScalarType::ComplexFloat:
    return "complex64";
  case ScalarType::ComplexDouble:
    return "complex128";
  default:
    return "dtype " + std::to_string(static_cast<int>(t));
  }
}

inline std::string shape_text(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t i = 0; same && i < a.dim(); ++i) same = a.size(i) == b.size(i);
  return same;
}

inline bool float_dtype(ScalarType t, Dtype* out) {
  if (t == ScalarType::Float) return *out = Dtype::kF32, true;
  if (t == ScalarType::BFloat16) return *out = Dtype::kBF16, true;
  if (t == ScalarType::Half) return *out = Dtype::kF16, true;
  return false;
}

inline Dtype check_float(const char* op, const char* arg, ScalarType t) {
  Dtype d = Dtype::kF32;
  STD_TORCH_CHECK(float_dtype(t, &d), op, ": ", arg, " must be float32, bfloat16 or float16, got ",
                  dtype_name(t));
  return d;
}

inline void check_cpu(const char* op, const char* arg, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", arg, " must be on cpu, where x is, got another device");
}

// x seen as rows: [..., last] -> pointer, count and stride. A layout that rows cannot describe is
// copied into `keep`, which must outlive the pointer.
struct Rows {
  const void* data;
  int64_t count, last, stride;
};

inline Rows as_rows(const Tensor& x, Tensor* keep) {
  const int64_t dim = x.dim();
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  Rows r;
  r.last = sizes[dim - 1];
  r.count = 1;
  r.stride = r.last;
  bool plain = r.last <= 1 || strides[dim - 1] == 1;
  int64_t expected = 0;  // stride that the next outer dimension must have to continue the rows
  bool first = true;
  for (int64_t i = dim - 2; i >= 0; --i) {
    const int64_t size = sizes[i];
    r.count *= size;
    if (size == 1) continue;
    if (first) {
      r.stride = strides[i];
      first = false;
    } else if (strides[i] != expected) {
      plain = false;
    }
    expected = strides[i] * size;
  }
  if (plain) {
    r.data = x.const_data_ptr();
    return r;
  }
  *keep = torch::stable::contiguous(x);
  r.data = keep->const_data_ptr();
  r.stride = r.last;
  return r;
}

// An uninitialised contiguous CPU result with x's leading dimensions and dtype. Made by the C shim
// that allocates directly: new_empty goes through the dispatcher, which costs a microsecond.
inline Tensor empty_like_rows(const Tensor& x, int64_t last) {
  const auto sizes = x.sizes();
  const int64_t dim = x.dim();
  int64_t small[16];
  std::vector<int64_t> large;
  int64_t* size = small;
  if (dim > 8) {
    large.resize(2 * dim);
    size = large.data();
  }
  int64_t* stride = size + dim;
  int64_t step = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    size[i] = i + 1 < dim ? sizes[i] : last;
    stride[i] = step;
    step *= size[i] > 0 ? size[i] : 1;
  }
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  AtenTensorHandle y;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, size, stride, dtype, aoti_torch_device_type_cpu(), 0, &y));
  return Tensor(y);
}

// torch's own pool. at::parallel_for runs the body inline when called from inside another parallel
// region or with one thread, which is also what makes a forked worker with set_num_threads(1) safe.
static inline Parallel torch_parallel() {  // (static as what it captures)
  Parallel p;
  p.run = [](const Parallel* self, int64_t tasks, void (*body)(void*, int64_t, int64_t),
             void* ctx) {
    TaskRuns runs(tasks, self->threads);
    const int64_t threads = tasks < self->threads ? tasks : self->threads;
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { runs.work(body, ctx); });
  };
  p.threads = static_cast<int>(torch::stable::get_num_threads());
  return p;
}

}  // namespace glue
}  // namespace nibblock
