// Tensor map and launches of the tile kernels. The driver's one function is asked for by name at
// run time: nothing links against the driver, so the library loads on machines without a GPU.
#include "cuda_tile_launch.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <string.h>

#include <atomic>

#include "cuda_tile_body.cuh"
#include "cuda_weight.h"

namespace nibblock {
namespace cuda {
namespace {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) == 64,
              "TensorMap stands for the driver's CUtensorMap");
static_assert(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 == 9 && CU_TENSOR_MAP_DATA_TYPE_FLOAT16 == 6 &&
                  CU_TENSOR_MAP_SWIZZLE_128B == 3,
              "tile_map() uses the driver's numbers");

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's cuTensorMapEncodeTiled; it is there from CUDA 12.0 on.
cudaError_t find_encode(Encode* encode) {
  static std::atomic<void*> known{nullptr};
  void* f = known.load(std::memory_order_acquire);
  if (!f) {
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000,
                                                           cudaEnableDefault, &found);
#else
    const cudaError_t e =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &found);
#endif
    if (e) return e;
    if (found != cudaDriverEntryPointSuccess || !f) return cudaErrorNotSupported;
    known.store(f, std::memory_order_release);
  }
  *encode = reinterpret_cast<Encode>(f);
  return cudaSuccess;
}

cudaError_t encode_map(const BoxMap& map, TensorMap* to) {
  Encode encode = nullptr;
  const cudaError_t e = find_encode(&encode);
  if (e) return e;
  CUtensorMap made;
  const cuuint64_t size[2] = {map.size[0], map.size[1]};
  const cuuint64_t stride[1] = {map.row_bytes};
  const cuuint32_t box[2] = {map.box[0], map.box[1]};
  const cuuint32_t every[2] = {1, 1};
  const CUresult done =
      encode(&made, static_cast<CUtensorMapDataType>(map.element), 2,
             const_cast<void*>(map.address), size, stride, box, every,
             CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(map.swizzle),
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (done != CUDA_SUCCESS) return cudaErrorInvalidValue;
  memcpy(to->bytes, &made, sizeof(made));
  return cudaSuccess;
}

}  // namespace

int launch_tile(const Int4CudaParams& p, const Int4CudaPlan& plan, const TileKernel& kernel,
                const void* x_sums, void* workspace, int32_t* counters, void* stream) {
  uint8_t* const bytes = static_cast<uint8_t*>(workspace);
  TileParams q = {};
  cudaError_t e = encode_map(
      tile_map(p.x, p.m, p.w.k, p.x_stride, kernel.tokens, p.xtype == Dtype::kBF16), &q.x);
  q.packed = p.packed;
  q.y = static_cast<uint16_t*>(p.y);
  q.bias = p.bias;
  q.partials = reinterpret_cast<Floats4*>(bytes);
  q.x_sums = reinterpret_cast<const float*>(bytes + plan.x_sums_at);
  q.counters = counters;
  set_weight(p.w, &q);
  q.y_stride = p.y_stride;
  q.m = static_cast<int32_t>(p.m);
  q.m_pad = plan.schedule.token_tiles * kernel.tokens;
  q.bias_type = static_cast<int32_t>(p.bias_type);
  q.y_aligned = reinterpret_cast<uintptr_t>(p.y) % 4 == 0 && (p.y_stride % 2 == 0 || p.m == 1);
  q.schedule = plan.schedule;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (!e && p.w.affine) {
    const int64_t slots = x_sum_slots(plan.schedule.chunks, q.shift);
    XSumParams s = {static_cast<const uint16_t*>(p.x),
                    reinterpret_cast<float*>(bytes + plan.x_sums_at),
                    p.x_stride,
                    q.m,
                    q.k,
                    q.m_pad,
                    static_cast<int32_t>(slots),
                    x_sum_shift(q.shift)};
    void* arguments[] = {&s};
    e = cudaLaunchKernel(x_sums, dim3(static_cast<unsigned>(ceil_div(slots * q.m_pad, 256))),
                         dim3(256), arguments, 0, on);
  }
  if (!e) {
    void* arguments[] = {&q};
    e = cudaLaunchKernel(kernel.function, dim3(plan.schedule.blocks), dim3(kTileThreads), arguments,
                         kernel.shared_bytes, on);
  }
  if (e) (void)cudaGetLastError();  // ours to report; the next caller's check must not see it
  return e;
}

}  // namespace cuda
}  // namespace nibblock
