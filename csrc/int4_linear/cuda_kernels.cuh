// The instantiations of the decode kernel: one file for each element type and width of code
// (cuda_decode_<type>_<bits>.cu), so that they compile side by side. The launcher sees them as rows
// of plain facts.
#pragma once

#include <stdint.h>

namespace nibblock {
namespace cuda {

constexpr int kTokenTiles[] = {1, 2, 4, 8};

struct DecodeKernel {
  const void* function;  // of one DecodeParams
  int shared_bytes, threads, rows, tokens, slot_floats;
};

// [affine][index into kTokenTiles]
struct DecodeKernels {
  DecodeKernel row[2][4];
};

DecodeKernels decode_kernels_bf16_4();
DecodeKernels decode_kernels_bf16_8();
DecodeKernels decode_kernels_f16_4();
DecodeKernels decode_kernels_f16_8();

}  // namespace cuda
}  // namespace nibblock

#ifdef __CUDACC__
#include "cuda_decode_body.cuh"

namespace nibblock {
namespace cuda {

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::threads, 1)
    int4_decode(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  decode_body<T, Shape>(p, shared, static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x),
                        once_policy());
}

template <class T, class Shape>
DecodeKernel decode_kernel() {
  return {reinterpret_cast<const void*>(&int4_decode<T, Shape>),
          Shape::shared_bytes,
          Shape::threads,
          Shape::rows,
          Shape::tokens,
          Shape::slot_floats};
}

template <class T, int kBits>
DecodeKernels decode_kernels() {
  return {{{decode_kernel<T, DecodeShape<1, kBits, false>>(),
            decode_kernel<T, DecodeShape<2, kBits, false>>(),
            decode_kernel<T, DecodeShape<4, kBits, false>>(),
            decode_kernel<T, DecodeShape<8, kBits, false>>()},
           {decode_kernel<T, DecodeShape<1, kBits, true>>(),
            decode_kernel<T, DecodeShape<2, kBits, true>>(),
            decode_kernel<T, DecodeShape<4, kBits, true>>(),
            decode_kernel<T, DecodeShape<8, kBits, true>>()}}};
}

}  // namespace cuda
}  // namespace nibblock
#endif
