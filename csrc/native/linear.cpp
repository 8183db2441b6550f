// NumPy in, NumPy out: pack, unpack, dequantise, and the table of int4_linear kernels, each of
// which can be run by name. The tests use this to reach every row without torch between them and
// the kernel.
#include "native.h"

#include <memory>

namespace nibblock {
namespace native {
namespace {

using std::string;
using std::to_string;

// --- canonical <-> packed ------------------------------------------------------------------------

bool want_palette(const string& op, bool palette, int64_t bits) {
  if (palette && bits != 8) {
    fail_value(op, "palette must be False for bits=4, got True");
  }
  return palette;
}

bool palette_fits(const py::object& qweight) {
  const py::array q = contiguous(want_array("palette_fits", "qweight", qweight, {"uint8"}));
  const auto* codes = static_cast<const uint8_t*>(q.data());
  const int64_t count = q.size();
  uint8_t values[16];
  py::gil_scoped_release nogil;
  return int4_palette(codes, count, values) <= 16;
}

int64_t packed_bytes(int64_t out_features, int64_t in_features, int64_t group_size, int64_t bits,
                     bool affine, const string& scale_dtype, bool palette) {
  const string op = "packed_bytes";
  const Dtype scale_type = want_scale_dtype(op, scale_dtype);
  Int4Format f = want_format(op, out_features, in_features, group_size, bits, affine, scale_type);
  f.palette = want_palette(op, palette, bits);
  return int4_geometry(f).bytes;
}

int64_t unfit_run(const void* scales, int64_t n, const Int4Geometry& g, const Parallel& parallel) {
  py::gil_scoped_release nogil;
  return int4_unfit_run(static_cast<const float*>(scales), n, g.groups, g.group, parallel);
}

py::array pack(const py::object& qweight, const py::object& scales, const py::object& offsets,
               int64_t in_features, int64_t group_size, int64_t bits, const py::object& scale_dtype,
               bool palette, int64_t threads) {
  const string op = "pack";
  py::array q = want_array(op, "qweight", qweight, {"uint8"});
  py::array s = want_array(op, "scales", scales, {"float16", "float32"});
  if (q.ndim() != 2) fail_value(op, "qweight must be [N, bytes of a row], got " + shape_text(q));
  const bool affine = !offsets.is_none();
  const string stored =
      scale_dtype.is_none() ? dtype_name(s) : py::cast<string>(py::str(scale_dtype));
  Int4Format f = want_format(op, q.shape(0), in_features, group_size, bits, affine,
                             want_scale_dtype(op, stored));
  f.palette = want_palette(op, palette, bits);
  const string held = f.scale_type == Dtype::kI8 ? "float32" : stored;
  if (dtype_name(s) != held) {
    fail_type(op,
              "scales must be " + held + " for scale_dtype " + stored + ", got " + dtype_name(s));
  }
  const Int4Geometry g = int4_geometry(f);
  want_shape(op, "qweight", q, {f.n, code_row_bytes(f)});
  want_shape(op, "scales", s, {f.n, g.groups});
  q = contiguous(q);
  s = contiguous(s);
  py::array o;
  if (affine) {
    o = want_array(op, "offsets", offsets, {dtype_name(s)});
    want_shape(op, "offsets", o, {f.n, g.groups});
    o = contiguous(o);
  }
  const Parallel parallel = std_threads(want_threads(op, threads));
  py::array packed = aligned_bytes(g.bytes);
  auto* out = static_cast<uint8_t*>(packed.mutable_data());
  const auto* codes = static_cast<const uint8_t*>(q.data());
  const void *scale_data = s.data(), *offset_data = affine ? o.data() : nullptr;
  if (palette && !palette_fits(q)) {
    fail_value(op, "qweight must hold at most 16 different codes for a palette, got more");
  }
  if (f.scale_type == Dtype::kI8) {
    for (const auto& [name, data] : {std::pair{"scales", scale_data}, {"offsets", offset_data}}) {
      const int64_t run = data ? unfit_run(data, f.n, g, parallel) : -1;
      if (run < 0) continue;
      const int64_t runs = f.k / kRunK;
      fail_value(op, string(name) + " must be int8 multiples of one float16 in every 256 columns " +
                         "for scale_dtype int8, got others in row " + to_string(run / runs) +
                         ", columns from " + to_string(run % runs * kRunK) +
                         "; use float32 scales");
    }
  }
  {
    py::gil_scoped_release nogil;
    int4_pack(f, codes, scale_data, offset_data, out, parallel);
  }
  return packed;
}

bool int8_scales_fit(const py::object& scales, int64_t in_features, int64_t group_size,
                     int64_t threads) {
  const string op = "int8_scales_fit";
  py::array s = want_array(op, "scales", scales, {"float32"});
  if (s.ndim() != 2) fail_value(op, "scales must be [N, groups], got " + shape_text(s));
  if (!int4_has_int8_scales(group_size, in_features)) return false;
  const Int4Geometry g = int4_geometry({s.shape(0), in_features, group_size, 4, false, Dtype::kI8});
  want_shape(op, "scales", s, {s.shape(0), g.groups});
  s = contiguous(s);
  return unfit_run(s.data(), s.shape(0), g, std_threads(want_threads(op, threads))) < 0;
}

py::tuple unpack(const py::object& packed, int64_t out_features, int64_t in_features,
                 int64_t group_size, int64_t bits, bool affine, const string& scale_dtype,
                 int64_t threads) {
  const string op = "unpack";
  Int4Format f = want_format(op, out_features, in_features, group_size, bits, affine,
                             want_scale_dtype(op, scale_dtype));
  const Int4Geometry g = int4_geometry(f);
  const Parallel parallel = std_threads(want_threads(op, threads));
  py::array keep;
  const uint8_t* in = want_packed(op, &f, packed, false, &keep);
  py::array q(py::dtype::of<uint8_t>(), {f.n, code_row_bytes(f)});
  const py::dtype held(f.scale_type == Dtype::kI8 ? "float32" : scale_dtype);
  py::array s(held, {f.n, g.groups});
  py::object o = py::none();
  void* offset_data = nullptr;
  if (affine) {
    py::array offsets(held, {f.n, g.groups});
    offset_data = offsets.mutable_data();
    o = offsets;
  }
  auto* codes = static_cast<uint8_t*>(q.mutable_data());
  void* scale_data = s.mutable_data();
  {
    py::gil_scoped_release nogil;
    int4_unpack(f, in, codes, scale_data, offset_data, parallel);
  }
  return py::make_tuple(q, s, o);
}

py::array dequantize(const py::object& packed, int64_t out_features, int64_t in_features,
                     int64_t group_size, int64_t bits, bool affine, const string& scale_dtype,
                     const py::object& rows, int64_t threads) {
  const string op = "dequantize";
  Int4Format f = want_format(op, out_features, in_features, group_size, bits, affine,
                             want_scale_dtype(op, scale_dtype));
  const Parallel parallel = std_threads(want_threads(op, threads));
  py::array keep, index;
  const uint8_t* in = want_packed(op, &f, packed, false, &keep);
  const int64_t* which = nullptr;
  int64_t count = f.n;
  if (!rows.is_none()) {
    index = want_array(op, "rows", rows, {"int64"});
    if (index.ndim() != 1) fail_value(op, "rows must be 1-D, got " + shape_text(index));
    index = contiguous(index);
    which = static_cast<const int64_t*>(index.data());
    count = index.size();
    for (int64_t i = 0; i < count; ++i) {
      if (which[i] < 0 || which[i] >= f.n) {
        fail_value(op, "rows must be 0 to out_features - 1 = " + to_string(f.n - 1) + ", got " +
                           to_string(which[i]) + " at index " + to_string(i));
      }
    }
  }
  py::array out(py::dtype::of<float>(), {count, f.k});
  void* data = out.mutable_data();
  {
    py::gil_scoped_release nogil;
    int4_dequantize(f, in, which, count, data, Dtype::kF32, parallel);
  }
  return out;
}

py::tuple int8_scales(const py::object& scales, int64_t in_features, int64_t group_size) {
  const string op = "int8_scales";
  if (!int8_scales_fit(scales, in_features, group_size, 1)) {
    fail_value(op, "scales must be int8 multiples of one float16 in every 256 columns, got others");
  }
  const py::array s = contiguous(want_array(op, "scales", scales, {"float32"}));
  const int64_t n = s.shape(0), groups = s.shape(1);
  py::array multiples(py::dtype("int8"), {n, groups});
  py::array units(py::dtype("float16"), {n, groups * group_size / kRunK});
  int4_factor_scales(static_cast<const float*>(s.data()), n, groups, group_size,
                     static_cast<int8_t*>(multiples.mutable_data()),
                     static_cast<uint16_t*>(units.mutable_data()));
  return py::make_tuple(multiples, units);
}

// --- the table of kernels ------------------------------------------------------------------------

Int4LinearTable table_of(const string& op, const string& which) {
  if (which == "forward") return int4_linear_table();
  if (which == "dx") return int4_linear_dx_table();
  fail_value(op, "which must be \"forward\" or \"dx\", got \"" + which + "\"");
}

string above_level(const Int4LinearKernel& row) {
  return string("needs ") + isa_name(row.isa) + ", the level in force is " + isa_name(cpu_isa());
}

py::list kernels(const string& which) {
  const Int4LinearTable t = table_of("int4_linear_kernels", which);
  py::list out;
  for (int i = 0; i < t.count; ++i) {
    const Int4LinearKernel& row = t.rows[i];
    py::dict d;
    d["id"] = row.id;
    d["isa"] = isa_name(row.isa);
    d["serves"] = row.serves_text;
    d["available"] = row.isa <= cpu_isa();
    d["reason"] = row.isa <= cpu_isa() ? string() : above_level(row);
    out.append(d);
  }
  return out;
}

py::dict select(const string& which, int64_t m, int64_t out_features, int64_t in_features,
                int64_t group_size, int64_t bits, bool affine, const string& scale_dtype,
                const string& x_dtype, const string& compute) {
  const string op = "int4_linear_select";
  const Int4LinearTable t = table_of(op, which);
  if (x_dtype != "float32" && x_dtype != "float16" && x_dtype != "bfloat16") {
    fail_type(op, "x_dtype must be float32, bfloat16 or float16, got " + x_dtype);
  }
  if (m < 0) fail_value(op, "m must be 0 or more, got " + to_string(m));
  const Parallel serial = std_threads(1);
  Int4LinearParams p = {};
  p.w = want_format(op, out_features, in_features, group_size, bits, affine,
                    want_scale_dtype(op, scale_dtype));
  p.m = m;
  p.xtype = float_dtype(x_dtype);
  p.compute = want_compute(op, compute);
  p.x_stride = which == "dx" ? p.w.n : p.w.k;
  p.y_stride = which == "dx" ? p.w.k : p.w.n;
  p.parallel = &serial;
  const Int4LinearKernel* chosen = int4_linear_select(t, p);
  py::list refused;
  bool passed = false;
  for (int i = 0; i < t.count; ++i) {
    const Int4LinearKernel& row = t.rows[i];
    if (&row == chosen) {
      passed = true;
      continue;
    }
    string reason = row.isa > cpu_isa() ? above_level(row)
                    : !row.serves(p)    ? string("serves only: ") + row.serves_text
                    : passed            ? string("comes after ") + chosen->id
                                        : string("not reached");
    refused.append(py::make_tuple(row.id, reason));
  }
  py::dict d;
  d["kernel"] = chosen ? py::object(py::str(chosen->id)) : py::object(py::none());
  d["refused"] = refused;
  return d;
}

// --- running a row -------------------------------------------------------------------------------

void check_status(const string& op, Status status, const char* id, const Int4LinearTable& t) {
  if (status == kOk) return;
  const string name = id ? id : "any";
  string ids;
  for (int i = 0; i < t.count; ++i) {
    ids += string(i ? ", " : "") + t.rows[i].id;
    if (id && name == t.rows[i].id && status == kIsaUnavailable) {
      fail_unavailable(op, "kernel " + name + " cannot run: it " + above_level(t.rows[i]));
    }
    if (id && name == t.rows[i].id && status == kNotServed) {
      fail_unavailable(op, "kernel " + name + " serves only: " + t.rows[i].serves_text);
    }
  }
  if (status == kUnknownKernel) {
    fail_value(op, "kernel_id must be one of " + ids + ", got " + name);
  }
  if (status == kNoKernel)
    fail_unavailable(op, "no kernel serves this call; see int4_linear_select");
  if (status == kOutOfMemory) throw std::bad_alloc();
  throw std::runtime_error(op + ": internal error " + to_string(status) + " in kernel " + name);
}

py::array run(const string& which, const py::object& kernel_id, const py::object& x,
              const py::object& packed, const py::object& bias, int64_t out_features,
              int64_t in_features, int64_t group_size, int64_t bits, bool affine,
              const string& scale_dtype, const string& compute, const py::object& x_dtype,
              int64_t threads, const py::object& y) {
  const string op = "int4_linear_run";
  const Int4LinearTable t = table_of(op, which);
  const bool dx = which == "dx";
  Int4LinearParams p = {};
  p.w = want_format(op, out_features, in_features, group_size, bits, affine,
                    want_scale_dtype(op, scale_dtype));
  p.compute = want_compute(op, compute);
  const Parallel parallel = std_threads(want_threads(op, threads));
  p.parallel = &parallel;

  py::array xs = want_array(op, "x", x, {"float32", "float16", "uint16"});
  const string held = dtype_name(xs);
  const string meant = x_dtype.is_none() ? held : py::str(x_dtype).cast<string>();
  if ((held == "uint16") != (meant == "bfloat16") || (held != "uint16" && held != meant)) {
    fail_type(op, "x_dtype must be \"bfloat16\" for uint16 and None or x's own otherwise, got " +
                      meant + " with " + held);
  }
  p.xtype = float_dtype(meant);
  want_matrix(op, "x", dx ? "out_features" : "in_features", xs, dx ? p.w.n : p.w.k);
  p.m = xs.shape(0);
  p.x = xs.data();
  p.x_stride = row_stride(op, "x", xs);
  py::array keep, bias_array;
  p.packed = want_packed(op, &p.w, packed, true, &keep);
  if (!bias.is_none()) {
    if (dx) fail_value(op, "bias must be None for dx, got " + type_text(bias));
    bias_array = want_array(op, "bias", bias, {"float32", "float16", "uint16"});
    want_shape(op, "bias", bias_array, {p.w.n});
    if (bias_array.size() > 1 && bias_array.strides(0) != bias_array.itemsize()) {
      fail_value(op, "bias must be contiguous, got stride " + to_string(bias_array.strides(0)));
    }
    p.bias = bias_array.data();
    p.bias_type = float_dtype(dtype_name(bias_array));
  }
  const int64_t last = dx ? p.w.k : p.w.n;
  py::array out;
  if (y.is_none()) {
    out = py::array(xs.dtype(), {p.m, last});
  } else {
    out = want_array(op, "y", y, {held});
    want_matrix(op, "y", dx ? "in_features" : "out_features", out, last);
    if (out.shape(0) != p.m) {
      fail_value(op, "y must be " + shape_text({p.m, last}) + ", got " + shape_text(out));
    }
    if (!out.writeable()) fail_value(op, "y must be writeable, got a read-only array");
  }
  p.y_stride = row_stride(op, "y", out);
  p.y = out.mutable_data();
  const bool named = !kernel_id.is_none();
  const string id = named ? py::str(kernel_id).cast<string>() : string();
  Status status;
  {
    py::gil_scoped_release nogil;
    status = int4_linear_run(t, p, named ? id.c_str() : nullptr);
  }
  check_status(op, status, named ? id.c_str() : nullptr, t);
  return out;
}

}  // namespace

void bind_int4_linear(py::module_& m) {
  using py::arg;
  m.def("packed_bytes", &packed_bytes, arg("out_features"), arg("in_features"), arg("group_size"),
        arg("bits"), arg("affine"), arg("scale_dtype"), arg("palette") = false,
        "Bytes of a packed weight [N, K].");
  m.def("pack", &pack, arg("qweight"), arg("scales"), arg("offsets"), arg("in_features"),
        arg("group_size"), arg("bits"), arg("scale_dtype") = py::none(), arg("palette") = false,
        arg("threads") = 1,
        "Canonical codes uint8 [N, ceil(K/2)] (8 bits: [N, K]), scales and offsets [N, groups] of "
        "one float type -> packed uint8, its data at a multiple of 64 bytes. scale_dtype: that "
        "type, or \"int8\" for float32 ones that int8_scales_fit holds exact. palette: 8-bit codes "
        "that palette_fits take 4 bits.");
  m.def("int8_scales", &int8_scales, arg("scales"), arg("in_features"), arg("group_size"),
        "Such scales as int8 [N, groups] and float16 units [N, in_features / 256].");
  m.def("palette_fits", &palette_fits, arg("qweight"),
        "Whether uint8 codes have at most 16 different values.");
  m.def(
      "int8_scales_fit", &int8_scales_fit, arg("scales"), arg("in_features"), arg("group_size"),
      arg("threads") = 1,
      "Whether float32 scales (or offsets) [N, groups] are int8 multiples of one float16 in every "
      "256 columns, in a format that has int8 scales.");
  m.def("unpack", &unpack, arg("packed"), arg("out_features"), arg("in_features"),
        arg("group_size"), arg("bits"), arg("affine"), arg("scale_dtype"), arg("threads") = 1,
        "The inverse of pack: (qweight, scales, offsets or None).");
  m.def("dequantize", &dequantize, arg("packed"), arg("out_features"), arg("in_features"),
        arg("group_size"), arg("bits"), arg("affine"), arg("scale_dtype"), arg("rows") = py::none(),
        arg("threads") = 1, "float32 [N, K], or the listed rows (int64) of it.");
  m.def("int4_linear_kernels", &kernels, arg("which") = "forward",
        "The rows of the table of kernels (\"forward\" or \"dx\"), in the order they are tried.");
  m.def("int4_linear_select", &select, arg("which"), arg("m"), arg("out_features"),
        arg("in_features"), arg("group_size"), arg("bits"), arg("affine"), arg("scale_dtype"),
        arg("x_dtype"), arg("compute"),
        "Which row serves such a call, and why each other row does not.");
  m.def("int4_linear_run", &run, arg("which"), arg("kernel_id"), arg("x"), arg("packed"),
        arg("bias"), arg("out_features"), arg("in_features"), arg("group_size"), arg("bits"),
        arg("affine"), arg("scale_dtype"), arg("compute"), arg("x_dtype") = py::none(),
        arg("threads") = 1, arg("y") = py::none(),
        "Runs one row (or, with None, the one that select names): y [M, N], or dx [M, K] of x = dy "
        "[M, N]. "
        "bfloat16 is passed as uint16 bits with x_dtype=\"bfloat16\". y may be given, with any row "
        "stride.");
}

}  // namespace native
}  // namespace nibblock
