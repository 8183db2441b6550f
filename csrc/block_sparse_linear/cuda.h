// block_weight_grad on CUDA devices: the C interface of cuda.cu. Torch-free and free of CUDA
// headers. Nothing here allocates, synchronises or changes the current device.
#pragma once

#include "block_sparse_linear.h"
#include "cuda_weight_grad.h"

namespace nibblock {

// One call on the current device. g and x have rows contiguous along their last dimension; nothing
// is assumed about their alignment. out begins at a multiple of 16.
struct WeightGradCudaParams {
  int64_t m, n, k, block, count;
  const void* g;  // [m, n] gtype: kBF16 or kF16
  int64_t g_stride;
  const void* x;  // [m, k] gtype
  int64_t x_stride;
  Dtype gtype;
  void* out;  // [count, block, block] out_type
  Dtype out_type;
  const int32_t* row_ptr;  // on the device, as block_sparse_linear.h has them
  const int32_t* col;
};

// A row of the table. `proven` says that it has run on a GPU and its result file is committed;
// until then only a forced call takes it.
struct WeightGradCudaKernel {
  const char* id;  // "block_weight_grad.cuda.sm80.b32"
  const char* serves_text;
  int block;
  bool proven;
};
struct WeightGradCudaTable {
  const WeightGradCudaKernel* rows;
  int count;
};
NB_API WeightGradCudaTable weight_grad_cuda_table();

// What a call will do on the current device, before it does it.
struct WeightGradCudaPlan {
  const WeightGradCudaKernel* kernel;
  cuda::GradSplit split;
  int32_t runs;
  int64_t partial_bytes;  // of a workspace whose content does not matter; 0: none
  int64_t counters;       // int32 that are zero before the launch, and after it; 0: none
  int device_error;       // CUDA's own code when the status is kDeviceError
};

// forced_id names a row, or is null for the first that serves. kNotServed: nothing serves the call
// (float32 operands, blocks of 16). kDeviceTooOld: compute capability below 8.0.
NB_API Status weight_grad_cuda_plan(const WeightGradCudaParams& p, const char* forced_id,
                                    WeightGradCudaPlan* plan);

// Launches on a cudaStream_t of the current device, and returns at once. Both workspaces stay in
// use until the stream has passed the launch; launches that may overlap need counters of their own.
NB_API Status weight_grad_cuda_run(const WeightGradCudaParams& p, WeightGradCudaPlan* plan,
                                   void* partials, int32_t* counters, void* stream);

// Which capture into a CUDA graph a stream takes part in; 0: none. False with *device_error.
NB_API bool weight_grad_cuda_capture(void* stream, unsigned long long* id, int* device_error);

// CUDA's words for a device_error.
NB_API const char* weight_grad_cuda_error_text(int device_error);

}  // namespace nibblock
