// masked_update on CUDA devices: kernels of packed blocks, table, launches.
#include "cuda.h"

#include <cuda_runtime_api.h>
#include <string.h>

#include "cuda_block_body.cuh"
#include "cuda_block_list.h"

namespace nibblock {
namespace {

using namespace cuda;

constexpr MaskedCudaKernel kRows[] = {
    {"masked_adamw_block.cuda.sm80.list", "any call", UpdateRule::kAdamW, false},
    {"masked_sgd_block.cuda.sm80.list", "any call", UpdateRule::kSgd, false},
};

// At most 64 registers: 1024 threads on a multiprocessor then have 96 KiB on their way.
template <class P, class R>
__global__ void __launch_bounds__(kStepThreads, 2)
    masked_block_step(const __grid_constant__ StepParams p) {
  __shared__ __align__(16) uint8_t shared[kStepSharedBytes];
  step_body<P, R>(p, shared, static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x));
}

template <class P>
const void* kernel_of(const UpdateParams& p) {
  if (p.rule == UpdateRule::kAdamW) {
    return reinterpret_cast<const void*>(&masked_block_step<P, AdamWStep>);
  }
  if (p.momentum != 0.0) {
    return reinterpret_cast<const void*>(&masked_block_step<P, SgdStep<true>>);
  }
  return reinterpret_cast<const void*>(&masked_block_step<P, SgdStep<false>>);
}

}  // namespace

MaskedCudaTable masked_block_cuda_table() {
  return {kRows, static_cast<int>(sizeof(kRows) / sizeof(kRows[0]))};
}

Status masked_block_cuda_run(const UpdateParams& p, const float* multiplier, const float* found_inf,
                             const char* forced_id, void* stream, int* device_error) {
  *device_error = 0;
  bool known = !forced_id, serves = false;
  for (const MaskedCudaKernel& row : kRows) {
    if (forced_id && strcmp(forced_id, row.id) != 0) continue;
    known = true;
    serves = serves || row.rule == p.rule;
  }
  if (!known) return kUnknownKernel;
  if (!serves || !step_serves(p)) return kNotServed;
  int device = 0, major = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (!e) e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (!e && major < 8) return kDeviceTooOld;

  StepParams q = step_params(p, multiplier, found_inf);
  for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
    if (e) break;
    const void* kernel = type == Dtype::kF32 ? kernel_of<Float32>(p) : kernel_of<BFloat16>(p);
    e = static_cast<cudaError_t>(step_launches(p, type, q, [&](StepParams& part, int tasks) {
      void* arguments[] = {&part};
      return static_cast<int>(cudaLaunchKernel(kernel, dim3(tasks), dim3(step_threads(part.shift)),
                                               arguments, 0, static_cast<cudaStream_t>(stream)));
    }));
  }
  if (e) {
    (void)cudaGetLastError();  // ours to report; the next caller's check must not see it
    *device_error = e;
    return kDeviceError;
  }
  return kOk;
}

const char* masked_cuda_error_text(int device_error) {
  return cudaGetErrorString(static_cast<cudaError_t>(device_error));
}

}  // namespace nibblock

// The rows for Python, which reads them without torch: false behind the last one.
extern "C" NB_API bool nibblock_cuda_masked_row(int index, const char** id, const char** serves,
                                                int* proven) {
  const nibblock::MaskedCudaTable t = nibblock::masked_block_cuda_table();
  if (index < 0 || index >= t.count) return false;
  *id = t.rows[index].id;
  *serves = t.rows[index].serves_text;
  *proven = t.rows[index].proven;
  return true;
}
