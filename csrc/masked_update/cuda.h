// Masked optimiser steps of packed blocks on CUDA devices: the C interface of cuda.cu. Torch-free
// and free of CUDA headers. Nothing here allocates, synchronises or changes the current device.
#pragma once

#include "masked_update.h"

namespace nibblock {

// A row of the table. `proven` says that it has run on a GPU and its result file is committed;
// until then only a forced call takes it.
struct MaskedCudaKernel {
  const char* id;  // "masked_adamw_block.cuda.sm80.list"
  const char* serves_text;
  UpdateRule rule;
  bool proven;
};
struct MaskedCudaTable {
  const MaskedCudaKernel* rows;
  int count;
};
NB_API MaskedCudaTable masked_block_cuda_table();

// One step of block masks on a cudaStream_t of the current device; returns at once. All pointers of
// p.tensors are on the device. Of p, `multiplier` is 1 or -1 (maximise); the other factor and
// found_inf are read on the device, from one float32 each, or null. first_task, task_count, stream
// and parallel are not looked at. A list of more than 44 tensors of one type takes several
// launches.
//
// forced_id names a row, or is null for the one of p.rule. kNotServed: another kind of mask, a
// weight or list too large for 32 bits. kDeviceTooOld: compute capability below 8.0. kDeviceError:
// *device_error is CUDA's own code.
NB_API Status masked_block_cuda_run(const UpdateParams& p, const float* multiplier,
                                    const float* found_inf, const char* forced_id, void* stream,
                                    int* device_error);

// CUDA's words for a device_error.
NB_API const char* masked_cuda_error_text(int device_error);

}  // namespace nibblock
