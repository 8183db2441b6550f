// int4_linear on CUDA devices: the C interface of cuda*.cu. Torch-free and free of CUDA headers, so
// that the glue needs neither. Nothing here allocates, synchronises or changes the current device.
#pragma once

#include "cuda_decode.h"
#include "int4_linear.h"

namespace nibblock {

// One forward call on the current device. x and y are bfloat16 or float16, rows contiguous along
// their last dimension; nothing is assumed about the alignment of y and bias, nor, by the rows for
// few rows of x, about x.
struct Int4CudaParams {
  Int4Format w;
  const uint8_t* packed;  // int4_geometry(w).bytes, begins at a multiple of 16
  int64_t m;
  const void* x;
  int64_t x_stride;  // elements
  void* y;
  int64_t y_stride;
  Dtype xtype;
  const void* bias;  // [n] bias_type, or null
  Dtype bias_type;
  // A block-sparse adapter that is added (codes of 4 bits, blocks of 32, 64 or 128), or null.
  const void* values;      // [Z, block, block] value_type, begins at a multiple of 16
  const int32_t* row_ptr;  // on the device, as block_sparse_linear.h has them
  const int32_t* col;
  int64_t block;
  Dtype value_type;
};

// A row of the table: which kernel for how many rows of x. `proven` says that it has run on a GPU
// and its result file is committed; until then only a forced call takes it.
struct Int4CudaKernel {
  const char* id;
  const char* serves_text;
  int token_tiles;  // of 8 rows of x
  bool proven;
  bool sm90a;  // a tile kernel (cuda_tile.h): compute capability 9.0 alone, and only when forced
};
struct Int4CudaTable {
  const Int4CudaKernel* rows;
  int count;
};
NB_API Int4CudaTable int4_linear_cuda_table();

// What a call will do on the current device, before it does it.
struct Int4CudaPlan {
  const Int4CudaKernel* kernel;
  cuda::Schedule schedule;
  int64_t partial_bytes;  // of a workspace whose content does not matter
  int64_t x_sums_at;      // byte of it where the tile kernels keep sums of x
  int64_t counters;       // int32 that are zero before the launch, and after it
  int device;
  int capability;    // 90 for 9.0
  int device_error;  // CUDA's own code when the status is kDeviceError
};

// forced_id names a row, or is null for the first for decoding that serves. kNotServed: nothing
// serves the call (x of float32, more than 128 rows). kDeviceTooOld: compute capability below 8.0.
// kOtherDevice: the row is for 9.0 alone, and the device has another.
NB_API Status int4_linear_cuda_plan(const Int4CudaParams& p, const char* forced_id,
                                    Int4CudaPlan* plan);

// Launches on a cudaStream_t of the current device, and returns at once. Both workspaces stay in
// use until the stream has passed the launch; launches that may overlap need counters of their own.
NB_API Status int4_linear_cuda_run(const Int4CudaParams& p, Int4CudaPlan* plan, void* partials,
                                   int32_t* counters, void* stream);

// Which capture into a CUDA graph a stream takes part in; 0: none. False with *device_error.
NB_API bool int4_linear_cuda_capture(void* stream, unsigned long long* id, int* device_error);

// CUDA's words for a plan's device_error.
NB_API const char* int4_linear_cuda_error_text(int device_error);

// Registers, shared memory and blocks on one multiprocessor of each kernel on the current device:
// what a report prints. False where index names no kernel (it counts to 79, with gaps).
struct Int4CudaKernelFacts {
  const char* type;
  int bits, affine, adapter, token_tiles, registers, local_bytes, shared_bytes, threads,
      blocks_per_sm;
};
NB_API bool int4_linear_cuda_facts(int index, Int4CudaKernelFacts* facts);

}  // namespace nibblock
