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

// [adapter][affine][index into kTokenTiles]. Adapters ride on 4 bits and up to 32 rows of x at a
// time: beyond, registers run out. What does not exist has no function.
struct DecodeKernels {
  DecodeKernel row[2][2][4];
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

template <class T, int kBits, bool kAffine, bool kAdapter>
void fill(DecodeKernel (&row)[4]) {
  row[0] = decode_kernel<T, DecodeShape<1, kBits, kAffine, kAdapter>>();
  row[1] = decode_kernel<T, DecodeShape<2, kBits, kAffine, kAdapter>>();
  row[2] = decode_kernel<T, DecodeShape<4, kBits, kAffine, kAdapter>>();
  if constexpr (!kAdapter) row[3] = decode_kernel<T, DecodeShape<8, kBits, kAffine>>();
}

template <class T, int kBits>
DecodeKernels decode_kernels() {
  DecodeKernels k = {};
  fill<T, kBits, false, false>(k.row[0][0]);
  fill<T, kBits, true, false>(k.row[0][1]);
  if constexpr (kBits == 4) {
    fill<T, kBits, false, true>(k.row[1][0]);
    fill<T, kBits, true, true>(k.row[1][1]);
  }
  return k;
}

}  // namespace cuda
}  // namespace nibblock
#endif
