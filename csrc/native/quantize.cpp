// NumPy's side of the quantiser: checks, threads, progress. The arithmetic is in quantize_body.h.
#include "quantize.h"

#include <math.h>
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "native.h"

namespace nibblock {
namespace native {
namespace {

using std::string;
using std::to_string;

// Weights handled between two calls of progress.
constexpr int64_t kChunk = int64_t{1} << 21;

// The importance, checked, each group scaled by a power of two to a largest value in [1, 2).
std::vector<float> want_importance(const string& op, const py::object& value, int64_t k,
                                   int64_t group) {
  if (value.is_none()) return {};
  py::array a = want_array(op, "importance", value, {"float32"});
  want_shape(op, "importance", a, {k});
  a = contiguous(a);
  const float* data = static_cast<const float*>(a.data());
  std::vector<float> out(data, data + k);
  for (int64_t i = 0; i < k; ++i) {
    if (!(out[i] >= 0.0f) || std::isinf(out[i])) {
      fail_value(op, "importance must be finite and not negative, got " + to_string(out[i]) +
                         " at index " + to_string(i));
    }
  }
  for (int64_t at = 0; at < k; at += group) {
    const auto first = out.begin() + at, last = out.begin() + std::min(k, at + group);
    const float top = *std::max_element(first, last);
    if (top == 0) continue;
    int exponent;
    frexpf(top, &exponent);
    for (auto it = first; it != last; ++it) *it = ldexpf(*it, 1 - exponent);
  }
  return out;
}

struct Run {
  const QuantizeParams& p;
  std::atomic<int64_t> bad_row{-1};
  std::atomic<bool> out_of_memory{false};

  void rows(int64_t begin, int64_t end, const Parallel& parallel) {
    auto* kernel = cpu_isa() >= Isa::kAvx2 ? quantize_rows_avx2 : quantize_rows_baseline;
    auto body = [&](int64_t from, int64_t to) {
      std::unique_ptr<float, void (*)(void*)> scratch(
          static_cast<float*>(malloc(static_cast<size_t>(quantize_scratch(p)) * sizeof(float))),
          free);
      if (!scratch) {
        out_of_memory = true;
        return;
      }
      const int64_t bad = kernel(p, begin + from, begin + to, scratch.get());
      if (bad < 0) return;
      int64_t seen = bad_row;  // the lowest row is reported, whatever the threads
      while ((seen < 0 || bad < seen) && !bad_row.compare_exchange_weak(seen, bad)) {
      }
    };
    parallel_for(parallel, end - begin, body);
  }
};

py::tuple quantize(const py::object& weight, int64_t group_size, int64_t bits, bool symmetric,
                   const string& method, const py::object& importance, int64_t threads,
                   const py::object& progress) {
  const string op = "quantize";
  py::array w = want_array(op, "weight", weight, {"float32"});
  if (w.ndim() != 2) fail_value(op, "weight must be [N, K], got " + shape_text(w));
  if (method != "rtn" && method != "mse") {
    fail_value(op, "method must be \"rtn\" or \"mse\", got \"" + method + "\"");
  }
  if (!progress.is_none() && !PyCallable_Check(progress.ptr())) {
    fail_type(op, "progress must be None or a callable(done, total), got " + type_text(progress));
  }
  const Int4Format f =
      want_format(op, w.shape(0), w.shape(1), group_size, bits, !symmetric,
                  int4_has_int8_scales(group_size, w.shape(1)) ? Dtype::kI8 : Dtype::kF32);
  const Int4Geometry g = int4_geometry(f);
  const Parallel parallel = std_threads(want_threads(op, threads));
  w = contiguous(w);

  QuantizeParams p = {};
  p.n = f.n;
  p.k = f.k;
  p.group = group_size < 0 ? std::max<int64_t>(f.k, 1) : group_size;
  p.groups = g.groups;
  p.bits = f.bits;
  p.affine = f.affine;
  p.search = method == "mse";
  const std::vector<float> q = want_importance(op, importance, p.k, p.group);
  p.importance = q.empty() ? nullptr : q.data();
  p.weight = static_cast<const float*>(w.data());
  py::array codes(py::dtype::of<uint8_t>(), {f.n, code_row_bytes(f)});
  py::array scales(py::dtype::of<float>(), {f.n, g.groups});
  py::object offsets = py::none();
  p.qweight = static_cast<uint8_t*>(codes.mutable_data());
  p.scales = static_cast<float*>(scales.mutable_data());
  std::fill(p.scales, p.scales + f.n * g.groups, 0.0f);
  if (p.affine) {
    py::array o(py::dtype::of<float>(), {f.n, g.groups});
    p.offsets = static_cast<float*>(o.mutable_data());
    std::fill(p.offsets, p.offsets + f.n * g.groups, 0.0f);
    offsets = o;
  }

  Run run{p};
  const int64_t step = std::max<int64_t>(kChunk / std::max<int64_t>(f.k, 1), 4 * threads);
  for (int64_t begin = 0; begin < f.n && run.bad_row < 0; begin += step) {
    const int64_t end = std::min(f.n, begin + step);
    {
      py::gil_scoped_release nogil;
      run.rows(begin, end, parallel);
    }
    if (PyErr_CheckSignals()) throw py::error_already_set();
    if (run.out_of_memory) throw std::bad_alloc();
    if (!progress.is_none() && run.bad_row < 0) progress(end, f.n);
  }
  if (run.bad_row >= 0) {
    const float* row = p.weight + run.bad_row * p.k;
    const float* bad = std::find_if(row, row + p.k, [](float v) { return !std::isfinite(v); });
    fail_value(op, "weight must be finite, got " + to_string(*bad) + " in row " +
                       to_string(run.bad_row) + ", column " + to_string(bad - row));
  }
  return py::make_tuple(codes, scales, offsets);
}

}  // namespace

void bind_quantize(py::module_& m) {
  using py::arg;
  m.def("quantize", &quantize, arg("weight"), arg("group_size"), arg("bits"), arg("symmetric"),
        arg("method") = "rtn", arg("importance") = py::none(), arg("threads") = 1,
        arg("progress") = py::none(),
        "float32 [N, K] -> (qweight uint8, scales float32 [N, groups], offsets or None): w ~ scale "
        "* code\n"
        "+ offset, or scale * (code - 8 or 128) when symmetric. method \"rtn\" rounds to nearest "
        "in the\n"
        "group's range, \"mse\" searches the least squared error, weighted by importance float32 "
        "[K].\n"
        "progress(done, total) counts rows, from the calling thread. ValueError names a row that "
        "is not\n"
        "finite. Bitwise the same at any number of threads.");
}

}  // namespace native
}  // namespace nibblock
