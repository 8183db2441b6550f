// The few instructions that CUDA kernels use beyond plain C++, one function each: asynchronous
// copies into shared memory, the tensor cores' m16n8k16 product, packed 16-bit arithmetic.
//
// A kernel body written against these functions compiles twice: by nvcc into the kernel, and by g++
// with NIBBLOCK_EMULATE_CUDA against a software model (cuda_emulation.h) that runs every thread of
// a block, checks every address, finds races, and needs no GPU. So bodies hold no CUDA built-ins:
// they take the block and thread number and the shared memory as arguments.
//
// Source of every instruction's meaning: NVIDIA's PTX ISA manual, sections cp.async, mma
// (fragments of .m16n8k16), fma and ld. Everything here exists from sm_80 on.
#pragma once

#include <stdint.h>

namespace nibblock {
namespace cuda {

struct alignas(16) Words4 {
  uint32_t w[4];
};
struct alignas(16) Floats4 {
  float f[4];
};

// The two 16-bit element types of the tensor cores, by the bits that the kernels need.
struct BFloat16 {
  static constexpr uint32_t kOnes = 0x3f803f80u;  // the pair (1, 1)
  static constexpr bool kIsBF16 = true;
};
struct Float16 {
  static constexpr uint32_t kOnes = 0x3c003c00u;
  static constexpr bool kIsBF16 = false;
};

}  // namespace cuda
}  // namespace nibblock

#ifdef NIBBLOCK_EMULATE_CUDA
#include "cuda_emulation.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda_host_device.h"

#define NB_DEVICE __device__ __forceinline__

namespace nibblock {
namespace cuda {

NB_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes to shared memory behind the thread's back; source bytes from `bytes` on are not
// read and arrive as zeros. Both addresses are multiples of 16 (of 8 for copy_async_8).
NB_DEVICE void copy_async_16(uint8_t* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}
NB_DEVICE void copy_async_8(uint8_t* shared, const void* global, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}

// The same for bytes that no block reads again: the L2 cache gives them up first, and keeps what is
// read often. `policy` comes from once_policy().
NB_DEVICE uint64_t once_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
NB_DEVICE void copy_async_16_once(uint8_t* shared, const void* global, int bytes, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "l"(policy)
               : "memory");
}

// Closes the group of copies this thread has begun; waits until at most `kPending` groups of this
// thread are unfinished.
NB_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
NB_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

NB_DEVICE void sync_block() { __syncthreads(); }
// Brings a warp's lanes together again behind a branch that only some of them took: products of a
// warp need all 32 at one instruction, and the hardware does not promise that by itself.
NB_DEVICE void sync_warp() { __syncwarp(); }

// c[16 x 8] += a[16 x 16] b[16 x 8], float32 sums. Lane 4g + t holds
//     a: rows g, g + 8, g, g + 8; columns 2t, 2t + 1 (first two) and 2t + 8, 2t + 9 (last two)
//     b: column g; rows 2t, 2t + 1 and 2t + 8, 2t + 9
//     c: row g columns 2t, 2t + 1; row g + 8 columns 2t, 2t + 1
template <class T>
NB_DEVICE void multiply_add_tile(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (T::kIsBF16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
                 "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, "
                 "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// a * b + c on both 16-bit halves, rounded once.
template <class T>
NB_DEVICE uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  if constexpr (T::kIsBF16) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  }
  return d;
}

NB_DEVICE float fma_float(float a, float b, float c) { return fmaf(a, b, c); }

template <class T>
NB_DEVICE uint16_t round_to(float v) {
  if constexpr (T::kIsBF16) return __bfloat16_as_ushort(__float2bfloat16_rn(v));
  return __half_as_ushort(__float2half_rn(v));
}
template <class T>
NB_DEVICE float widen(uint16_t bits) {
  if constexpr (T::kIsBF16) return __bfloat162float(__ushort_as_bfloat16(bits));
  return __half2float(__ushort_as_half(bits));
}

template <class V>
NB_DEVICE V load_shared(const uint8_t* shared) {
  return *reinterpret_cast<const V*>(shared);
}
template <class V>
NB_DEVICE void store_shared(uint8_t* shared, const V& v) {
  *reinterpret_cast<V*>(shared) = v;
}
template <class V>
NB_DEVICE V load_global(const V* p) {
  return *p;
}
template <class V>
NB_DEVICE void store_global(V* p, const V& v) {
  *p = v;
}

// Partial sums that another block wrote during this launch: from the L2 cache, never from L1.
NB_DEVICE Floats4 load_others(const Floats4* p) {
  const float4 v = __ldcg(reinterpret_cast<const float4*>(p));
  return Floats4{{v.x, v.y, v.z, v.w}};
}

// Counts an arrival and returns how many came before; what a thread wrote before fence() is seen by
// whoever sees its arrival and calls fence() itself.
NB_DEVICE void fence() { __threadfence(); }
NB_DEVICE int count_arrival(int32_t* counter) { return atomicAdd(counter, 1); }

}  // namespace cuda
}  // namespace nibblock
#endif
