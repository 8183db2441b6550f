// torch glue of the masked passes over gradients and of the group-lasso step for the CPU: checks of
// whole lists before anything moves, tensors -> params, launch. Stable ABI only.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "../glue/check.h"
#include "../glue/list.h"
#include "masked_update.h"

namespace nibblock {
namespace {

using namespace glue;
using OptTensor = std::optional<Tensor>;

Tensor new_floats(int64_t dim, int64_t size) {
  const int64_t stride = 1;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, &size, &stride, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// A list of gradients as tasks; the ones that are not contiguous are worked on in a copy.
struct Gradients {
  std::vector<GradTensor> tensors;
  std::vector<Tensor> keep;
  std::vector<std::pair<const Tensor*, Tensor>> copies;  // written back at the end

  void* data(const Tensor& grad, bool plain, bool write) {
    if (plain) return write ? grad.mutable_data_ptr() : const_cast<void*>(grad.const_data_ptr());
    copies.emplace_back(&grad, torch::stable::contiguous(grad));
    return copies.back().second.mutable_data_ptr();
  }
};

double sum_of(const std::vector<double>& parts) {
  double sum = 0.0;
  for (double part : parts) sum += part;
  return sum;
}

// The norm of scale * grads over the active entries; with `write` also scales them in place, to a
// norm of at most max_norm if that is above 0, and zeroes the rest.
Tensor pass(const char* op, GradOp which, Gradients* g, int64_t block, const OptTensor& multiplier,
            double max_norm, bool write) {
  STD_TORCH_CHECK(max_norm == max_norm, op, ": max_norm must be a number, got nan");
  const float scale = scalar_of(op, "multiplier", multiplier, 1.0f);
  GradParams p = {};
  p.blocks = which == GradOp::kBlock;
  p.block = block;
  for (GradTensor& t : g->tensors) {
    t.first_task = p.task_count;
    p.task_count += grad_tasks(p.blocks, block, t.rows);
  }
  p.tensors = g->tensors.data();
  p.tensor_count = static_cast<int64_t>(g->tensors.size());
  std::vector<double> sums(static_cast<size_t>(p.task_count), 0.0);
  const Parallel parallel = torch_parallel();
  p.parallel = &parallel;
  p.sums = sums.data();
  p.scale = scale;
  const bool clip = write && max_norm > 0.0;
  p.write = write && !clip;
  want_ok(op, masked_grad_run(which, p));
  const float norm = static_cast<float>(fabs(static_cast<double>(scale)) * sqrt(sum_of(sums)));
  if (clip) {
    // As torch.nn.utils.clip_grad_norm_: a NaN norm makes every gradient NaN.
    const float share = static_cast<float>(max_norm / (static_cast<double>(norm) + 1e-6));
    p.scale = share >= 1.0f ? scale : scale * share;
    p.write = true;
    p.sums = nullptr;
    want_ok(op, masked_grad_run(which, p));
  }
  if (write) {
    for (auto& copy : g->copies) {
      Tensor target = *copy.first;
      torch::stable::copy_(target, copy.second);
    }
  }
  Tensor result = new_floats(0, 1);
  *static_cast<float*>(result.mutable_data_ptr()) = norm;
  return result;
}

Tensor masked_grad_bool(const Tensors& grads, const Tensors& masks, const OptTensor& multiplier,
                        double max_norm) {
  const char* op = "masked_grad_bool_";
  STD_TORCH_CHECK(masks.size() == grads.size(), op, ": masks must hold ", grads.size(),
                  " tensors as grads, got ", masks.size());
  Gradients g;
  for (size_t i = 0; i < grads.size(); ++i) {
    GradTensor t = {};
    const Facts grad_facts(grads[i]), mask_facts(masks[i]);
    const Item grad = {op, "grads", i, grad_facts}, mask = {op, "masks", i, mask_facts};
    t.type = grad.want_weight_type();
    grad.want_cpu();
    mask.want_type(ScalarType::Bool, "bool");
    mask.want_cpu();
    t.rows = grads[i].numel();
    t.cols = t.stride = 1;
    if (masks[i].numel() > 0) {
      mask.want_shape_of(grads[i], "grads");
      g.keep.push_back(masks[i].is_contiguous() ? masks[i] : torch::stable::contiguous(masks[i]));
      t.mask = static_cast<const uint8_t*>(g.keep.back().const_data_ptr());
    }
    t.grad = g.data(grads[i], grads[i].is_contiguous(), true);
    g.tensors.push_back(t);
  }
  return pass(op, GradOp::kBool, &g, 0, multiplier, max_norm, true);
}

Tensor masked_grad_block(const Tensors& grads, const Tensors& blocks, int64_t block,
                         const OptTensor& multiplier, double max_norm) {
  const char* op = "masked_grad_block_";
  STD_TORCH_CHECK(blocks.size() == grads.size(), op, ": blocks must hold ", grads.size(),
                  " tensors as grads, got ", blocks.size());
  want_block(op, block);
  Gradients g;
  for (size_t i = 0; i < grads.size(); ++i) {
    GradTensor t = {};
    const Tensor& tensor = grads[i];
    const Facts facts(tensor), block_facts(blocks[i]);
    const Item grad = {op, "grads", i, facts}, list = {op, "blocks", i, block_facts};
    t.type = grad.want_weight_type();
    grad.want_cpu();
    STD_TORCH_CHECK(tensor.dim() == 2, op, ": grads[", i, "] must be [N, K], got ",
                    shape_text(tensor));
    t.rows = tensor.size(0);
    t.cols = tensor.size(1);
    t.blocks = list.want_blocks(-1, &g.keep);
    t.count = blocks[i].size(0);
    list.want_blocks_inside(t.blocks, t.count, t.rows, t.cols, block);
    const bool plain =
        (t.cols <= 1 || tensor.stride(1) == 1) && (t.rows <= 1 || tensor.stride(0) >= t.cols);
    t.stride = plain ? tensor.stride(0) : t.cols;
    t.grad = g.data(tensor, plain, true);
    g.tensors.push_back(t);
  }
  return pass(op, GradOp::kBlock, &g, block, multiplier, max_norm, true);
}

Tensor grad_norm(const Tensors& grads, const OptTensor& multiplier) {
  const char* op = "grad_norm";
  Gradients g;
  for (size_t i = 0; i < grads.size(); ++i) {
    GradTensor t = {};
    const Facts facts(grads[i]);
    const Item grad = {op, "grads", i, facts};
    t.type = grad.want_weight_type();
    grad.want_cpu();
    t.rows = grads[i].numel();
    t.cols = t.stride = 1;
    t.grad = g.data(grads[i], grads[i].is_contiguous(), false);
    g.tensors.push_back(t);
  }
  return pass(op, GradOp::kNorm, &g, 0, multiplier, 0.0, false);
}

Tensor prox_blocks(const Tensors& values, const Tensors& origins, const Tensors& thresholds) {
  const char* op = "prox_blocks_";
  const size_t n = values.size();
  STD_TORCH_CHECK(origins.empty() || origins.size() == n, op, ": origins must hold ", n,
                  " tensors as values, or none, got ", origins.size());
  STD_TORCH_CHECK(thresholds.size() == n, op, ": thresholds must hold ", n,
                  " tensors as values, got ", thresholds.size());
  std::vector<ProxTensor> tensors;
  std::vector<Tensor> keep;
  ProxParams p = {};
  for (size_t i = 0; i < n; ++i) {
    ProxTensor t = {};
    const Facts facts(values[i]), limits(thresholds[i]);
    const Item value = {op, "values", i, facts}, limit = {op, "thresholds", i, limits};
    t.type = value.want_weight_type();
    value.want_cpu_contiguous();
    STD_TORCH_CHECK(values[i].dim() == 3, op, ": values[", i, "] must be [Z, B, B], got ",
                    shape_text(values[i]));
    t.count = values[i].size(0);
    t.size = values[i].size(1) * values[i].size(2);
    t.values = values[i].mutable_data_ptr();
    if (!origins.empty()) {
      const Facts first(origins[i]);
      const Item origin = {op, "origins", i, first};
      origin.want_same_type(values[i], "values");
      origin.want_cpu();
      origin.want_shape_of(values[i], "values");
      keep.push_back(torch::stable::contiguous(origins[i]));
      t.origin = keep.back().const_data_ptr();
    }
    limit.want_type(ScalarType::Float, "float32");
    limit.want_cpu();
    STD_TORCH_CHECK(thresholds[i].dim() == 1 && thresholds[i].size(0) == t.count, op,
                    ": thresholds[", i, "] must be [", t.count, "], got ",
                    shape_text(thresholds[i]));
    keep.push_back(torch::stable::contiguous(thresholds[i]));
    t.thresholds = static_cast<const float*>(keep.back().const_data_ptr());
    for (int64_t z = 0; z < t.count; ++z) {
      STD_TORCH_CHECK(t.thresholds[z] >= 0.0f, op, ": thresholds[", i, "] must be at least 0, got ",
                      t.thresholds[z]);
    }
    t.first_task = p.task_count;
    p.task_count += t.count;
    tensors.push_back(t);
  }
  Tensor norms = new_floats(1, p.task_count);
  float* out = static_cast<float*>(norms.mutable_data_ptr());
  for (ProxTensor& t : tensors) t.norms = out + t.first_task;
  p.tensors = tensors.data();
  p.tensor_count = static_cast<int64_t>(n);
  const Parallel parallel = torch_parallel();
  p.parallel = &parallel;
  want_ok(op, prox_blocks_run(p));
  return norms;
}

}  // namespace
}  // namespace nibblock

STABLE_TORCH_LIBRARY_IMPL(nibblock, CPU, m) {
  m.impl("masked_grad_bool_", TORCH_BOX(&nibblock::masked_grad_bool));
  m.impl("masked_grad_block_", TORCH_BOX(&nibblock::masked_grad_block));
  m.impl("grad_norm", TORCH_BOX(&nibblock::grad_norm));
  m.impl("prox_blocks_", TORCH_BOX(&nibblock::prox_blocks));
}
