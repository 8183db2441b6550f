// NumPy in, NumPy out: the kernels of block_scores and block_gain by name, without torch between
// them and a test.
#include "native.h"

#include <memory>

#include "../block_scores/block_gain.h"
#include "../block_scores/block_scores.h"

namespace nibblock {
namespace native {
namespace {

using std::string;
using std::to_string;

string above_level(Isa isa) {
  return string("needs ") + isa_name(isa) + ", the level in force is " + isa_name(cpu_isa());
}

template <class Table>
py::list kernels(const Table& t) {
  py::list out;
  for (int i = 0; i < t.count; ++i) {
    py::dict d;
    d["id"] = t.rows[i].id;
    d["isa"] = isa_name(t.rows[i].isa);
    d["serves"] = t.rows[i].serves_text;
    d["available"] = t.rows[i].isa <= cpu_isa();
    d["reason"] = t.rows[i].isa <= cpu_isa() ? string() : above_level(t.rows[i].isa);
    out.append(d);
  }
  return out;
}

template <class Table>
void check_status(const string& op, const Table& t, Status status, const char* id) {
  if (status == kOk) return;
  string ids;
  for (int i = 0; i < t.count; ++i) {
    ids += string(i ? ", " : "") + t.rows[i].id;
    if (id && string(id) == t.rows[i].id && status == kIsaUnavailable) {
      fail_unavailable(op,
                       string("kernel ") + id + " cannot run: it " + above_level(t.rows[i].isa));
    }
  }
  if (status == kUnknownKernel) fail_value(op, "kernel_id must be one of " + ids + ", got " + id);
  if (status == kOutOfMemory) throw std::bad_alloc();
  throw std::runtime_error(op + ": internal error " + to_string(status));
}

// A [M, last] array of one of the float types, or of any number of columns where last is negative.
Dtype want_rows(const string& op, const string& name, const py::object& value, py::array* keep,
                int64_t* stride) {
  *keep = want_array(op, name, value, {"float32", "float16", "uint16"});
  if (keep->ndim() != 2) fail_value(op, name + " must be 2-D, got " + shape_text(*keep));
  *stride = row_stride(op, name, *keep);
  return float_dtype(dtype_name(*keep));
}

float* want_sums(const string& op, const string& name, const py::object& value, int64_t rows,
                 int64_t cols, py::array* keep, int64_t* stride) {
  *keep = want_array(op, name, value, {"float32"});
  want_shape(op, name, *keep, {rows, cols});
  if (!keep->writeable()) fail_value(op, name + " must be writeable, got a read-only array");
  stride[0] = keep->strides(0) / 4;
  stride[1] = keep->strides(1) / 4;
  return static_cast<float*>(keep->mutable_data());
}

// What every call has: two matrices with as many rows, and a block edge.
template <class Params>
void want_pair(const string& op, const py::object& grad, const py::object& x, int64_t block,
               py::array* g, py::array* in, Params* p) {
  if (block != 16 && block != 32 && block != 64 && block != 128) {
    fail_value(op, "block must be 16, 32, 64 or 128, got " + to_string(block));
  }
  p->gtype = want_rows(op, "grad", grad, g, &p->g_stride);
  p->xtype = want_rows(op, "x", x, in, &p->x_stride);
  if (g->shape(0) != in->shape(0)) fail_value(op, "grad must have x's rows, got " + shape_text(*g));
  p->m = g->shape(0);
  p->n = g->shape(1);
  p->k = in->shape(1);
  p->g = g->data();
  p->x = in->data();
  p->block = block;
}

template <class Params, class Table>
void run_row(const string& op, const py::object& kernel_id, int64_t threads, const Table& table,
             Status (*run)(const Params& p, const char* id), Params* p) {
  const Parallel parallel = std_threads(want_threads(op, threads));
  p->parallel = &parallel;
  const string id = kernel_id.is_none() ? string() : py::str(kernel_id).cast<string>();
  const char* forced = kernel_id.is_none() ? nullptr : id.c_str();
  Status status;
  {
    py::gil_scoped_release nogil;
    status = run(*p, forced);
  }
  check_status(op, table, status, forced);
}

void run_scores(const py::object& kernel_id, const py::object& scores, const py::object& movement,
                const py::object& grad, const py::object& x, const py::object& weight,
                int64_t block, int64_t sketch, int64_t seed, int64_t threads) {
  const string op = "block_scores_run";
  py::array g, in, w, sums, moves;
  BlockScoresParams p = {};
  if (sketch < 0 || sketch > kMostSamples) {
    fail_value(op, "sketch must be in 0 .. 32, got " + to_string(sketch));
  }
  want_pair(op, grad, x, block, &g, &in, &p);
  p.sketch = sketch;
  p.seed = static_cast<uint64_t>(seed);
  const int64_t rows = ceil_div(p.n, block), cols = ceil_div(p.k, block);
  p.scores = want_sums(op, "scores", scores, rows, cols, &sums, p.scores_stride);
  if (movement.is_none() != weight.is_none() || (sketch && !movement.is_none())) {
    fail_value(op, "weight must be given exactly when movement is, and without a sketch");
  }
  if (!movement.is_none()) {
    p.movement = want_sums(op, "movement", movement, rows, cols, &moves, p.movement_stride);
    p.wtype = want_rows(op, "weight", weight, &w, &p.w_stride);
    want_shape(op, "weight", w, {p.n, p.k});
    p.w = w.data();
  }
  run_row(op, kernel_id, threads, block_scores_table(), &block_scores_run, &p);
}

void run_gain(const py::object& kernel_id, const py::object& gain, const py::object& squares,
              const py::object& grad, const py::object& x, int64_t block, int64_t threads) {
  const string op = "block_gain_run";
  py::array g, in, sums, more;
  BlockGainParams p = {};
  want_pair(op, grad, x, block, &g, &in, &p);
  const int64_t rows = ceil_div(p.n, block), cols = ceil_div(p.k, block);
  p.gain = want_sums(op, "gain", gain, rows, cols, &sums, p.gain_stride);
  p.squares = want_sums(op, "squares", squares, rows, cols, &more, p.squares_stride);
  run_row(op, kernel_id, threads, block_gain_table(), &block_gain_run, &p);
}

}  // namespace

void bind_block_scores(py::module_& m) {
  using py::arg;
  const py::none none;
  const char* order = "The rows of the table in the order they are tried.";
  m.def("block_scores_kernels", [] { return kernels(block_scores_table()); }, order);
  m.def("block_scores_run", &run_scores, arg("kernel_id"), arg("scores"), arg("movement"),
        arg("grad"), arg("x"), arg("weight") = none, arg("block") = 32, arg("sketch") = 0,
        arg("seed") = 0, arg("threads") = 1,
        "Runs one row (None: the first that serves); adds to scores and movement in place. "
        "bfloat16 is uint16 bits.");
  m.def("block_gain_kernels", [] { return kernels(block_gain_table()); }, order);
  m.def("block_gain_run", &run_gain, arg("kernel_id"), arg("gain"), arg("squares"), arg("grad"),
        arg("x"), arg("block") = 32, arg("threads") = 1,
        "Runs one row (None: the first that serves); adds to gain and squares in place. bfloat16 "
        "is uint16 bits.");
}

}  // namespace native
}  // namespace nibblock
