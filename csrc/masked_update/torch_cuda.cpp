// torch glue of the masked optimiser steps of packed blocks for CUDA devices: checks of whole lists
// before anything moves, tensors -> params, launch on torch's current stream. Stable ABI only.
//
// The ops have names of their own: `masked_adamw_block_` on CUDA tensors belongs to the backend
// that chooses between Triton and these kernels. What lies on the device, ages and blocks, is not
// looked at: no call waits for the device.
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "../glue/cuda.h"
#include "../glue/masked.h"
#include "cuda.h"

namespace nibblock {
namespace {

using namespace glue;

struct Lists {
  const Tensors &params, &grads, &firsts, &seconds, &ages;
  bool adamw;
};

void check_lists(const char* op, const Lists& l, const char* params_name, const char* ages_name,
                 double momentum) {
  const size_t n = l.params.size();
  const auto want = [&](const char* name, size_t got, size_t need) {
    STD_TORCH_CHECK(got == need, op, ": ", name, " must hold ", need, " tensors as ", params_name,
                    ", got ", got);
  };
  want("grads", l.grads.size(), n);
  if (l.adamw) {
    want("exp_avgs", l.firsts.size(), n);
    want("exp_avg_sqs", l.seconds.size(), n);
  } else if (momentum != 0.0) {
    want("momenta", l.firsts.size(), n);
  } else {
    STD_TORCH_CHECK(l.firsts.empty(), op,
                    ": momenta must be an empty list where momentum is 0, got ", l.firsts.size(),
                    " tensors");
  }
  want(ages_name, l.ages.size(), n);
}

struct Device {
  int32_t index;

  void want(const Item& item) const {
    STD_TORCH_CHECK(
        item.tensor.tensor->is_cuda() && item.tensor.tensor->get_device_index() == index, item.op,
        ": ", item.text(), " must be on cuda:", index, ", where values[0] is, got another device");
  }
  void want_contiguous(const Item& item) const {
    want(item);
    STD_TORCH_CHECK(item.tensor.is_contiguous(), item.op, ": ", item.text(),
                    " must be contiguous, got other strides");
  }
};

// The data of a tensor that is read; one that is not contiguous is copied into `keep`.
const void* data_of(const Tensor& tensor, std::vector<Tensor>* keep) {
  if (tensor.is_contiguous()) return tensor.const_data_ptr();
  keep->push_back(torch::stable::contiguous(tensor));
  return keep->back().const_data_ptr();
}

float* state_of(const char* op, const char* list, size_t i, const Tensor& state, int64_t entries,
                const Device& device) {
  const Item item = {op, list, i, state};
  item.want_type(ScalarType::Float, "float32");
  device.want_contiguous(item);
  item.want_numel(entries);
  return static_cast<float*>(state.mutable_data_ptr());
}

// One float32 on the device, or null.
const float* scalar_on(const char* op, const char* name, const OptTensor& value,
                       const Device& device) {
  if (!value) return nullptr;
  STD_TORCH_CHECK(value->scalar_type() == ScalarType::Float, op, ": ", name,
                  " must be float32, got ", dtype_name(value->scalar_type()));
  STD_TORCH_CHECK(value->is_cuda() && value->get_device_index() == device.index, op, ": ", name,
                  " must be on cuda:", device.index, ", where values[0] is, got another device");
  STD_TORCH_CHECK(value->numel() == 1, op, ": ", name, " must hold 1 element, got ",
                  shape_text(*value));
  return static_cast<const float*>(value->const_data_ptr());
}

void block_step(const char* op, UpdateParams p, const Lists& l, const Tensors& weights,
                const Tensors& blocks, int64_t block, bool maximize, const OptTensor& multiplier,
                const OptTensor& found_inf, const std::string& kernel) {
  check_lists(op, l, "values", "ages", p.momentum);
  const size_t n = l.params.size();
  STD_TORCH_CHECK(weights.empty() || weights.size() == n, op, ": weights must hold ", n,
                  " tensors as values, or none, got ", weights.size());
  STD_TORCH_CHECK(blocks.size() == n, op, ": blocks must hold ", n, " tensors as values, got ",
                  blocks.size());
  want_block(op, block);
  if (n == 0) return;
  STD_TORCH_CHECK(l.params[0].is_cuda(), op,
                  ": values[0] must be on a CUDA device, got another device");
  const Device device = {l.params[0].get_device_index()};
  const torch::stable::accelerator::DeviceGuard guard(device.index);
  p.kind = MaskKind::kBlock;
  p.block = block;
  std::vector<UpdateTensor> tensors;
  tensors.reserve(n);
  std::vector<Tensor> keep;
  for (size_t i = 0; i < n; ++i) {
    UpdateTensor t = {};
    const Tensor& values = l.params[i];
    const Item param = {op, "values", i, values};
    t.type = param.want_weight_type();
    device.want_contiguous(param);
    STD_TORCH_CHECK(values.dim() == 3 && values.size(1) == block && values.size(2) == block, op,
                    ": values[", i, "] must be [Z, ", block, ", ", block, "], got ",
                    shape_text(values));
    t.param = values.mutable_data_ptr();
    t.count = values.size(0);
    const Item grad = {op, "grads", i, l.grads[i]};
    grad.want_shape_of(values, "values");
    grad.want_same_type(values, "values");
    device.want(grad);
    t.grad = data_of(l.grads[i], &keep);
    const int64_t entries = t.count * block * block;
    if (!l.firsts.empty()) {
      const char* list = l.adamw ? "exp_avgs" : "momenta";
      t.first = state_of(op, list, i, l.firsts[i], entries, device);
    }
    if (l.adamw) t.second = state_of(op, "exp_avg_sqs", i, l.seconds[i], entries, device);
    const Item age = {op, "ages", i, l.ages[i]};
    age.want_type(ScalarType::Int, "int32");
    device.want_contiguous(age);
    age.want_numel(t.count);
    t.age = static_cast<int32_t*>(l.ages[i].mutable_data_ptr());
    if (!weights.empty()) {
      const Item list = {op, "blocks", i, blocks[i]};
      list.want_type(ScalarType::Int, "int32");
      device.want(list);
      STD_TORCH_CHECK(blocks[i].dim() == 2 && blocks[i].size(1) == 2 &&
                          blocks[i].size(0) == t.count,
                      op, ": ", list.text(), " must be [", t.count,
                      ", 2] (row block, column block), got ", shape_text(blocks[i]));
      t.blocks = static_cast<const int32_t*>(data_of(blocks[i], &keep));
      const Item weight = {op, "weights", i, weights[i]};
      t.weight_type = weight.want_weight_type();
      device.want(weight);
      weight.want_rows();
      t.n = weights[i].size(0);
      t.k = weights[i].size(1);
      t.weight_stride = weights[i].stride(0);
      t.weight = weights[i].mutable_data_ptr();
    }
    tensors.push_back(t);
  }
  p.tensors = tensors.data();
  p.tensor_count = static_cast<int64_t>(n);
  p.multiplier = maximize ? -1.0f : 1.0f;
  int device_error = 0;
  const Status s = masked_block_cuda_run(p, scalar_on(op, "multiplier", multiplier, device),
                                         scalar_on(op, "found_inf", found_inf, device),
                                         kernel.empty() ? nullptr : kernel.c_str(),
                                         current_stream(device.index), &device_error);
  STD_TORCH_CHECK(s != kNotServed, op, ": no CUDA kernel ", kernel,
                  " for this list: below 2^31 blocks, rows and columns of the op's own rule are "
                  "served; use the Triton backend");
  check_cuda_status(op, s, kernel, device_error, masked_cuda_error_text(device_error));
  STD_TORCH_CHECK(s == kOk, op, ": internal error ", static_cast<int>(s));
}

void masked_adamw_block(const Tensors& values, const Tensors& grads, const Tensors& exp_avgs,
                        const Tensors& exp_avg_sqs, const Tensors& ages, const Tensors& weights,
                        const Tensors& blocks, int64_t block, double lr, double beta1, double beta2,
                        double eps, double weight_decay, bool maximize, const OptTensor& multiplier,
                        const OptTensor& found_inf, const Text& kernel) {
  const char* op = "masked_adamw_block_";
  block_step(op, adamw(op, lr, beta1, beta2, eps, weight_decay),
             {values, grads, exp_avgs, exp_avg_sqs, ages, true}, weights, blocks, block, maximize,
             multiplier, found_inf, kernel);
}

void masked_sgd_block(const Tensors& values, const Tensors& grads, const Tensors& momenta,
                      const Tensors& ages, const Tensors& weights, const Tensors& blocks,
                      int64_t block, double lr, double momentum, double dampening,
                      double weight_decay, bool nesterov, bool maximize,
                      const OptTensor& multiplier, const OptTensor& found_inf, const Text& kernel) {
  const char* op = "masked_sgd_block_";
  block_step(op, sgd(op, lr, momentum, dampening, weight_decay, nesterov),
             {values, grads, momenta, momenta, ages, false}, weights, blocks, block, maximize,
             multiplier, found_inf, kernel);
}

}  // namespace
}  // namespace nibblock

STABLE_TORCH_LIBRARY_FRAGMENT(nibblock, m) {
  m.def("_masked_adamw_block_cuda_(Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] exp_avgs, "
        "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] ages, Tensor(e!)[] weights, Tensor[] blocks, "
        "int block, float lr, float beta1, float beta2, float eps, float weight_decay, "
        "bool maximize, Tensor? multiplier, Tensor? found_inf, str kernel) -> ()");
  m.def("_masked_sgd_block_cuda_(Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] momenta, "
        "Tensor(c!)[] ages, Tensor(d!)[] weights, Tensor[] blocks, int block, float lr, "
        "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, "
        "Tensor? multiplier, Tensor? found_inf, str kernel) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(nibblock, CUDA, m) {
  m.impl("_masked_adamw_block_cuda_", TORCH_BOX(&nibblock::masked_adamw_block));
  m.impl("_masked_sgd_block_cuda_", TORCH_BOX(&nibblock::masked_sgd_block));
}
