// torch glue of block_scores_ and block_gain_ for the CPU: checks, tensors -> params, launch.
// Stable ABI only; shapes and meaning of every argument are documented in python/nibblock/ops/.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "../glue/check.h"
#include "block_gain.h"
#include "block_scores.h"

namespace nibblock {
namespace {

using namespace glue;
using OptTensor = std::optional<Tensor>;

Dtype check_rows(const char* op, const char* name, const Tensor& t) {
  const Dtype type = check_float(op, name, t.scalar_type());
  STD_TORCH_CHECK(t.dim() >= 1, op, ": ", name, " must have at least 1 dimension, got a scalar");
  check_cpu(op, name, t);
  return type;
}

// A statistic [rows, cols] that is added to, wherever its elements lie.
float* check_sums(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t cols,
                  int64_t* stride) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32, got ",
                  dtype_name(t.scalar_type()));
  check_cpu(op, name, t);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, op, ": ", name,
                  " must be [", rows, ", ", cols, "], got ", shape_text(t));
  stride[0] = t.stride(0);
  stride[1] = t.stride(1);
  return static_cast<float*>(t.mutable_data_ptr());
}

// What every call has: two matrices with as many rows, and a block edge.
template <class Params>
void check_pair(const char* op, const Tensor& grad, const Tensor& x, int64_t block, Params* p) {
  p->gtype = check_rows(op, "grad", grad);
  p->xtype = check_rows(op, "x", x);
  bool same = grad.dim() == x.dim();
  for (int64_t i = 0; same && i + 1 < x.dim(); ++i) same = grad.size(i) == x.size(i);
  STD_TORCH_CHECK(same, op, ": grad must have the leading dimensions of x, ", shape_text(x),
                  ", got ", shape_text(grad));
  STD_TORCH_CHECK(block == 16 || block == 32 || block == 64 || block == 128, op,
                  ": block must be 16, 32, 64 or 128, got ", block);
  p->n = grad.size(grad.dim() - 1);
  p->k = x.size(x.dim() - 1);
  p->block = block;
}

template <class Params>
void set_rows(const Tensor& grad, const Tensor& x, Tensor* keep_g, Tensor* keep_x, Params* p) {
  const Rows g = as_rows(grad, keep_g), in = as_rows(x, keep_x);
  p->m = in.count;
  p->g = g.data;
  p->g_stride = g.stride;
  p->x = in.data;
  p->x_stride = in.stride;
}

template <class Params>
void check_done(const char* op, Status s, const Params& p) {
  if (s == kOk) return;
  if (s == kNoKernel && cpu_isa_error()) STD_TORCH_CHECK(false, cpu_isa_error());
  STD_TORCH_CHECK(s != kOutOfMemory, op, ": out of memory for the workspace of [", p.m, ", ", p.k,
                  "]");
  STD_TORCH_CHECK(false, op, ": internal error ", static_cast<int>(s), " (m=", p.m, ", n=", p.n,
                  ", k=", p.k, ", block=", p.block,
                  "); please report with python -m nibblock info --json");
}

void block_scores_op(const Tensor& scores, const OptTensor& movement, const Tensor& grad,
                     const Tensor& x, const OptTensor& weight, int64_t block, int64_t sketch,
                     int64_t seed) {
  constexpr const char* kOp = "block_scores_";
  BlockScoresParams p = {};
  check_pair(kOp, grad, x, block, &p);
  STD_TORCH_CHECK(sketch >= 0 && sketch <= kMostSamples, kOp, ": sketch must be in 0 .. ",
                  kMostSamples, ", got ", sketch);
  p.sketch = sketch;
  p.seed = static_cast<uint64_t>(seed);
  const int64_t rows = (p.n + block - 1) / block, cols = (p.k + block - 1) / block;
  p.scores = check_sums(kOp, "scores", scores, rows, cols, p.scores_stride);
  STD_TORCH_CHECK(movement.has_value() == weight.has_value(), kOp,
                  ": weight must be given exactly when movement is, got only one of them");
  Tensor keep_w = x;
  if (movement) {
    STD_TORCH_CHECK(sketch == 0, kOp,
                    ": movement must be None with a sketch, got a Tensor; "
                    "sketch=0 computes it exactly");
    p.movement = check_sums(kOp, "movement", *movement, rows, cols, p.movement_stride);
    p.wtype = check_rows(kOp, "weight", *weight);
    STD_TORCH_CHECK(weight->dim() == 2 && weight->size(0) == p.n && weight->size(1) == p.k, kOp,
                    ": weight must be [", p.n, ", ", p.k, "], got ", shape_text(*weight));
    const Rows w = as_rows(*weight, &keep_w);
    p.w = w.data;
    p.w_stride = w.stride;
  }
  Tensor keep_g = x, keep_x = x;
  set_rows(grad, x, &keep_g, &keep_x, &p);
  const Parallel parallel = torch_parallel();
  p.parallel = &parallel;
  check_done(kOp, block_scores_run(p, nullptr), p);
}

void block_gain_op(const Tensor& gain, const Tensor& squares, const Tensor& grad, const Tensor& x,
                   int64_t block) {
  constexpr const char* kOp = "block_gain_";
  BlockGainParams p = {};
  check_pair(kOp, grad, x, block, &p);
  const int64_t rows = (p.n + block - 1) / block, cols = (p.k + block - 1) / block;
  p.gain = check_sums(kOp, "gain", gain, rows, cols, p.gain_stride);
  p.squares = check_sums(kOp, "squares", squares, rows, cols, p.squares_stride);
  Tensor keep_g = x, keep_x = x;
  set_rows(grad, x, &keep_g, &keep_x, &p);
  const Parallel parallel = torch_parallel();
  p.parallel = &parallel;
  check_done(kOp, block_gain_run(p, nullptr), p);
}

}  // namespace
}  // namespace nibblock

STABLE_TORCH_LIBRARY_IMPL(nibblock, CPU, m) {
  m.impl("block_scores_", TORCH_BOX(&nibblock::block_scores_op));
  m.impl("block_gain_", TORCH_BOX(&nibblock::block_gain_op));
}
