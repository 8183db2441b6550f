// A list of tensors as the launches of masked_block_step that serve it. Host code without CUDA, so
// that the software model takes the same way.
#pragma once

#include "cuda_block.h"
#include "masked_update.h"

namespace nibblock {
namespace cuda {

static inline bool step_fits(int64_t v) { return v >= 0 && v < (int64_t(1) << 31); }
static inline bool step_whole(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// log2 of the block, or 0: not served.
static inline int step_shift(int64_t block) {
  return block == 16 ? 4 : block == 32 ? 5 : block == 64 ? 6 : block == 128 ? 7 : 0;
}

static inline bool step_serves(const UpdateParams& p) {
  if (p.kind != MaskKind::kBlock || step_shift(p.block) == 0) return false;
  for (int64_t i = 0; i < p.tensor_count; ++i) {
    const UpdateTensor& t = p.tensors[i];
    if (!step_fits(t.count) || (t.weight && (!step_fits(t.n) || !step_fits(t.k)))) return false;
  }
  return true;
}

static inline StepTensor step_entry(const UpdateTensor& t) {
  StepTensor e = {};
  e.param = t.param;
  e.grad = t.grad;
  e.first = t.first;
  e.second = t.second;
  e.age = t.age;
  e.count = static_cast<int32_t>(t.count);
  e.aligned =
      step_whole(t.param) && step_whole(t.grad) && step_whole(t.first) && step_whole(t.second);
  if (t.weight) {
    e.blocks = t.blocks;
    e.weight = t.weight;
    e.weight_stride = t.weight_stride;
    e.n = static_cast<int32_t>(t.n);
    e.k = static_cast<int32_t>(t.k);
    e.weight_bf16 = t.weight_type == Dtype::kBF16;
    e.weight_aligned =
        step_whole(t.weight) && t.weight_stride * dtype_size(t.weight_type) % 16 == 0;
  }
  return e;
}

// Everything but the tensors. p.multiplier is the sign.
static inline StepParams step_params(const UpdateParams& p, const float* multiplier,
                                     const float* found_inf) {
  const UpdateScalars s = update_scalars(p, 0);  // of it, what does not follow the age
  StepParams q = {};
  q.multiplier = multiplier;
  q.found_inf = found_inf;
  q.lr = p.lr;
  q.beta1 = p.beta1;
  q.beta2 = p.beta2;
  q.sign = p.multiplier;
  q.decay = s.decay;
  q.blend = s.blend;
  q.beta2_rounded = s.beta2;
  q.rest2 = s.rest2;
  q.eps = s.eps;
  q.momentum = s.momentum;
  q.rest = s.rest;
  q.lr_rounded = s.lr;
  q.near = s.near;
  q.decays = s.decays;
  q.nesterov = s.nesterov;
  q.shift = step_shift(p.block);
  return q;
}

// Calls launch(params, thread blocks) for the tensors of one type, as often as it takes; stops at
// the first result that is not 0, and returns it.
template <class F>
static int step_launches(const UpdateParams& p, Dtype type, StepParams& q, F&& launch) {
  int64_t tasks = 0;
  q.tensors = 0;
  for (int64_t i = 0; i <= p.tensor_count; ++i) {
    const bool end = i == p.tensor_count;
    if (!end && (p.tensors[i].type != type || p.tensors[i].count == 0)) continue;
    const int64_t more = end ? 0 : step_tasks(q.shift, p.tensors[i].count);
    if (q.tensors > 0 && (end || q.tensors == kStepTensors || !step_fits(tasks + more))) {
      if (const int error = launch(q, static_cast<int>(tasks))) return error;
      q.tensors = 0;
      tasks = 0;
    }
    if (end) break;
    StepTensor& entry = q.tensor[q.tensors++];
    entry = step_entry(p.tensors[i]);
    entry.first_task = static_cast<int32_t>(tasks);
    tasks += more;
  }
  return 0;
}

}  // namespace cuda
}  // namespace nibblock
