// block_weight_grad on CUDA devices: kernels, table, plan, launch.
#include "cuda.h"

#include <cuda_runtime_api.h>
#include <string.h>

#include "cuda_weight_grad_body.cuh"

namespace nibblock {
namespace {

using namespace cuda;

constexpr WeightGradCudaKernel kRows[] = {
    {"block_weight_grad.cuda.sm80.b32", "blocks of 32, bfloat16 or float16", 32, false},
    {"block_weight_grad.cuda.sm80.b64", "blocks of 64, bfloat16 or float16", 64, false},
    {"block_weight_grad.cuda.sm80.b128", "blocks of 128, bfloat16 or float16", 128, false},
};

// 64 KiB of shared memory each: two or three on a multiprocessor, as registers allow.
template <class T, class Shape>
__global__ void __launch_bounds__(Shape::threads, 2)
    block_weight_grad(const __grid_constant__ GradParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  weight_grad_body<T, Shape>(p, shared, static_cast<int>(blockIdx.x),
                             static_cast<int>(threadIdx.x));
}

struct Kernel {
  const void* function;
  int threads, run, slot;
};
template <class T, int kBlock>
Kernel kernel_of() {
  using Shape = GradShape<kBlock>;
  return {reinterpret_cast<const void*>(&block_weight_grad<T, Shape>), Shape::threads, Shape::run,
          Shape::slot};
}
template <class T>
Kernel kernel_of(int64_t block) {
  return block == 32 ? kernel_of<T, 32>() : block == 64 ? kernel_of<T, 64>() : kernel_of<T, 128>();
}
Kernel kernel_of(const WeightGradCudaParams& p) {
  return p.gtype == Dtype::kBF16 ? kernel_of<BFloat16>(p.block) : kernel_of<Float16>(p.block);
}

// Stages may look past the end before they see that they do.
bool fits_int32(int64_t v) { return v >= 0 && v < (int64_t(1) << 31) - 4096; }

bool serves(const WeightGradCudaKernel& row, const WeightGradCudaParams& p) {
  return p.block == row.block && p.gtype != Dtype::kF32 && fits_int32(p.m) && fits_int32(p.n) &&
         fits_int32(p.k) && fits_int32(p.count) && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
}

}  // namespace

WeightGradCudaTable weight_grad_cuda_table() {
  return {kRows, static_cast<int>(sizeof(kRows) / sizeof(kRows[0]))};
}

Status weight_grad_cuda_plan(const WeightGradCudaParams& p, const char* forced_id,
                             WeightGradCudaPlan* plan) {
  *plan = WeightGradCudaPlan{};
  int device = 0, major = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (!e) e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (e) {
    plan->device_error = e;
    return kDeviceError;
  }
  if (major < 8) return kDeviceTooOld;
  bool known = !forced_id;
  for (const WeightGradCudaKernel& row : kRows) {
    if (forced_id && strcmp(forced_id, row.id) != 0) continue;
    known = true;
    if (!serves(row, p)) continue;
    const Kernel k = kernel_of(p);
    const int64_t runs = (p.count + k.run - 1) / k.run;
    const GradSplit split = grad_split(runs, p.m);
    if (!fits_int32(runs * split.parts)) continue;
    plan->kernel = &row;
    plan->split = split;
    plan->runs = static_cast<int32_t>(runs);
    if (split.parts > 1) {
      plan->partial_bytes = split.parts * runs * k.slot * static_cast<int64_t>(sizeof(Floats4));
      plan->counters = runs;
    }
    return kOk;
  }
  return known ? kNotServed : kUnknownKernel;
}

Status weight_grad_cuda_run(const WeightGradCudaParams& p, WeightGradCudaPlan* plan, void* partials,
                            int32_t* counters, void* stream) {
  if (plan->runs == 0) return kOk;
  const Kernel k = kernel_of(p);
  GradParams q = {};
  q.g = static_cast<const uint16_t*>(p.g);
  q.x = static_cast<const uint16_t*>(p.x);
  q.g_stride = p.g_stride;
  q.x_stride = p.x_stride;
  q.out = p.out;
  q.partials = static_cast<Floats4*>(partials);
  q.counters = counters;
  q.row_ptr = p.row_ptr;
  q.col = p.col;
  q.m = static_cast<int32_t>(p.m);
  q.n = static_cast<int32_t>(p.n);
  q.k = static_cast<int32_t>(p.k);
  q.count = static_cast<int32_t>(p.count);
  q.block_rows = static_cast<int32_t>((p.n + p.block - 1) / p.block);
  q.runs = plan->runs;
  // One row needs no stride.
  q.g_aligned = reinterpret_cast<uintptr_t>(p.g) % 16 == 0 && (p.g_stride % 8 == 0 || p.m == 1);
  q.x_aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && (p.x_stride % 8 == 0 || p.m == 1);
  q.out_type = static_cast<int32_t>(p.out_type);
  q.split = plan->split;
  void* arguments[] = {&q};
  // More than 48 KiB of shared memory needs permission, once for each device; asking is cheap.
  cudaError_t e = cudaFuncSetAttribute(k.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       kGradSharedBytes);
  if (!e) {
    e = cudaLaunchKernel(k.function, dim3(q.runs * q.split.parts), dim3(k.threads), arguments,
                         kGradSharedBytes, static_cast<cudaStream_t>(stream));
  }
  if (e) {
    (void)cudaGetLastError();  // ours to report; the next caller's check must not see it
    plan->device_error = e;
    return kDeviceError;
  }
  return kOk;
}

bool weight_grad_cuda_capture(void* stream, unsigned long long* id, int* device_error) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  *id = 0;
  const cudaError_t e = cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, id);
  if (e) (void)cudaGetLastError();
  if (status != cudaStreamCaptureStatusActive) *id = 0;
  *device_error = e;
  return !e;
}

const char* weight_grad_cuda_error_text(int device_error) {
  return cudaGetErrorString(static_cast<cudaError_t>(device_error));
}

}  // namespace nibblock

// The rows for Python, which reads them without torch: false behind the last one.
extern "C" NB_API bool nibblock_cuda_weight_grad_row(int index, const char** id,
                                                     const char** serves, int* proven) {
  const nibblock::WeightGradCudaTable t = nibblock::weight_grad_cuda_table();
  if (index < 0 || index >= t.count) return false;
  *id = t.rows[index].id;
  *serves = t.rows[index].serves_text;
  *proven = t.rows[index].proven;
  return true;
}
