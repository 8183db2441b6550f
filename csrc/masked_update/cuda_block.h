// Masked optimiser steps of packed blocks on CUDA devices: what a launch is told, and which thread
// moves what. Plain functions that g++ compiles too; tests/cpp/cuda_masked.cpp runs them all.
//
// One launch serves a list of tensors. Their pointers come as kernel parameters (at most 4 KiB, so
// lists of more than kStepTensors take several launches): nothing is copied to the device, nothing
// is allocated, and a captured graph holds the pointers itself.
//
//     A thread moves 8 neighbouring entries of one row of a block: 16 bytes of bfloat16 or twice 16
//     of float32 in every stream. A thread block takes one block of 32, 64 or 128, or four of 16.
//     So exactly one thread block looks at an age and advances it: no second launch does.
#pragma once

#include <stdint.h>

#include "../common/cuda_host_device.h"

namespace nibblock {
namespace cuda {

constexpr int kLaneEntries = 8;
constexpr int kStepTensors = 44;      // of one launch
constexpr int kStepThreads = 512;     // at most, of one thread block
constexpr int kStepSharedBytes = 64;  // two coefficients of at most four blocks, rounded up

struct StepTensor {
  void* param;             // [Z][B][B]
  const void* grad;        // as param
  float *first, *second;   // [Z][B][B], as the rule has them
  int32_t* age;            // [Z]
  const int32_t* blocks;   // [Z][2], looked at where there is a weight
  void* weight;            // [n, k], or null
  int64_t weight_stride;   // elements
  int32_t n, k;            // of the weight
  int32_t count;           // Z
  int32_t first_task;      // tasks of the tensors before this one
  uint8_t weight_bf16;     // bfloat16, else float32
  uint8_t aligned;         // param, grad and states begin at multiples of 16
  uint8_t weight_aligned;  // weight and its row stride in bytes are multiples of 16
};

// Coefficients that an age does not change are rounded by the host (update_scalars()).
struct StepParams {
  StepTensor tensor[kStepTensors];
  const float* multiplier;  // one float32 on the device, or null
  const float* found_inf;   // as multiplier: nothing moves where it is not 0
  double lr, beta1, beta2;
  float sign, decay, blend, beta2_rounded, rest2, eps;  // sign: -1 maximises
  float momentum, rest, lr_rounded;
  int32_t tensors, shift;  // shift: log2 B
  uint8_t near, decays, nesterov;
};
static_assert(sizeof(StepParams) <= 4096, "kernel parameters");

// Threads of a thread block, blocks it takes, and how often a thread comes back.
NB_HD int step_threads(int shift) { return shift <= 5 ? 128 : kStepThreads; }
NB_HD int step_blocks(int shift) { return shift == 4 ? 4 : 1; }
NB_HD int step_passes(int shift) { return shift == 7 ? 4 : 1; }

NB_HD int32_t step_tasks(int shift, int64_t count) {
  return static_cast<int32_t>((count + step_blocks(shift) - 1) / step_blocks(shift));
}

// The tensor that a task belongs to: the last that begins at or before it.
NB_HD int step_tensor(const StepParams& p, int task) {
  int low = 0, high = p.tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (p.tensor[middle].first_task <= task) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Where a thread works: which of its task's blocks, and the first of its 8 entries in it.
struct Spot {
  int local, entry;
};
NB_HD Spot step_spot(int shift, int thread, int pass) {
  const int at = (pass * step_threads(shift) + thread) * kLaneEntries;
  return {at >> (2 * shift), at & ((1 << (2 * shift)) - 1)};
}

}  // namespace cuda
}  // namespace nibblock
