// torch glue of muon_direction for the CPU: checks of whole lists before anything moves, tensors ->
// params, launch. Stable ABI only; arguments: python/nibblock/ops/muon_direction.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "../glue/check.h"
#include "../glue/list.h"
#include "../glue/masked.h"
#include "muon_direction.h"

namespace nibblock {
namespace {

using namespace glue;

void muon_direction_(const Tensors& out, const Tensors& grads, const Tensors& momenta,
                     double momentum, bool nesterov, int64_t steps, bool maximize,
                     const OptTensor& multiplier, const OptTensor& found_inf) {
  const char* op = "muon_direction";
  const size_t n = grads.size();
  check_hyper(op, "momentum", momentum, 1.0);
  STD_TORCH_CHECK(steps >= 1 && steps <= 20, op, ": steps must be from 1 to 20, got ", steps);
  STD_TORCH_CHECK(out.size() == n, op, ": out must hold ", n, " tensors as grads, got ",
                  out.size());
  const bool whole = momenta.size() == 1 && n > 1;
  STD_TORCH_CHECK(momenta.empty() || momenta.size() == n || whole, op, ": momenta must hold ", n,
                  " tensors as grads, or none, got ", momenta.size());
  std::vector<Tensor> keep;
  std::vector<MuonTensor> tensors;
  MuonParams p = {};
  for (size_t i = 0; i < n; ++i) {
    MuonTensor t = {};
    const Facts grad_facts(grads[i], Access::kRead), out_facts(out[i], Access::kWrite);
    const Item grad = {op, "grads", i, grad_facts}, to = {op, "out", i, out_facts};
    t.type = grad.want_weight_type();
    grad.want_cpu();
    const int64_t edge = grad_facts.dim() == 3 ? grad_facts.size(1) : 0;
    const bool known = edge == 16 || edge == 32 || edge == 64 || edge == 128;
    STD_TORCH_CHECK(known && grad_facts.size(2) == edge, op, ": grads[", i,
                    "] must be [Z, B, B] with B 16, 32, 64 or 128, got ", shape_text(grads[i]));
    if (i == 0) p.block = edge;
    STD_TORCH_CHECK(edge == p.block, op, ": grads[", i, "] must be [Z, ", p.block, ", ", p.block,
                    "] as grads[0], got ", shape_text(grads[i]));
    t.grad = grad_facts.data;
    if (!grad_facts.is_contiguous()) {
      keep.push_back(torch::stable::contiguous(grads[i]));
      t.grad = keep.back().const_data_ptr();
    }
    to.want_same_type(grad_facts, "grads");
    to.want_cpu_contiguous();
    to.want_shape_of(grad_facts, "grads");
    t.out = out_facts.data;
    t.count = grad_facts.size(0);
    t.first_task = p.task_count;
    p.task_count += t.count;
    tensors.push_back(t);
  }
  const int64_t area = p.block * p.block;
  for (size_t i = 0; i < momenta.size(); ++i) {
    const Facts facts(momenta[i], Access::kWrite);
    const Item state = {op, "momenta", i, facts};
    state.want_type(ScalarType::Float, "float32");
    state.want_cpu_contiguous();
    const int64_t count = whole ? p.task_count : tensors[i].count;
    STD_TORCH_CHECK(facts.dim() == 3 && facts.size(0) == count && facts.size(1) == p.block &&
                        facts.size(2) == p.block,
                    op, ": momenta[", i, "] must be [", count, ", ", p.block, ", ", p.block,
                    "], got ", shape_text(facts));
    float* data = static_cast<float*>(facts.data);
    if (!whole) {
      tensors[i].momentum = data;
      continue;
    }
    for (MuonTensor& t : tensors) t.momentum = data + t.first_task * area;
  }
  p.multiplier = scalar_of(op, "multiplier", multiplier, 1.0f);
  if (maximize) p.multiplier = -p.multiplier;
  const bool skip = !(scalar_of(op, "found_inf", found_inf, 0.0f) == 0.0f);
  if (skip) {
    for (const MuonTensor& t : tensors) {
      memset(t.out, 0, static_cast<size_t>(t.count * area * dtype_size(t.type)));
    }
    return;
  }
  p.tensors = tensors.data();
  p.tensor_count = static_cast<int64_t>(n);
  p.steps = steps;
  p.momentum = static_cast<float>(momentum);
  p.nesterov = nesterov;
  const Parallel parallel = torch_parallel();
  p.parallel = &parallel;
  want_ok(op, muon_direction_run(p));
}

}  // namespace
}  // namespace nibblock

STABLE_TORCH_LIBRARY_IMPL(nibblock, CPU, m) {
  m.impl("muon_direction_", TORCH_BOX(&nibblock::muon_direction_));
}
