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

// A list of the op: a tensor for each parameter, or one that holds all of them in order (`whole`;
// blocks only). Few tensors are quicker to find than many.
struct Column {
  const char* name;
  std::vector<Facts> facts;
  bool whole = false;

  Column(const char* n, const Tensors& tensors, Access access)
      : name(n), facts(facts_of(tensors, access)) {}
  bool empty() const { return facts.empty(); }
  size_t size() const { return facts.size(); }
  size_t at(size_t i) const { return whole ? 0 : i; }
  Item item(const char* op, size_t i) const { return {op, name, at(i), facts[at(i)]}; }
  // Data of parameter i; `before` counts what those before it hold.
  template <class T>
  T* data(size_t i, int64_t before) const {
    return static_cast<T*>(facts[at(i)].data) + (whole ? before : 0);
  }
};

const Tensors kNone;

struct Lists {
  Column params, grads, firsts, seconds, ages;
  bool adamw;

  Lists(const char* param_name, const Tensors& p, const Tensors& g, const char* first_name,
        const Tensors& first, const Tensors* second, const char* age_name, const Tensors& age)
      : params(param_name, p, Access::kWrite), grads("grads", g, Access::kRead),
        firsts(first_name, first, Access::kWrite),
        seconds("exp_avg_sqs", second ? *second : kNone, Access::kWrite),
        ages(age_name, age, Access::kWrite), adamw(second != nullptr) {}
};

UpdateTensor entry(const char* op, const Lists& l, size_t i) {
  UpdateTensor t = {};
  const Item param = l.params.item(op, i);
  t.type = param.want_weight_type();
  param.want_cpu_contiguous();
  t.param = param.tensor.data;
  return t;
}

// What precedes a parameter in the columns that hold all of them, and what all of them hold.
struct Span {
  int64_t before, total;
};

void want_state(const char* op, const Column& c, size_t i, int64_t entries, Span span,
                ScalarType type, const char* type_name) {
  if (c.whole && i > 0) return;
  const Item item = c.item(op, i);
  item.want_type(type, type_name);
  item.want_cpu_contiguous();
  item.want_numel(c.whole ? span.total : entries);
}

// States of the active entries, and counters of updates.
void want_states(const char* op, const Lists& l, size_t i, int64_t entries, int64_t ages,
                 Span entry_span, Span age_span, UpdateTensor* t) {
  if (!l.firsts.empty()) {
    want_state(op, l.firsts, i, entries, entry_span, ScalarType::Float, "float32");
    t->first = l.firsts.data<float>(i, entry_span.before);
  }
  if (l.adamw) {
    want_state(op, l.seconds, i, entries, entry_span, ScalarType::Float, "float32");
    t->second = l.seconds.data<float>(i, entry_span.before);
  }
  want_state(op, l.ages, i, ages, age_span, ScalarType::Int, "int32");
  t->age = l.ages.data<int32_t>(i, age_span.before);
  __builtin_prefetch(t->age);  // read once the whole list is known
}

void want_count(const char* op, Column* c, const Column& params, bool whole) {
  const size_t need = params.size(), got = c->size();
  c->whole = whole && got == 1 && need > 1;
  STD_TORCH_CHECK(got == need || c->whole, op, ": ", c->name, " must hold ", need, " tensors as ",
                  params.name, ", got ", got);
}

// `whole`: states, ages and blocks may be one tensor for all parameters.
void check_lists(const char* op, Lists* l, bool whole, double momentum) {
  want_count(op, &l->grads, l->params, false);
  if (l->adamw || momentum != 0.0) {
    want_count(op, &l->firsts, l->params, whole);
    if (l->adamw) want_count(op, &l->seconds, l->params, whole);
  } else {
    STD_TORCH_CHECK(l->firsts.empty(), op,
                    ": momenta must be an empty list where momentum is 0, got ", l->firsts.size(),
                    " tensors");
  }
  want_count(op, &l->ages, l->params, whole);
}

// A gradient of the parameter's dtype; one that is not contiguous is copied into `keep`.
const void* want_grad(const Item& grad, const Column& params, std::vector<Tensor>* keep) {
  grad.want_same_type(params.facts[grad.at], params.name);
  grad.want_cpu();
  if (grad.tensor.is_contiguous()) return grad.tensor.data;
  keep->push_back(torch::stable::contiguous(*grad.tensor.tensor));
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

void block_step(const char* op, UpdateParams p, Lists l, const Tensors& weight_list,
                const Tensors& block_list, int64_t block, bool maximize,
                const OptTensor& multiplier, const OptTensor& found_inf) {
  Column weights("weights", weight_list, Access::kWrite);
  Column blocks("blocks", block_list, Access::kRead);
  check_lists(op, &l, true, p.momentum);
  const size_t n = l.params.size();
  STD_TORCH_CHECK(weights.empty() || weights.size() == n, op, ": weights must hold ", n,
                  " tensors as values, or none, got ", weights.size());
  want_count(op, &blocks, l.params, true);
  want_block(op, block);
  p.kind = MaskKind::kBlock;
  p.block = block;
  std::vector<UpdateTensor> tensors;
  tensors.reserve(n);
  std::vector<Tensor> keep;
  int64_t total = 0, dense_bytes = 0;
  for (size_t i = 0; i < n; ++i) {
    UpdateTensor t = entry(op, l, i);
    const Facts& values = l.params.facts[i];
    STD_TORCH_CHECK(values.dim() == 3 && values.size(1) == block && values.size(2) == block, op,
                    ": values[", i, "] must be [Z, ", block, ", ", block, "], got ",
                    shape_text(values));
    t.count = values.size(0);
    total += t.count;
    const Item grad = l.grads.item(op, i);
    grad.want_shape_of(values, "values");
    t.grad = want_grad(grad, l.params, &keep);
    if (!weights.empty()) {
      const Item weight = weights.item(op, i);
      t.weight_type = weight.want_weight_type();
      weight.want_cpu();
      weight.want_rows();
      t.n = weight.tensor.size(0);
      t.k = weight.tensor.size(1);
      t.weight_stride = weight.tensor.stride(0);
      t.weight = weight.tensor.data;
      dense_bytes += t.n * t.k * dtype_size(t.weight_type);
      __builtin_prefetch(t.param);
      __builtin_prefetch(t.grad);
    }
    tensors.push_back(t);
  }
  const int64_t area = block * block;
  const int32_t* all = nullptr;
  if (blocks.whole) all = blocks.item(op, 0).want_blocks(total, &keep);
  int64_t before = 0;
  for (size_t i = 0; i < n; ++i) {
    UpdateTensor& t = tensors[i];
    want_states(op, l, i, t.count * area, t.count, {before * area, total * area}, {before, total},
                &t);
    t.blocks = all ? all + 2 * before : blocks.item(op, i).want_blocks(t.count, &keep);
    __builtin_prefetch(t.blocks);
    before += t.count;
  }
  for (size_t i = 0; i < n && !weights.empty(); ++i) {
    const UpdateTensor& t = tensors[i];
    blocks.item(op, i).want_blocks_inside(t.blocks, t.count, t.n, t.k, block);
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
             {"values", values, grads, "exp_avgs", exp_avgs, &exp_avg_sqs, "ages", ages}, weights,
             blocks, block, maximize, multiplier, found_inf);
}

void masked_sgd_block(const Tensors& values, const Tensors& grads, const Tensors& momenta,
                      const Tensors& ages, const Tensors& weights, const Tensors& blocks,
                      int64_t block, double lr, double momentum, double dampening,
                      double weight_decay, bool nesterov, bool maximize,
                      const OptTensor& multiplier, const OptTensor& found_inf) {
  const char* op = "masked_sgd_block_";
  block_step(op, sgd(op, lr, momentum, dampening, weight_decay, nesterov),
             {"values", values, grads, "momenta", momenta, nullptr, "ages", ages}, weights, blocks,
             block, maximize, multiplier, found_inf);
}

// --- flat ----------------------------------------------------------------------------------------

void flat_step(const char* op, UpdateParams p, Lists l, const Tensors& index_list, bool maximize,
               const OptTensor& multiplier, const OptTensor& found_inf) {
  Column indices("indices", index_list, Access::kRead);
  check_lists(op, &l, false, p.momentum);
  const size_t n = l.params.size();
  want_count(op, &indices, l.params, false);
  p.kind = MaskKind::kFlat;
  std::vector<UpdateTensor> tensors;
  tensors.reserve(n);
  std::vector<Tensor> keep;
  for (size_t i = 0; i < n; ++i) {
    UpdateTensor t = entry(op, l, i);
    const Facts &param = l.params.facts[i], &index = indices.facts[i];
    const ScalarType type = index.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, op, ": indices[", i,
                    "] must be int32 or int64, got ", dtype_name(type));
    const Item list = indices.item(op, i);
    list.want_cpu_contiguous();
    STD_TORCH_CHECK(index.dim() == 1, op, ": indices[", i, "] must be [nnz], got ",
                    shape_text(index));
    t.count = index.numel();
    t.index = index.data;
    t.index64 = type == ScalarType::Long;
    t.numel = param.numel();
    const Item grad = l.grads.item(op, i);
    t.grad_packed = grad.tensor.dim() == 1 && grad.tensor.numel() == t.count;
    if (!t.grad_packed) {
      STD_TORCH_CHECK(same_shape(grad.tensor, param), op, ": grads[", i, "] must be [", t.count,
                      "] or ", shape_text(param), " as params[", i, "], got ",
                      shape_text(grad.tensor));
    }
    t.grad = want_grad(grad, l.params, &keep);
    want_states(op, l, i, t.count, 1, {}, {}, &t);
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
            {"params", params, grads, "exp_avgs", exp_avgs, &exp_avg_sqs, "steps", steps}, indices,
            maximize, multiplier, found_inf);
}

void masked_sgd_flat(const Tensors& params, const Tensors& grads, const Tensors& indices,
                     const Tensors& momenta, const Tensors& steps, double lr, double momentum,
                     double dampening, double weight_decay, bool nesterov, bool maximize,
                     const OptTensor& multiplier, const OptTensor& found_inf) {
  const char* op = "masked_sgd_flat_";
  flat_step(op, sgd(op, lr, momentum, dampening, weight_decay, nesterov),
            {"params", params, grads, "momenta", momenta, nullptr, "steps", steps}, indices,
            maximize, multiplier, found_inf);
}

// --- bool ----------------------------------------------------------------------------------------

void bool_step(const char* op, UpdateParams p, Lists l, const Tensors& mask_list,
               const Tensors& offset_list, bool maximize, const OptTensor& multiplier,
               const OptTensor& found_inf) {
  Column masks("masks", mask_list, Access::kRead);
  Column offsets("offsets", offset_list, Access::kRead);
  check_lists(op, &l, false, p.momentum);
  const size_t n = l.params.size();
  want_count(op, &masks, l.params, false);
  want_count(op, &offsets, l.params, false);
  p.kind = MaskKind::kBool;
  std::vector<UpdateTensor> tensors;
  tensors.reserve(n);
  std::vector<Tensor> keep;
  for (size_t i = 0; i < n; ++i) {
    UpdateTensor t = entry(op, l, i);
    const Facts& param = l.params.facts[i];
    t.count = param.numel();
    const Item grad = l.grads.item(op, i);
    grad.want_shape_of(param, "params");
    t.grad = want_grad(grad, l.params, &keep);
    const Item mask = masks.item(op, i);
    mask.want_type(ScalarType::Bool, "bool");
    mask.want_cpu_contiguous();
    int64_t active = t.count;
    if (mask.tensor.numel() > 0) {
      mask.want_shape_of(param, "params");
      t.mask = static_cast<const uint8_t*>(mask.tensor.data);
      const Item starts = offsets.item(op, i);
      starts.want_type(ScalarType::Long, "int64");
      starts.want_cpu_contiguous();
      const int64_t chunks = (t.count + kMaskChunk - 1) / kMaskChunk;
      starts.want_numel(chunks + 1);
      t.offsets = static_cast<const int64_t*>(starts.tensor.data);
      active = t.offsets[chunks];
      STD_TORCH_CHECK(masked_offsets_ok(t.offsets, t.count, active), op, ": offsets[", i,
                      "] must count the mask's true entries from 0, got others; build it with "
                      "mask_offsets()");
    }
    want_states(op, l, i, active, 1, {}, {}, &t);
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
            {"params", params, grads, "exp_avgs", exp_avgs, &exp_avg_sqs, "steps", steps}, masks,
            offsets, maximize, multiplier, found_inf);
}

void masked_sgd_bool(const Tensors& params, const Tensors& grads, const Tensors& masks,
                     const Tensors& offsets, const Tensors& momenta, const Tensors& steps,
                     double lr, double momentum, double dampening, double weight_decay,
                     bool nesterov, bool maximize, const OptTensor& multiplier,
                     const OptTensor& found_inf) {
  const char* op = "masked_sgd_bool_";
  bool_step(op, sgd(op, lr, momentum, dampening, weight_decay, nesterov),
            {"params", params, grads, "momenta", momenta, nullptr, "steps", steps}, masks, offsets,
            maximize, multiplier, found_inf);
}

// --- descriptions --------------------------------------------------------------------------------

// Asks memory for the lines at these addresses, int64, all at once. Nothing is read from them: an
// address that has become invalid costs time and is otherwise ignored.
void fetch_lines(const Tensor& addresses) {
  const Facts facts(addresses, Access::kRead);
  const Item item = {"_fetch_lines", "addresses", 0, facts};
  item.want_type(ScalarType::Long, "int64");
  item.want_cpu_contiguous();
  const int64_t* at = static_cast<const int64_t*>(facts.data);
  const int64_t count = facts.numel();
  for (int64_t i = 0; i < count; ++i) __builtin_prefetch(reinterpret_cast<const void*>(at[i]));
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
  m.impl("_fetch_lines", TORCH_BOX(&nibblock::fetch_lines));
}
