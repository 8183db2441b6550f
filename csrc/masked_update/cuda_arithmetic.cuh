// float32 arithmetic of the masked updates, one rounding an operation: to nearest, operands and
// results below 2^-126 as zeros of their sign. That is what the CPU's kernels do
// (common/flush_denormals.h), so the same operations in the same order give the same bits. Two
// things differ: a NaN has the GPU's one pattern, and a result that only rounding lifts to 2^-126
// may be flushed on one of them. An explicit .rn keeps the compiler from contracting a product and
// a sum.
//
// Source: NVIDIA's PTX ISA manual, sections add, sub, mul, div and sqrt.
#pragma once

#include "../common/cuda_common.cuh"

#ifdef NIBBLOCK_EMULATE_CUDA
#include <math.h>

namespace nibblock {
namespace cuda {

// The test runs with denormals flushed (FlushDenormals) and without contraction.
inline float add_flush(float a, float b) { return a + b; }
inline float sub_flush(float a, float b) { return a - b; }
inline float mul_flush(float a, float b) { return a * b; }
inline float div_flush(float a, float b) { return a / b; }
inline float sqrt_flush(float a) { return sqrtf(a); }
inline double power(double a, double b) { return pow(a, b); }
inline double root(double a) { return sqrt(a); }

}  // namespace cuda
}  // namespace nibblock
#else
namespace nibblock {
namespace cuda {

NB_DEVICE float add_flush(float a, float b) {
  float d;
  asm("add.rn.ftz.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
NB_DEVICE float sub_flush(float a, float b) {
  float d;
  asm("sub.rn.ftz.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
NB_DEVICE float mul_flush(float a, float b) {
  float d;
  asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
NB_DEVICE float div_flush(float a, float b) {
  float d;
  asm("div.rn.ftz.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
NB_DEVICE float sqrt_flush(float a) {
  float d;
  asm("sqrt.rn.ftz.f32 %0, %1;" : "=f"(d) : "f"(a));
  return d;
}
// Within 2 ulp of float64; then a difference and a rounding to float32 follow, which almost always
// gives what the CPU's pow gives.
NB_DEVICE double power(double a, double b) { return pow(a, b); }
NB_DEVICE double root(double a) { return sqrt(a); }

}  // namespace cuda
}  // namespace nibblock
#endif
