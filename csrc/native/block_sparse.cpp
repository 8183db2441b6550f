// NumPy in, NumPy out: the tables of the block-sparse kernels, each of which can be run by name.
// The tests use this to reach every row without torch between them and the kernel.
#include "native.h"

#include <memory>

#include "../block_sparse_linear/block_sparse_linear.h"

namespace nibblock {
namespace native {
namespace {

using std::string;
using std::to_string;

const char* const kTables = "forward, dx, weight_grad, fused, fused_dx";

// Calls f with the named table.
template <class Fn>
auto with_table(const string& op, const string& which, Fn&& f) {
  if (which == "forward") return f(block_sparse_linear_table());
  if (which == "dx") return f(block_sparse_linear_dx_table());
  if (which == "weight_grad") return f(block_weight_grad_table());
  if (which == "fused") return f(int4_block_sparse_linear_table());
  if (which == "fused_dx") return f(int4_block_sparse_linear_dx_table());
  fail_value(op, string("which must be one of ") + kTables + ", got \"" + which + "\"");
}

string above_level(Isa isa) {
  return string("needs ") + isa_name(isa) + ", the level in force is " + isa_name(cpu_isa());
}

py::list kernels(const string& which) {
  py::list out;
  with_table("block_sparse_kernels", which, [&](auto t) {
    for (int i = 0; i < t.count; ++i) {
      py::dict d;
      d["id"] = t.rows[i].id;
      d["isa"] = isa_name(t.rows[i].isa);
      d["serves"] = t.rows[i].serves_text;
      d["available"] = t.rows[i].isa <= cpu_isa();
      d["reason"] = t.rows[i].isa <= cpu_isa() ? string() : above_level(t.rows[i].isa);
      out.append(d);
    }
    return 0;
  });
  return out;
}

template <class Table>
void check_status(const string& op, Status status, const char* id, const Table& t) {
  if (status == kOk) return;
  string ids;
  for (int i = 0; i < t.count; ++i) {
    ids += string(i ? ", " : "") + t.rows[i].id;
    if (!id || string(id) != t.rows[i].id) continue;
    if (status == kIsaUnavailable) {
      fail_unavailable(op,
                       string("kernel ") + id + " cannot run: it " + above_level(t.rows[i].isa));
    }
    if (status == kNotServed) {
      fail_unavailable(op, string("kernel ") + id + " serves only: " + t.rows[i].serves_text);
    }
  }
  if (status == kUnknownKernel) fail_value(op, "kernel_id must be one of " + ids + ", got " + id);
  if (status == kNoKernel) fail_unavailable(op, "no kernel serves this call at this level");
  if (status == kOutOfMemory) throw std::bad_alloc();
  throw std::runtime_error(op + ": internal error " + to_string(status));
}

// --- arguments -----------------------------------------------------------------------------------

struct Arguments {  // keeps alive what the params point to
  py::array x, values, layout, bias, y0, y, packed, a, c;
  string id;
};

const char* id_of(const py::object& kernel_id, Arguments* keep) {
  if (kernel_id.is_none()) return nullptr;
  keep->id = py::str(kernel_id).cast<string>();
  return keep->id.c_str();
}

BlockLayout want_layout(const string& op, const py::object& value, int64_t n, int64_t k,
                        int64_t block, Arguments* keep) {
  if (block != 16 && block != 32 && block != 64 && block != 128) {
    fail_value(op, "block must be 16, 32, 64 or 128, got " + to_string(block));
  }
  if (n < 0 || k < 0) fail_value(op, "out_features and in_features must be 0 or more");
  keep->layout = want_array(op, "layout", value, {"int32"});
  const int64_t left = keep->layout.size() - block_layout_size(n, k, block, 0);
  if (keep->layout.ndim() != 1 || left < 0 || left % 3) {
    fail_value(op, "layout must be [" + to_string(block_layout_size(n, k, block, 0)) +
                       " + 3 Z], got " + shape_text(keep->layout));
  }
  if (keep->layout.size() > 1 && keep->layout.strides(0) != 4)
    keep->layout = contiguous(keep->layout);
  const BlockLayout s =
      block_layout(static_cast<const int32_t*>(keep->layout.data()), n, k, block, left / 3);
  if (!block_layout_in_range(s)) fail_value(op, "layout must hold indices inside the matrix");
  return s;
}

void want_contiguous(const string& op, const string& name, const py::array& a) {
  if (a.size() && !(a.flags() & py::array::c_style)) fail_value(op, name + " must be contiguous");
}

Dtype want_values(const string& op, const py::object& value, const BlockLayout& s,
                  Arguments* keep) {
  keep->values = want_array(op, "values", value, {"float32", "uint16"});
  want_shape(op, "values", keep->values, {s.count, s.block, s.block});
  want_contiguous(op, "values", keep->values);
  return float_dtype(dtype_name(keep->values));
}

// uint16 is bfloat16 everywhere in this module.
Dtype want_rows(const string& op, const string& name, const py::object& value, int64_t last,
                int64_t* m, int64_t* stride, py::array* keep) {
  *keep = want_array(op, name, value, {"float32", "float16", "uint16"});
  want_matrix(op, name, "features", *keep, last);
  *m = keep->shape(0);
  *stride = row_stride(op, name, *keep);
  return float_dtype(dtype_name(*keep));
}

const void* want_bias(const string& op, const py::object& value, int64_t n, Dtype* type,
                      py::array* keep) {
  if (value.is_none()) return nullptr;
  *keep = want_array(op, "bias", value, {"float32", "float16", "uint16"});
  want_shape(op, "bias", *keep, {n});
  want_contiguous(op, "bias", *keep);
  *type = float_dtype(dtype_name(*keep));
  return keep->data();
}

void* want_output(const string& op, const py::object& value, const py::array& x, int64_t m,
                  int64_t last, int64_t* stride, py::array* keep) {
  if (value.is_none()) {
    *keep = py::array(x.dtype(), {m, last});
  } else {
    *keep = want_array(op, "y", value, {dtype_name(x)});
    want_shape(op, "y", *keep, {m, last});
    if (!keep->writeable()) fail_value(op, "y must be writeable, got a read-only array");
  }
  *stride = row_stride(op, "y", *keep);
  return keep->mutable_data();
}

// --- running a row -------------------------------------------------------------------------------

py::array run_product(const string& which, const py::object& kernel_id, const py::object& x,
                      const py::object& values, const py::object& layout, int64_t out_features,
                      int64_t in_features, int64_t block, const py::object& bias,
                      const py::object& y0, int64_t threads, const py::object& y) {
  const string op = "block_sparse_run";
  const bool dx = which == "dx";
  if (!dx && which != "forward")
    fail_value(op, "which must be forward or dx, got \"" + which + "\"");
  Arguments keep;
  BlockSparseParams p = {};
  p.s = want_layout(op, layout, out_features, in_features, block, &keep);
  p.vtype = want_values(op, values, p.s, &keep);
  p.values = keep.values.data();
  p.xtype = want_rows(op, "x", x, dx ? out_features : in_features, &p.m, &p.x_stride, &keep.x);
  p.x = keep.x.data();
  p.bias = want_bias(op, bias, out_features, &p.bias_type, &keep.bias);
  const int64_t last = dx ? in_features : out_features;
  if (!y0.is_none()) {
    int64_t m;
    if (want_rows(op, "y0", y0, last, &m, &p.y0_stride, &keep.y0) != p.xtype || m != p.m) {
      fail_value(op, "y0 must be of x's dtype and rows, got " + shape_text(keep.y0));
    }
    p.y0 = keep.y0.data();
  }
  if (dx && (p.bias || p.y0)) fail_value(op, "bias and y0 must be None for dx, got an array");
  p.y = want_output(op, y, keep.x, p.m, last, &p.y_stride, &keep.y);
  const Parallel parallel = std_threads(want_threads(op, threads));
  p.parallel = &parallel;
  const char* id = id_of(kernel_id, &keep);
  const BlockSparseTable t = dx ? block_sparse_linear_dx_table() : block_sparse_linear_table();
  Status status;
  {
    py::gil_scoped_release nogil;
    status = block_sparse_run(t, p, id);
  }
  check_status(op, status, id, t);
  return keep.y;
}

py::array run_weight_grad(const py::object& kernel_id, const py::object& grad, const py::object& x,
                          const py::object& layout, int64_t out_features, int64_t in_features,
                          int64_t block, const string& dtype, int64_t threads,
                          const py::object& out) {
  const string op = "block_weight_grad_run";
  Arguments keep;
  BlockWeightGradParams p = {};
  p.s = want_layout(op, layout, out_features, in_features, block, &keep);
  int64_t m;
  p.gtype = want_rows(op, "grad", grad, out_features, &p.m, &p.g_stride, &keep.y0);
  if (want_rows(op, "x", x, in_features, &m, &p.x_stride, &keep.x) != p.gtype || m != p.m) {
    fail_value(op, "x must be of grad's dtype and rows, got " + shape_text(keep.x));
  }
  p.g = keep.y0.data();
  p.x = keep.x.data();
  if (dtype != "float32" && dtype != "bfloat16") {
    fail_type(op, "dtype must be float32 or bfloat16, got " + dtype);
  }
  p.out_type = float_dtype(dtype);
  const string held = dtype == "float32" ? "float32" : "uint16";
  if (out.is_none()) {
    keep.y = py::array(py::dtype(held), {p.s.count, block, block});
  } else {
    keep.y = want_array(op, "out", out, {held});
    want_shape(op, "out", keep.y, {p.s.count, block, block});
    want_contiguous(op, "out", keep.y);
  }
  p.out = keep.y.mutable_data();
  const Parallel parallel = std_threads(want_threads(op, threads));
  p.parallel = &parallel;
  const char* id = id_of(kernel_id, &keep);
  const BlockWeightGradTable t = block_weight_grad_table();
  Status status;
  {
    py::gil_scoped_release nogil;
    status = block_weight_grad_run(t, p, id);
  }
  check_status(op, status, id, t);
  return keep.y;
}

py::array run_fused(const string& which, const py::object& kernel_id, const py::object& x,
                    const py::object& packed, const py::object& bias, int64_t out_features,
                    int64_t in_features, int64_t group_size, int64_t bits, bool affine,
                    const string& scale_dtype, const string& compute, const py::object& values,
                    const py::object& layout, int64_t block, const py::object& lora_a,
                    const py::object& lora_c, int64_t threads, const py::object& y) {
  const string op = "int4_block_sparse_run";
  const bool dx = which == "fused_dx";
  if (!dx && which != "fused")
    fail_value(op, "which must be fused or fused_dx, got \"" + which + "\"");
  Arguments keep;
  Int4BlockSparseParams f = {};
  Int4LinearParams& p = f.base;
  p.w = want_format(op, out_features, in_features, group_size, bits, affine,
                    want_scale_dtype(op, scale_dtype));
  p.compute = want_compute(op, compute);
  f.s = want_layout(op, layout, out_features, in_features, block, &keep);
  f.vtype = want_values(op, values, f.s, &keep);
  f.values = keep.values.data();
  p.xtype = want_rows(op, "x", x, dx ? out_features : in_features, &p.m, &p.x_stride, &keep.x);
  p.x = keep.x.data();
  p.packed = want_packed(op, &p.w, packed, true, &keep.packed);
  p.bias = want_bias(op, bias, out_features, &p.bias_type, &keep.bias);
  if (dx && p.bias) fail_value(op, "bias must be None for fused_dx, got an array");
  if (lora_a.is_none() != lora_c.is_none())
    fail_value(op, "lora_c must be given exactly when lora_a is");
  if (!lora_a.is_none()) {
    keep.a = want_array(op, "lora_a", lora_a, {"float32", "float16", "uint16"});
    keep.c = want_array(op, "lora_c", lora_c, {dtype_name(keep.a)});
    if (keep.a.ndim() != 2)
      fail_value(op, "lora_a must be [rank, in_features], got " + shape_text(keep.a));
    f.rank = keep.a.shape(0);
    want_shape(op, "lora_a", keep.a, {f.rank, in_features});
    want_shape(op, "lora_c", keep.c, {out_features, f.rank});
    want_contiguous(op, "lora_a", keep.a);
    want_contiguous(op, "lora_c", keep.c);
    f.a = keep.a.data();
    f.c = keep.c.data();
    f.ltype = float_dtype(dtype_name(keep.a));
  }
  p.y = want_output(op, y, keep.x, p.m, dx ? in_features : out_features, &p.y_stride, &keep.y);
  const Parallel parallel = std_threads(want_threads(op, threads));
  p.parallel = &parallel;
  const char* id = id_of(kernel_id, &keep);
  const Int4BlockSparseTable t =
      dx ? int4_block_sparse_linear_dx_table() : int4_block_sparse_linear_table();
  Status status;
  {
    py::gil_scoped_release nogil;
    status = int4_block_sparse_run(t, f, id);
  }
  check_status(op, status, id, t);
  return keep.y;
}

}  // namespace

void bind_block_sparse(py::module_& m) {
  using py::arg;
  const py::none none;
  m.def("block_sparse_kernels", &kernels, arg("which") = "forward",
        "The rows of a table (forward, dx, weight_grad, fused, fused_dx) in the order they are "
        "tried.");
  m.def("block_sparse_run", &run_product, arg("which"), arg("kernel_id"), arg("x"), arg("values"),
        arg("layout"), arg("out_features"), arg("in_features"), arg("block"), arg("bias") = none,
        arg("y0") = none, arg("threads") = 1, arg("y") = none,
        "Runs one row of \"forward\" or \"dx\" (None: the first that serves). bfloat16 is uint16 "
        "bits.");
  m.def("block_weight_grad_run", &run_weight_grad, arg("kernel_id"), arg("grad"), arg("x"),
        arg("layout"), arg("out_features"), arg("in_features"), arg("block"),
        arg("dtype") = "float32", arg("threads") = 1, arg("out") = none,
        "Runs one row of \"weight_grad\": [Z, B, B].");
  m.def("int4_block_sparse_run", &run_fused, arg("which"), arg("kernel_id"), arg("x"),
        arg("packed"), arg("bias"), arg("out_features"), arg("in_features"), arg("group_size"),
        arg("bits"), arg("affine"), arg("scale_dtype"), arg("compute"), arg("values"),
        arg("layout"), arg("block"), arg("lora_a") = none, arg("lora_c") = none, arg("threads") = 1,
        arg("y") = none, "Runs one row of \"fused\" or \"fused_dx\".");
}

}  // namespace native
}  // namespace nibblock
