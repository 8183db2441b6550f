// The instantiations of the tile kernel, one file for each element type and width of code
// (cuda_tile_sm90a_<type>_<bits>.cu); compiled for 9.0a alone. The launcher sees plain facts.
#pragma once

namespace nibblock {
namespace cuda {

constexpr int kTileTokens[] = {64, 128};

struct TileKernel {
  const void* function;  // of one TileParams
  int shared_bytes, tokens, slot_floats;
};
// [affine][index into kTileTokens], and the kernel of one XSumParams.
struct TileKernels {
  TileKernel row[2][2];
  const void* x_sums;
};

TileKernels tile_kernels_bf16_4();
TileKernels tile_kernels_bf16_8();
TileKernels tile_kernels_f16_4();
TileKernels tile_kernels_f16_8();

}  // namespace cuda
}  // namespace nibblock

#ifdef __CUDACC__
#include "cuda_tile_body.cuh"

namespace nibblock {
namespace cuda {

template <class T, class Shape>
__global__ void __launch_bounds__(kTileThreads, 1) int4_tile(const __grid_constant__ TileParams p) {
  extern __shared__ uint8_t anywhere[];
  const uint32_t behind = shared_address(anywhere) % kSwizzleBytes;
  tile_body<T, Shape>(p, anywhere + (behind ? kSwizzleBytes - behind : 0),
                      static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x));
}

template <class T>
__global__ void __launch_bounds__(256) int4_tile_x_sums(const __grid_constant__ XSumParams p) {
  x_sum_body<T>(p, static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x);
}

template <class T, int kCount, int kBits, bool kAffine>
TileKernel tile_kernel() {
  using Shape = TileShape<kCount, kBits, kAffine>;
  return {reinterpret_cast<const void*>(&int4_tile<T, Shape>), Shape::launch_bytes, kCount,
          Shape::slot_floats};
}

template <class T, int kBits>
TileKernels tile_kernels() {
  return {{{tile_kernel<T, 64, kBits, false>(), tile_kernel<T, 128, kBits, false>()},
           {tile_kernel<T, 64, kBits, true>(), tile_kernel<T, 128, kBits, true>()}},
          reinterpret_cast<const void*>(&int4_tile_x_sums<T>)};
}

}  // namespace cuda
}  // namespace nibblock
#endif
