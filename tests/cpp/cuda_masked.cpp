// The masked optimiser step's body for CUDA over the software model of
// csrc/common/cuda_emulation.h, as a library that tests/test_cuda_masked.py compiles and calls.
#define NIBBLOCK_EMULATE_CUDA
#include "../../csrc/common/flush_denormals.h"
#include "../../csrc/masked_update/cuda_block_body.cuh"
#include "../../csrc/masked_update/cuda_block_list.h"

using namespace nibblock;
using namespace nibblock::cuda;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

std::vector<UpdateTensor> tensors;

void allow(const void* p, int64_t bytes) {
  const uint8_t* at = static_cast<const uint8_t*>(p);
  if (p) emulation::machine().ranges.push_back({at, at + bytes});
}

template <class P, class R>
int launch(StepParams& q, int tasks, bool backwards) {
  for (int i = 0; i < tasks; ++i) {
    const int task = backwards ? tasks - 1 - i : i;
    emulation::run_block(step_threads(q.shift), kStepSharedBytes, [&](int thread) {
      step_body<P, R>(q, emulation::machine().shared, task, thread);
    });
  }
  return 0;
}

template <class R>
void run(const UpdateParams& p, StepParams& q, bool backwards, int* launches) {
  step_launches(p, Dtype::kF32, q, [&](StepParams& part, int tasks) {
    ++*launches;
    return launch<Float32, R>(part, tasks, backwards);
  });
  step_launches(p, Dtype::kBF16, q, [&](StepParams& part, int tasks) {
    ++*launches;
    return launch<BFloat16, R>(part, tasks, backwards);
  });
}

}  // namespace

EXPORT void cuda_masked_clear() { tensors.clear(); }

// type, weight_type: 0 float32, 1 bfloat16.
EXPORT void cuda_masked_add(void* param, const void* grad, int type, float* first, float* second,
                            int32_t* age, int64_t count, const int32_t* blocks, void* weight,
                            int64_t stride, int64_t n, int64_t k, int weight_type) {
  UpdateTensor t = {};
  t.param = param;
  t.grad = grad;
  t.type = static_cast<Dtype>(type);
  t.first = first;
  t.second = second;
  t.age = age;
  t.count = count;
  t.blocks = blocks;
  t.weight = weight;
  t.weight_stride = stride;
  t.n = n;
  t.k = k;
  t.weight_type = static_cast<Dtype>(weight_type);
  tensors.push_back(t);
}

// One step of the tensors that were added. number[0..7]: lr, weight_decay, beta1, beta2, eps,
// momentum, dampening, nesterov. Returns the number of launches; -1: not served.
EXPORT int cuda_masked_step(int rule, int64_t block, const double* number, int maximize,
                            const float* multiplier, const float* found_inf, int backwards) {
  UpdateParams p = {};
  p.rule = static_cast<UpdateRule>(rule);
  p.kind = MaskKind::kBlock;
  p.tensors = tensors.data();
  p.tensor_count = static_cast<int64_t>(tensors.size());
  p.block = block;
  p.lr = number[0];
  p.weight_decay = number[1];
  p.beta1 = number[2];
  p.beta2 = number[3];
  p.eps = number[4];
  p.momentum = number[5];
  p.dampening = number[6];
  p.nesterov = number[7] != 0.0;
  p.multiplier = maximize ? -1.0f : 1.0f;
  if (!step_serves(p)) return -1;
  emulation::machine().ranges.clear();
  allow(multiplier, 4);
  allow(found_inf, 4);
  for (const UpdateTensor& t : tensors) {
    const int64_t entries = t.count * block * block, wide = dtype_size(t.weight_type);
    allow(t.param, entries * dtype_size(t.type));
    allow(t.grad, entries * dtype_size(t.type));
    allow(t.first, entries * 4);
    allow(t.second, entries * 4);
    allow(t.age, t.count * 4);
    allow(t.blocks, t.count * 8);
    for (int64_t i = 0; t.weight && i < t.n; ++i) {
      allow(static_cast<char*>(t.weight) + i * t.weight_stride * wide, t.k * wide);
    }
  }
  const FlushDenormals flush;
  StepParams q = step_params(p, multiplier, found_inf);
  int launches = 0;
  if (p.rule == UpdateRule::kAdamW) {
    run<AdamWStep>(p, q, backwards, &launches);
  } else if (p.momentum != 0.0) {
    run<SgdStep<true>>(p, q, backwards, &launches);
  } else {
    run<SgdStep<false>>(p, q, backwards, &launches);
  }
  return launches;
}

// How often each entry of one task's blocks is taken, seen[blocks][B * B]; returns the blocks.
EXPORT int cuda_masked_spots(int shift, int32_t* seen) {
  for (int pass = 0; pass < step_passes(shift); ++pass) {
    for (int thread = 0; thread < step_threads(shift); ++thread) {
      const Spot s = step_spot(shift, thread, pass);
      for (int i = 0; i < kLaneEntries; ++i) ++seen[(s.local << (2 * shift)) + s.entry + i];
    }
  }
  return step_blocks(shift);
}

EXPORT int cuda_masked_params_bytes() { return sizeof(StepParams); }
EXPORT int cuda_masked_list() { return kStepTensors; }
EXPORT int cuda_masked_tasks(int shift, int64_t count) { return step_tasks(shift, count); }
EXPORT int cuda_masked_tensor(int count, const int32_t* first_task, int task) {
  static StepParams p;
  p.tensors = count;
  for (int i = 0; i < count; ++i) p.tensor[i].first_task = first_task[i];
  return step_tensor(p, task);
}
