// What the files of the `_native` module share: threads, aligned arrays and argument checks.
//
// The module takes and gives NumPy arrays, links the torch-free kernels and imports nothing else,
// so the checkpoint converter and `python -m nibblock info` do not depend on torch's C++ side.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "../int4_linear/int4_linear.h"

namespace nibblock {
namespace native {

namespace py = pybind11;

// --- threads -------------------------------------------------------------------------------------

// A Parallel of so many std::threads, which share the tasks as torch's do (common/task_runs.h), and
// are joined. No pool: the calls of this module are long, and nothing is left running in a process
// that forks.
Parallel std_threads(int threads);

// --- arrays --------------------------------------------------------------------------------------

// An uninitialised uint8 array whose data starts at a multiple of 64 bytes.
py::array aligned_bytes(int64_t bytes);

// --- arguments -----------------------------------------------------------------------------------

// Every error reads "<op>: <argument> must <need>, got <value>[; <fix>]".
[[noreturn]] void fail_value(const std::string& op, const std::string& rest);
[[noreturn]] void fail_type(const std::string& op, const std::string& rest);
[[noreturn]] void fail_unavailable(const std::string& op, const std::string& rest);

std::string shape_text(const std::vector<int64_t>& shape);
std::string shape_text(const py::array& a);
std::string type_text(const py::handle& value);

// The argument as an ndarray in native byte order whose dtype is one of `dtypes` (NumPy names).
py::array want_array(const std::string& op, const std::string& name, const py::object& value,
                     const std::vector<std::string>& dtypes);
void want_shape(const std::string& op, const std::string& name, const py::array& a,
                const std::vector<int64_t>& shape);
// The same array, or a contiguous copy of it.
py::array contiguous(const py::array& a);

std::string dtype_name(const py::array& a);
Dtype float_dtype(const std::string& name);  // "float32", "float16", "bfloat16" and "uint16" (bf16)
const char* float_dtype_name(Dtype t);

int want_threads(const std::string& op, int64_t threads);
Dtype want_scale_dtype(const std::string& op, const std::string& name);
Compute want_compute(const std::string& op, const std::string& name);
Int4Format want_format(const std::string& op, int64_t out_features, int64_t in_features,
                       int64_t group_size, int64_t bits, bool affine, Dtype scale_type);
// The data of a packed weight of format f, which gets a palette if the size says so; `aligned` asks
// for a multiple of 64 bytes instead of copying.
const uint8_t* want_packed(const std::string& op, Int4Format* f, const py::object& value,
                           bool aligned, py::array* keep);
// The row stride of a [M, last] array in elements; its last dimension must be contiguous.
int64_t row_stride(const std::string& op, const std::string& name, const py::array& a);
void want_matrix(const std::string& op, const std::string& name, const std::string& last_name,
                 const py::array& a, int64_t last);
// Bytes of one row of canonical codes.
inline int64_t code_row_bytes(const Int4Format& f) { return f.bits == 4 ? ceil_div(f.k, 2) : f.k; }

// --- the parts of the module ---------------------------------------------------------------------

void bind_features(py::module_& m);
void bind_int4_linear(py::module_& m);
void bind_block_sparse(py::module_& m);
void bind_block_select(py::module_& m);
void bind_block_scores(py::module_& m);
void bind_masked_update(py::module_& m);
void bind_quantize(py::module_& m);
void bind_ceilings(py::module_& m);

}  // namespace native
}  // namespace nibblock
