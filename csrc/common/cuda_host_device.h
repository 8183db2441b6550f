// Functions that both nvcc and g++ compile: layout maps and schedules that the kernels run and the
// tests check on the CPU. No CUDA headers.
#pragma once

#ifdef __CUDACC__
#define NB_HD __host__ __device__ __forceinline__
#else
#define NB_HD static inline
#endif
