#include "native.h"

#include <sys/mman.h>

#include <stdlib.h>

#include <algorithm>
#include <memory>
#include <thread>

#include "../common/task_runs.h"

namespace nibblock {
namespace native {

using std::string;
using std::to_string;

namespace {

void run_std_threads(const Parallel* self, int64_t tasks, void (*body)(void*, int64_t, int64_t),
                     void* ctx) {
  TaskRuns runs(tasks, self->threads);
  auto work = [&] { runs.work(body, ctx); };
  const int64_t others = std::min<int64_t>(self->threads, tasks) - 1;
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(others));
  for (int64_t i = 0; i < others; ++i) threads.emplace_back(work);
  work();
  for (std::thread& t : threads) t.join();
}

[[noreturn]] void fail(PyObject* type, const std::string& op, const std::string& rest) {
  PyErr_SetString(type, (op + ": " + rest).c_str());
  throw py::error_already_set();
}

}  // namespace

Parallel std_threads(int threads) { return {run_std_threads, threads}; }

py::array aligned_bytes(int64_t bytes) {
  // A large weight is read through once per token: on 4 KiB pages the TLB misses cost more than a
  // tenth of it. Advice only, so a kernel that has no huge pages changes nothing; and before the
  // first touch, which is what decides.
  constexpr int64_t kHugePage = 2 << 20;
  const bool huge = bytes >= 2 * kHugePage;
  void* data = nullptr;
  if (posix_memalign(&data, huge ? kHugePage : 64,
                     static_cast<size_t>(std::max<int64_t>(bytes, 1))))
    throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (huge) madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
  py::capsule owner(data, [](void* p) { free(p); });
  return py::array(py::dtype::of<uint8_t>(), {bytes}, {int64_t{1}}, data, owner);
}

void fail_value(const std::string& op, const std::string& rest) {
  fail(PyExc_ValueError, op, rest);
}
void fail_type(const std::string& op, const std::string& rest) { fail(PyExc_TypeError, op, rest); }
void fail_unavailable(const std::string& op, const std::string& rest) {
  py::object type = py::module_::import("nibblock._errors").attr("BackendUnavailable");
  fail(type.ptr(), op, rest);
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

std::string shape_text(const py::array& a) {
  return shape_text(std::vector<int64_t>(a.shape(), a.shape() + a.ndim()));
}

std::string type_text(const py::handle& value) {
  if (py::isinstance<py::array>(value)) return dtype_name(py::reinterpret_borrow<py::array>(value));
  return Py_TYPE(value.ptr())->tp_name;
}

std::string dtype_name(const py::array& a) { return py::str(a.dtype()).cast<std::string>(); }

py::array want_array(const std::string& op, const std::string& name, const py::object& value,
                     const std::vector<std::string>& dtypes) {
  std::string allowed;
  for (const std::string& d : dtypes) allowed += (allowed.empty() ? "" : " or ") + d;
  if (!py::isinstance<py::array>(value)) {
    fail_type(op, name + " must be a NumPy array of " + allowed + ", got " + type_text(value));
  }
  py::array a = py::reinterpret_borrow<py::array>(value);
  // A foreign byte order prints as '>f4' and so matches no name.
  if (std::find(dtypes.begin(), dtypes.end(), dtype_name(a)) == dtypes.end()) {
    fail_type(op, name + " must be " + allowed + ", got " + dtype_name(a));
  }
  return a;
}

void want_shape(const std::string& op, const std::string& name, const py::array& a,
                const std::vector<int64_t>& shape) {
  if (std::vector<int64_t>(a.shape(), a.shape() + a.ndim()) != shape) {
    fail_value(op, name + " must be " + shape_text(shape) + ", got " + shape_text(a));
  }
}

py::array contiguous(const py::array& a) { return py::array::ensure(a, py::array::c_style); }

Dtype float_dtype(const std::string& name) {
  if (name == "float32") return Dtype::kF32;
  return name == "float16" ? Dtype::kF16 : Dtype::kBF16;
}

const char* float_dtype_name(Dtype t) {
  return t == Dtype::kF32 ? "float32" : t == Dtype::kF16 ? "float16" : "bfloat16";
}

int want_threads(const std::string& op, int64_t threads) {
  if (threads < 1 || threads > 1024) {
    fail_value(op, "threads must be 1 to 1024, got " + std::to_string(threads));
  }
  return static_cast<int>(threads);
}

Dtype want_scale_dtype(const std::string& op, const std::string& name) {
  if (name == "int8") return Dtype::kI8;
  if (name != "float32" && name != "float16") {
    fail_type(op, "scale_dtype must be float16, float32 or int8, got " + name);
  }
  return float_dtype(name);
}

Compute want_compute(const std::string& op, const std::string& name) {
  if (name == "bf16") return Compute::kBF16;
  if (name == "int8") return Compute::kInt8;
  fail_value(op, "compute must be \"bf16\" or \"int8\", got \"" + name + "\"");
}

Int4Format want_format(const std::string& op, int64_t out_features, int64_t in_features,
                       int64_t group_size, int64_t bits, bool affine, Dtype scale_type) {
  constexpr int64_t kLimit = int64_t{1} << 31;  // keeps every byte count far inside int64
  if (out_features < 0 || out_features >= kLimit) {
    fail_value(op, "out_features must be 0 to 2^31 - 1, got " + std::to_string(out_features));
  }
  if (in_features < 0 || in_features >= kLimit) {
    fail_value(op, "in_features must be 0 to 2^31 - 1, got " + std::to_string(in_features));
  }
  if (bits != 4 && bits != 8) fail_value(op, "bits must be 4 or 8, got " + std::to_string(bits));
  if (!int4_has_group(group_size, bits, scale_type)) {
    fail_value(op, std::string("group_size must be ") + int4_groups_text(bits) + ", got " +
                       std::to_string(group_size));
  }
  if (scale_type == Dtype::kI8 && !int4_has_int8_scales(group_size, in_features)) {
    fail_value(op, std::string("the weight must have ") + int4_int8_scales_text() +
                       ", got group_size=" + std::to_string(group_size) +
                       ", in_features=" + std::to_string(in_features));
  }
  return {out_features, in_features, group_size, static_cast<int32_t>(bits), affine, scale_type};
}

// --- shared by the kernel runners ----------------------------------------------------------------

const uint8_t* want_packed(const string& op, Int4Format* f, const py::object& value, bool aligned,
                           py::array* keep) {
  py::array a = want_array(op, "packed", value, {"uint8"});
  int4_take_palette(f, a.size());
  want_shape(op, "packed", a, {int4_geometry(*f).bytes});
  *keep = aligned ? a : contiguous(a);
  if (a.ndim() == 1 && a.size() > 1 && a.strides(0) != 1 && aligned) {
    fail_value(op, "packed must be contiguous, got stride " + to_string(a.strides(0)));
  }
  const auto* data = static_cast<const uint8_t*>(keep->data());
  if (aligned && reinterpret_cast<uintptr_t>(data) % 64) {
    fail_value(op, "packed must start at a multiple of 64 bytes, got an address " +
                       to_string(reinterpret_cast<uintptr_t>(data) % 64) +
                       " past one; use pack()'s own array");
  }
  return data;
}

// The row stride of a [M, last] array in elements; its last dimension must be contiguous.
int64_t row_stride(const string& op, const string& name, const py::array& a) {
  const int64_t item = a.itemsize();
  if (a.size() == 0) return a.shape(1);  // NumPy gives an empty array strides of 0
  if (a.shape(1) > 1 && a.strides(1) != item) {
    fail_value(op, name + " must be contiguous along its last dimension, got strides [" +
                       to_string(a.strides(0)) + ", " + to_string(a.strides(1)) + "] bytes");
  }
  if (a.shape(0) <= 1) return a.shape(1);
  if (a.strides(0) % item) {
    fail_value(op, name + " must have a row stride of whole elements, got " +
                       to_string(a.strides(0)) + " bytes");
  }
  return a.strides(0) / item;
}

void want_matrix(const string& op, const string& name, const string& last_name, const py::array& a,
                 int64_t last) {
  if (a.ndim() != 2 || a.shape(1) != last) {
    fail_value(op, name + " must be [M, " + last_name + " = " + to_string(last) + "], got " +
                       shape_text(a));
  }
}

}  // namespace native
}  // namespace nibblock
