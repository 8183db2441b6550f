// torch glue of the masked optimiser steps for the CPU: checks of whole lists before anything
// moves, tensors -> params, launch. Stable ABI only; shapes and meaning of every argument are
// documented in python/nibblock/ops/masked_update.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <vector>

#include "../glue/check.h"
#include "../glue/list.h"
#include "../glue/masked.h"
#include "masked_update.h"

namespace nibblock {
namespace {

using namespace glue;

// Dense weights larger than this together are written past the caches, which they would only empty.
constexpr int64_t kStreamBytes = 32 << 20;

UpdateTensor entry(const char* op, const Lists& l, size_t i, const char* param_name) {
  UpdateTensor t = {};
  const Item param = {op, param_name, i, l.params[i]};
  t.type = param.want_weight_type();
  param.want_cpu_contiguous();
  t.param = l.params[i].mutable_data_ptr();
  return t;
}

// States of the active entries, and counters of updates.
void want_states(const char* op, const Lists& l, size_t i, const char* age_name, int64_t entries,
                 int64_t ages, UpdateTensor* t) {
  if (!l.firsts.empty()) {
    const Item first = {op, l.adamw ? "exp_avgs" : "momenta", i, l.firsts[i]};
    first.want_type(ScalarType::Float, "float32");
    first.want_cpu_contiguous();
    first.want_numel(entries);
    t->first = static_cast<float*>(l.firsts[i].mutable_data_ptr());
  }
  if (l.adamw) {
    const Item second = {op, "exp_avg_sqs", i, l.seconds[i]};
    second.want_type(ScalarType::Float, "float32");
    second.want_cpu_contiguous();
    second.want_numel(entries);
    t->second = static_cast<float*>(l.seconds[i].mutable_data_ptr());
  }
  const Item age = {op, age_name, i, l.ages[i]};
  age.want_type(ScalarType::Int, "int32");
  age.want_cpu_contiguous();
  age.want_numel(ages);
  t->age = static_cast<int32_t*>(l.ages[i].mutable_data_ptr());
  __builtin_prefetch(t->age);  // read once the whole list is known
}

// A gradient of the parameter's dtype; one that is not contiguous is copied into `keep`.
const void* want_grad(const Item& grad, const Tensor& param, const char* param_name,
                      std::vector<Tensor>* keep) {
  grad.want_same_type(param, param_name);
  grad.want_cpu();
  if (grad.tensor.is_contiguous()) return grad.tensor.const_data_ptr();
  keep->push_back(torch::stable::contiguous(grad.tensor));
  return keep->back().const_data_ptr();
}

void run(const char* op, UpdateParams p, std::vector<UpdateTensor>& tensors,
         const OptTensor& multiplier, const OptTensor& found_inf, bool maximize) {
  p.multiplier = scalar_of(op, "multiplier", multiplier, 1.0f);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t ages = p.kind == MaskKind::kBlock ? tensors[i].count : 1;
    for (int64_t z = 0; z < ages; ++z) {
      STD_TORCH_CHECK(tensors[i].age[z] >= 0, op, ": ",
                      p.kind == MaskKind::kBlock ? "ages[" : "steps[", i,
                      "] must be at least 0, got ", tensors[i].age[z]);
    }
  }
  const float found = scalar_of(op, "found_inf", found_inf, 0.0f);
  if (maximize) p.multiplier = -p.multiplier;
  for (UpdateTensor& t : tensors) {
    t.first_task = p.task_count;
    p.task_count += update_tasks(p.kind, p.block, t.count);
  }
  p.tensors = tensors.data();
  p.tensor_count = static_cast<int64_t>(tensors.size());
  const Parallel parallel = torch_parallel();
  p.parallel = &parallel;
  if (p.kind == MaskKind::kFlat) {
    const int64_t bad = masked_bad_index(p);
    STD_TORCH_CHECK(bad < 0, op, ": indices[", bad, "] must be sorted, distinct and in [0, ",
                    tensors[bad].numel, "), got others");
  }
  if (!(found == 0.0f)) return;
  want_ok(op, masked_update_run(p));
}

// --- block ---------------------------------------------------------------------------------------

void block_step(const char* op, UpdateParams p, const Lists& l, const Tensors& weights,
                const Tensors& blocks, int64_t block, bool maximize, const OptTensor& multiplier,
                const OptTensor& found_inf) {
  check_lists(op, l, "values", "ages", p.momentum);
  const size_t n = l.params.size();
  STD_TORCH_CHECK(weights.empty() || weights.size() == n, op, ": weights must hold ", n,
                  " tensors as values, or none, got ", weights.size());
  STD_TORCH_CHECK(blocks.size() == n, op, ": blocks must hold ", n, " tensors as values, got ",
                  blocks.size());
  want_block(op, block);
  p.kind = MaskKind::kBlock;
  p.block = block;
  std::vector<UpdateTensor> tensors;
  tensors.reserve(n);
  std::vector<Tensor> keep;
  int64_t dense_bytes = 0;
  for (size_t i = 0; i < n; ++i) {
    UpdateTensor t = entry(op, l, i, "values");
    const Tensor& values = l.params[i];
    STD_TORCH_CHECK(values.dim() == 3 && values.size(1) == block && values.size(2) == block, op,
                    ": values[", i, "] must be [Z, ", block, ", ", block, "], got ",
                    shape_text(values));
    t.count = values.size(0);
    const Item grad = {op, "grads", i, l.grads[i]};
    grad.want_shape_of(values, "values");
    t.grad = want_grad(grad, values, "values", &keep);
    want_states(op, l, i, "ages", t.count * block * block, t.count, &t);
    const Item list = {op, "blocks", i, blocks[i]};
    t.blocks = list.want_blocks(t.count, &keep);
    if (!weights.empty()) {
      const Item weight = {op, "weights", i, weights[i]};
      t.weight_type = weight.want_weight_type();
      weight.want_cpu();
      weight.want_rows();
      t.n = weight.tensor.size(0);
      t.k = weight.tensor.size(1);
      t.weight_stride = weight.tensor.stride(0);
      t.weight = weight.tensor.mutable_data_ptr();
      dense_bytes += t.n * t.k * dtype_size(t.weight_type);
      __builtin_prefetch(t.blocks);
      __builtin_prefetch(t.param);
      __builtin_prefetch(t.grad);
    }
    tensors.push_back(t);
  }
  for (size_t i = 0; i < n; ++i) {
    const UpdateTensor& t = tensors[i];
    const Item list = {op, "blocks", i, blocks[i]};
    if (!weights.empty()) list.want_blocks_inside(t.blocks, t.count, t.n, t.k, block);
  }
  p.stream = dense_bytes > kStreamBytes;
  run(op, p, tensors, multiplier, found_inf, maximize);
}

void masked_adamw_block(const Tensors& values, const Tensors& grads, const Tensors& exp_avgs,
                        const Tensors& exp_avg_sqs, const Tensors& ages, const Tensors& weights,
                        const Tensors& blocks, int64_t block, double lr, double beta1, double beta2,
                        double eps, double weight_decay, bool maximize, const OptTensor& multiplier,
                        const OptTensor& found_inf) {
  const char* op = "masked_adamw_block_";
  block_step(op, adamw(op, lr, beta1, beta2, eps, weight_decay),
             {values, grads, exp_avgs, exp_avg_sqs, ages, true}, weights, blocks, block, maximize,
             multiplier, found_inf);
}

void masked_sgd_block(const Tensors& values, const Tensors& grads, const Tensors& momenta,
                      const Tensors& ages, const Tensors& weights, const Tensors& blocks,
                      int64_t block, double lr, double momentum, double dampening,
                      double weight_decay, bool nesterov, bool maximize,
                      const OptTensor& multiplier, const OptTensor& found_inf) {
  const char* op = "masked_sgd_block_";
  block_step(op, sgd(op, lr, momentum, dampening, weight_decay, nesterov),
             {values, grads, momenta, momenta, ages, false}, weights, blocks, block, maximize,
             multiplier, found_inf);
}

// --- flat ----------------------------------------------------------------------------------------

void flat_step(const char* op, UpdateParams p, const Lists& l, const Tensors& indices,
               bool maximize, const OptTensor& multiplier, const OptTensor& found_inf) {
  check_lists(op, l, "params", "steps", p.momentum);
  const size_t n = l.params.size();
  STD_TORCH_CHECK(indices.size() == n, op, ": indices must hold ", n, " tensors as params, got ",
                  indices.size());
  p.kind = MaskKind::kFlat;
  std::vector<UpdateTensor> tensors;
  tensors.reserve(n);
  std::vector<Tensor> keep;
  for (size_t i = 0; i < n; ++i) {
    UpdateTensor t = entry(op, l, i, "params");
    const Tensor &param = l.params[i], &index = indices[i];
    const ScalarType type = index.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, op, ": indices[", i,
                    "] must be int32 or int64, got ", dtype_name(type));
    const Item list = {op, "indices", i, index};
    list.want_cpu_contiguous();
    STD_TORCH_CHECK(index.dim() == 1, op, ": indices[", i, "] must be [nnz], got ",
                    shape_text(index));
    t.count = index.numel();
    t.index = index.const_data_ptr();
    t.index64 = type == ScalarType::Long;
    t.numel = param.numel();
    const Item grad = {op, "grads", i, l.grads[i]};
    t.grad_packed = grad.tensor.dim() == 1 && grad.tensor.numel() == t.count;
    if (!t.grad_packed) {
      STD_TORCH_CHECK(same_shape(grad.tensor, param), op, ": grads[", i, "] must be [", t.count,
                      "] or ", shape_text(param), " as params[", i, "], got ",
                      shape_text(grad.tensor));
    }
    t.grad = want_grad(grad, param, "params", &keep);
    want_states(op, l, i, "steps", t.count, 1, &t);
    tensors.push_back(t);
  }
  run(op, p, tensors, multiplier, found_inf, maximize);
}

void masked_adamw_flat(const Tensors& params, const Tensors& grads, const Tensors& indices,
                       const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& steps,
                       double lr, double beta1, double beta2, double eps, double weight_decay,
                       bool maximize, const OptTensor& multiplier, const OptTensor& found_inf) {
  const char* op = "masked_adamw_flat_";
  flat_step(op, adamw(op, lr, beta1, beta2, eps, weight_decay),
            {params, grads, exp_avgs, exp_avg_sqs, steps, true}, indices, maximize, multiplier,
            found_inf);
}

void masked_sgd_flat(const Tensors& params, const Tensors& grads, const Tensors& indices,
                     const Tensors& momenta, const Tensors& steps, double lr, double momentum,
                     double dampening, double weight_decay, bool nesterov, bool maximize,
                     const OptTensor& multiplier, const OptTensor& found_inf) {
  const char* op = "masked_sgd_flat_";
  flat_step(op, sgd(op, lr, momentum, dampening, weight_decay, nesterov),
            {params, grads, momenta, momenta, steps, false}, indices, maximize, multiplier,
            found_inf);
}

// --- bool ----------------------------------------------------------------------------------------

void bool_step(const char* op, UpdateParams p, const Lists& l, const Tensors& masks,
               const Tensors& offsets, bool maximize, const OptTensor& multiplier,
               const OptTensor& found_inf) {
  check_lists(op, l, "params", "steps", p.momentum);
  const size_t n = l.params.size();
  STD_TORCH_CHECK(masks.size() == n, op, ": masks must hold ", n, " tensors as params, got ",
                  masks.size());
  STD_TORCH_CHECK(offsets.size() == n, op, ": offsets must hold ", n, " tensors as params, got ",
                  offsets.size());
  p.kind = MaskKind::kBool;
  std::vector<UpdateTensor> tensors;
  tensors.reserve(n);
  std::vector<Tensor> keep;
  for (size_t i = 0; i < n; ++i) {
    UpdateTensor t = entry(op, l, i, "params");
    const Tensor& param = l.params[i];
    t.count = param.numel();
    const Item grad = {op, "grads", i, l.grads[i]};
    grad.want_shape_of(param, "params");
    t.grad = want_grad(grad, param, "params", &keep);
    const Item mask = {op, "masks", i, masks[i]};
    mask.want_type(ScalarType::Bool, "bool");
    mask.want_cpu_contiguous();
    int64_t active = t.count;
    if (masks[i].numel() > 0) {
      mask.want_shape_of(param, "params");
      t.mask = static_cast<const uint8_t*>(masks[i].const_data_ptr());
      const Item starts = {op, "offsets", i, offsets[i]};
      starts.want_type(ScalarType::Long, "int64");
      starts.want_cpu_contiguous();
      const int64_t chunks = (t.count + kMaskChunk - 1) / kMaskChunk;
      starts.want_numel(chunks + 1);
      t.offsets = static_cast<const int64_t*>(offsets[i].const_data_ptr());
      active = t.offsets[chunks];
      STD_TORCH_CHECK(masked_offsets_ok(t.offsets, t.count, active), op, ": offsets[", i,
                      "] must count the mask's true entries from 0, got others; build it with "
                      "mask_offsets()");
    }
    want_states(op, l, i, "steps", active, 1, &t);
    tensors.push_back(t);
  }
  run(op, p, tensors, multiplier, found_inf, maximize);
}

void masked_adamw_bool(const Tensors& params, const Tensors& grads, const Tensors& masks,
                       const Tensors& offsets, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                       const Tensors& steps, double lr, double beta1, double beta2, double eps,
                       double weight_decay, bool maximize, const OptTensor& multiplier,
                       const OptTensor& found_inf) {
  const char* op = "masked_adamw_bool_";
  bool_step(op, adamw(op, lr, beta1, beta2, eps, weight_decay),
            {params, grads, exp_avgs, exp_avg_sqs, steps, true}, masks, offsets, maximize,
            multiplier, found_inf);
}

void masked_sgd_bool(const Tensors& params, const Tensors& grads, const Tensors& masks,
                     const Tensors& offsets, const Tensors& momenta, const Tensors& steps,
                     double lr, double momentum, double dampening, double weight_decay,
                     bool nesterov, bool maximize, const OptTensor& multiplier,
                     const OptTensor& found_inf) {
  const char* op = "masked_sgd_bool_";
  bool_step(op, sgd(op, lr, momentum, dampening, weight_decay, nesterov),
            {params, grads, momenta, momenta, steps, false}, masks, offsets, maximize, multiplier,
            found_inf);
}

}  // namespace
}  // namespace nibblock

STABLE_TORCH_LIBRARY_IMPL(nibblock, CPU, m) {
  m.impl("masked_adamw_block_", TORCH_BOX(&nibblock::masked_adamw_block));
  m.impl("masked_adamw_flat_", TORCH_BOX(&nibblock::masked_adamw_flat));
  m.impl("masked_adamw_bool_", TORCH_BOX(&nibblock::masked_adamw_bool));
  m.impl("masked_sgd_block_", TORCH_BOX(&nibblock::masked_sgd_block));
  m.impl("masked_sgd_flat_", TORCH_BOX(&nibblock::masked_sgd_flat));
  m.impl("masked_sgd_bool_", TORCH_BOX(&nibblock::masked_sgd_bool));
}
