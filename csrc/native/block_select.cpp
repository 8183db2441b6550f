// Which row of a block-sparse table serves a call, and why each other row does not: what nb.explain
// prints.
#include "native.h"

#include "../block_sparse_linear/block_sparse_linear.h"

namespace nibblock {
namespace native {
namespace {

using std::string;
using std::to_string;

// What select needs to know of a call. A layout's content does not decide: there is none.
struct Call {
  int64_t m, out_features, in_features, block, count;
  Dtype x_type, values_type;
};

BlockLayout layout_of(const Call& c) {
  BlockLayout s = {};
  s.n = c.out_features;
  s.k = c.in_features;
  s.block = c.block;
  s.count = c.count;
  return s;
}

template <class Table, class Row, class Params>
py::dict choice(const Table& t, const Row* chosen, const Params& p) {
  py::list refused;
  bool passed = false;
  for (int i = 0; i < t.count; ++i) {
    const Row& row = t.rows[i];
    if (&row == chosen) {
      passed = true;
      continue;
    }
    string reason = string("not reached");
    if (row.isa > cpu_isa()) {
      reason =
          string("needs ") + isa_name(row.isa) + ", the level in force is " + isa_name(cpu_isa());
    } else if (!row.serves(p)) {
      reason = string("serves only: ") + row.serves_text;
    } else if (passed) {
      reason = string("comes after ") + chosen->id;
    }
    refused.append(py::make_tuple(row.id, reason));
  }
  py::dict d;
  d["kernel"] = chosen ? py::object(py::str(chosen->id)) : py::object(py::none());
  d["refused"] = refused;
  return d;
}

py::dict product(const Call& c, bool dx) {
  BlockSparseParams p = {};
  p.s = layout_of(c);
  p.m = c.m;
  p.xtype = c.x_type;
  p.vtype = c.values_type;
  p.x_stride = dx ? c.out_features : c.in_features;
  p.y_stride = dx ? c.in_features : c.out_features;
  const BlockSparseTable t = dx ? block_sparse_linear_dx_table() : block_sparse_linear_table();
  return choice(t, block_sparse_select(t, p), p);
}

py::dict weight_grad(const Call& c) {
  BlockWeightGradParams p = {};
  p.s = layout_of(c);
  p.m = c.m;
  p.gtype = c.x_type;
  p.out_type = c.values_type;
  p.g_stride = c.out_features;
  p.x_stride = c.in_features;
  const BlockWeightGradTable t = block_weight_grad_table();
  return choice(t, block_weight_grad_select(t, p), p);
}

py::dict fused(const Call& c, bool dx) {
  Int4BlockSparseParams p = {};
  p.s = layout_of(c);
  p.base.m = c.m;
  p.base.xtype = c.x_type;
  p.base.w.n = c.out_features;
  p.base.w.k = c.in_features;
  p.vtype = c.values_type;
  const Int4BlockSparseTable t =
      dx ? int4_block_sparse_linear_dx_table() : int4_block_sparse_linear_table();
  return choice(t, int4_block_sparse_select(t, p), p);
}

py::dict select(const string& which, int64_t m, int64_t out_features, int64_t in_features,
                int64_t block, int64_t count, const string& x_dtype, const string& values_dtype) {
  const string op = "block_sparse_select";
  for (const string& name : {x_dtype, values_dtype}) {
    if (name != "float32" && name != "float16" && name != "bfloat16") {
      fail_type(op, "dtypes must be float32, bfloat16 or float16, got " + name);
    }
  }
  if (m < 0 || count < 0) fail_value(op, "m and count must be 0 or more, got " + to_string(m));
  const Call c = {
      m, out_features, in_features, block, count, float_dtype(x_dtype), float_dtype(values_dtype)};
  if (which == "forward" || which == "dx") return product(c, which == "dx");
  if (which == "weight_grad") return weight_grad(c);
  if (which == "fused" || which == "fused_dx") return fused(c, which == "fused_dx");
  fail_value(op, "which must be one of forward, dx, weight_grad, fused, fused_dx, got " + which);
}

}  // namespace

void bind_block_select(py::module_& m) {
  using py::arg;
  m.def("block_sparse_select", &select, arg("which"), arg("m"), arg("out_features"),
        arg("in_features"), arg("block"), arg("count"), arg("x_dtype"), arg("values_dtype"),
        "Which row serves such a call, and why each other row does not.");
}

}  // namespace native
}  // namespace nibblock
