// masked_update: optimiser steps that move only the masked entries of a list of parameters, and the
// masked passes over gradients that go with them. C interface.
//
//     AdamW  g = grad * multiplier                    SGD  g = grad * multiplier + wd * p
//            m = m + (1 - b1) * (g - m)                    m = momentum * m + (1 - dampening) * g
//            v = b2 * v + (1 - b2) * g * g                 d = nesterov ? g + momentum * m : m
//            p = p * (1 - lr * wd)                         p = p - lr * d
//            p = p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
//
// t counts the updates an entry has had, this one included; the first update of SGD sets m = g. A
// negative multiplier maximises. Three kinds of masks, one table each:
//
//     block  param is Z blocks [B][B], each with its age; the dense weight [N, K] that they belong
//            to, if given, receives the new values too. Elements outside N x K stay as they are
//     flat   param [numel] moves at the sorted positions index[nnz]
//     bool   param [numel] moves where mask is true; offsets[c] counts the true ones before chunk c
//            of 1024, so that states are packed and chunks that are all true or all false are not
//            looked at again. No mask: everything moves
//
// m and v are float32 and packed to the active entries. Every kernel does the same roundings in the
// same order and none of them fuses a multiplication with an addition, so all levels give the same
// bits, and so do all kinds of masks. Kernels run with denormals flushed to zero: a state that
// decays without a gradient would otherwise end up in them for good, where a step takes 20 to 30
// times as long (measured on torch's fused AdamW, which keeps them).
#pragma once

#include <math.h>

#include "../common/cpu_features.h"
#include "../common/parallel.h"
#include "../common/status.h"
#include "../common/types.h"

namespace nibblock {

enum class UpdateRule : int32_t { kAdamW = 0, kSgd = 1 };
enum class MaskKind : int32_t { kBlock = 0, kFlat = 1, kBool = 2 };

constexpr int64_t kMaskChunk = 1024;             // entries of a bool mask that share an offset
constexpr int64_t kUpdateTaskEntries = 1 << 14;  // 64 KB of float32: one task

struct UpdateTensor {
  void* param;         // [Z][B][B], or [numel]
  const void* grad;    // as param; flat: [nnz] if grad_packed
  Dtype type;          // of param and grad: kF32 or kBF16
  float* first;        // m of the active entries; null for SGD without momentum
  float* second;       // v; null for SGD
  int32_t* age;        // updates so far: [Z] for blocks, [1] else
  int64_t count;       // Z | nnz | numel
  int64_t first_task;  // tasks of the tensors before this one

  const int32_t* blocks;  // [Z][2], sorted and in range of the weight, if there is one
  void* weight;           // [n, k], rows `weight_stride` elements apart, or null
  int64_t weight_stride, n, k;
  Dtype weight_type;  // kF32 or kBF16

  const void* index;  // [nnz] strictly increasing, in [0, numel)
  int64_t numel;      // of param
  bool index64, grad_packed;

  const uint8_t* mask;     // [numel] of 0 and 1, or null: all active
  const int64_t* offsets;  // [ceil(numel / 1024) + 1]
};

struct UpdateParams {
  UpdateRule rule;
  MaskKind kind;
  const UpdateTensor* tensors;
  int64_t tensor_count, task_count;
  int64_t block;  // block: 16, 32, 64 or 128
  double lr, weight_decay;
  double beta1, beta2, eps;    // AdamW
  double momentum, dampening;  // SGD
  bool nesterov;
  float multiplier;
  bool stream;  // write the weight past the caches: it is larger than they are
  const Parallel* parallel;
};

struct UpdateKernel {
  const char* id;  // "masked_adamw_block.cpu.avx512.fused"
  Isa isa;
  const char* serves_text;
  Status (*run)(const UpdateParams& p);
};
struct UpdateTable {
  const UpdateKernel* rows;
  int count;
};
NB_API UpdateTable masked_update_table(UpdateRule rule, MaskKind kind);
// Runs the first row that the level in force allows, then advances the ages.
NB_API Status masked_update_run(const UpdateParams& p);

// Tasks of a tensor: blocks or entries of about 64 KB of float32 each, whatever the threads.
static inline int64_t update_task_blocks(int64_t block) {
  const int64_t count = kUpdateTaskEntries / (block * block);
  return count > 0 ? count : 1;
}
static inline int64_t update_tasks(MaskKind kind, int64_t block, int64_t count) {
  const int64_t step = kind == MaskKind::kBlock ? update_task_blocks(block) : kUpdateTaskEntries;
  return (count + step - 1) / step;
}

// The first tensor whose index is not strictly increasing inside [0, numel), or -1.
NB_API int64_t masked_bad_index(const UpdateParams& p);
// Whether blocks are strictly increasing (row block, then column block) inside rows x cols.
NB_API bool masked_blocks_ok(const int32_t* blocks, int64_t count, int64_t rows, int64_t cols);
// Whether offsets start at 0, end at `active` and grow by at most a chunk's entries.
NB_API bool masked_offsets_ok(const int64_t* offsets, int64_t numel, int64_t active);

// What an update of age `t` multiplies with: computed in float64, rounded to float32 once.
struct UpdateScalars {
  float multiplier, decay;  // decay: AdamW 1 - lr wd, SGD wd
  // AdamW: m = base + blend * (g - m), where base is m if `near`, g else: exact at beta1 = 0, too.
  float blend, beta2, rest2, root, step, eps;
  bool near;
  float momentum, rest, lr;  // SGD; rest = 1 - dampening
  bool decays, fresh, nesterov;
};

static inline UpdateScalars update_scalars(const UpdateParams& p, int64_t age) {
  UpdateScalars s = {};
  s.multiplier = p.multiplier;
  if (p.rule == UpdateRule::kAdamW) {
    const double t = static_cast<double>(age) + 1.0, weight = 1.0 - p.beta1;
    s.decay = static_cast<float>(1.0 - p.lr * p.weight_decay);
    s.near = weight < 0.5;
    s.blend = static_cast<float>(s.near ? weight : weight - 1.0);
    s.beta2 = static_cast<float>(p.beta2);
    s.rest2 = static_cast<float>(1.0 - p.beta2);
    s.root = static_cast<float>(1.0 / sqrt(1.0 - pow(p.beta2, t)));
    s.step = static_cast<float>(p.lr / (1.0 - pow(p.beta1, t)));
    s.eps = static_cast<float>(p.eps);
  } else {
    s.decay = static_cast<float>(p.weight_decay);
    s.decays = p.weight_decay != 0.0;
    s.momentum = static_cast<float>(p.momentum);
    s.rest = static_cast<float>(1.0 - p.dampening);
    s.lr = static_cast<float>(p.lr);
    s.fresh = age == 0;
    s.nesterov = p.nesterov;
  }
  return s;
}

// --- gradients -----------------------------------------------------------------------------------

// grad = mask ? grad * scale : 0 in place, and the sum of squares of the masked grads as they came.
struct GradTensor {
  void* grad;  // bool and norm: [rows] with cols = stride = 1; block: [rows, cols]
  Dtype type;  // kF32 or kBF16
  int64_t rows, cols, stride;
  const uint8_t* mask;    // bool: [rows], or null: all
  const int32_t* blocks;  // block: [count][2], sorted
  int64_t count;
  int64_t first_task;
};
struct GradParams {
  bool blocks;  // block masks, else bool masks
  const GradTensor* tensors;
  int64_t tensor_count, task_count;
  int64_t block;
  bool write;  // false: only the sums
  float scale;
  double* sums;  // [task_count], or null: no sums
  const Parallel* parallel;
};
struct GradKernel {
  const char* id;  // "masked_grad_bool.cpu.avx512.stream"
  Isa isa;
  const char* serves_text;
  Status (*run)(const GradParams& p);
};
struct GradTable {
  const GradKernel* rows;
  int count;
};
enum class GradOp : int32_t { kBool = 0, kBlock = 1, kNorm = 2 };
NB_API GradTable masked_grad_table(GradOp op);
NB_API Status masked_grad_run(GradOp op, const GradParams& p);
// A task is 2^14 entries, or one row of blocks.
static inline int64_t grad_tasks(bool blocks, int64_t block, int64_t rows) {
  const int64_t step = blocks ? block : kUpdateTaskEntries;
  return (rows + step - 1) / step;
}

// values_z = origin_z + (values_z - origin_z) * max(0, 1 - t_z / ||values_z - origin_z||_F)
struct ProxTensor {
  void* values;             // [count][size]
  const void* origin;       // as values, or null: zeros
  const float* thresholds;  // [count]
  float* norms;             // [count], after the step
  Dtype type;
  int64_t count, size;
  int64_t first_task;  // a task is a block
};
struct ProxParams {
  const ProxTensor* tensors;
  int64_t tensor_count, task_count;
  const Parallel* parallel;
};
struct ProxKernel {
  const char* id;  // "prox_blocks.cpu.avx512.stream"
  Isa isa;
  const char* serves_text;
  Status (*run)(const ProxParams& p);
};
struct ProxTable {
  const ProxKernel* rows;
  int count;
};
NB_API ProxTable prox_blocks_table();
NB_API Status prox_blocks_run(const ProxParams& p);

// --- what the kernel files share -----------------------------------------------------------------

// Calls f(tensor, task of that tensor) for the tasks [begin, end) of a list.
template <class T, class F>
static inline void each_task(const T* tensors, int64_t count, int64_t begin, int64_t end, F&& f) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (tensors[middle].first_task <= begin ? low : high) = middle;
  }
  for (int64_t task = begin; task < end; ++task) {
    while (low + 1 < count && tensors[low + 1].first_task <= task) ++low;
    f(tensors[low], task - tensors[low].first_task);
  }
}

// Below this many tasks the threads cost more than they save.
static inline const Parallel& worth_tasks(const Parallel* parallel, int64_t tasks) {
  static const Parallel kAlone = {nullptr, 1};
  return tasks < 3 ? kAlone : *parallel;
}

Status masked_update_scalar(const UpdateParams& p);
Status masked_update_avx2(const UpdateParams& p);
Status masked_update_avx512(const UpdateParams& p);
Status masked_grad_scalar(const GradParams& p);
Status masked_grad_avx2(const GradParams& p);
Status masked_grad_avx512(const GradParams& p);
Status prox_blocks_scalar(const ProxParams& p);
Status prox_blocks_avx2(const ProxParams& p);
Status prox_blocks_avx512(const ProxParams& p);

}  // namespace nibblock
