// The instructions that kernels for compute capability 9.0a use beyond cuda_common.cuh, one
// function each: barriers in shared memory that count bytes, bulk and tensor copies that complete
// on them, the tensor cores' product of a warpgroup, and moving registers between warpgroups.
//
// As there, a body written against these functions also compiles for g++, against the software
// model in cuda_emulation_sm90a.h.
//
// Source of every instruction's meaning: NVIDIA's PTX ISA manual, sections mbarrier,
// cp.async.bulk, cp.async.bulk.tensor, wgmma (fragments of .m64nNk16, matrix descriptors) and
// setmaxnreg.
#pragma once

#include "cuda_common.cuh"

namespace nibblock {
namespace cuda {

struct alignas(8) Words2 {
  uint32_t w[2];
};
struct alignas(8) Floats2 {
  float f[2];
};

// A tensor map as the driver encodes it; its content is the driver's own.
struct alignas(64) TensorMap {
  uint8_t bytes[128];
};

}  // namespace cuda
}  // namespace nibblock

#ifdef NIBBLOCK_EMULATE_CUDA
#include "cuda_emulation_sm90a.h"
#else

namespace nibblock {
namespace cuda {

// A value that is the same in all lanes, known as such to the compiler: a product of a warpgroup
// must not stand behind a branch that could part them.
NB_DEVICE int same_in_warp(int v) { return __shfl_sync(0xffffffffu, v, 0); }

// --- barriers that count arrivals and bytes ------------------------------------------------------

// A phase ends when `arrivals` have arrived and every expected byte has come. barrier_wait(parity)
// returns once the phase of that parity is over; on a fresh barrier parity 1 is over already.
NB_DEVICE void barrier_init(uint8_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// Makes fresh barriers known to the copy engine; sync_block() tells the other threads.
NB_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n"
               "fence.proxy.async.shared::cta;" ::
                   : "memory");
}
NB_DEVICE void barrier_arrive(uint8_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
NB_DEVICE void barrier_arrive_expect(uint8_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
NB_DEVICE void barrier_wait(uint8_t* barrier, uint32_t parity) {
  uint32_t over;
  do {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.b32 %0, 1, 0, p;\n"
                 "}"
                 : "=r"(over)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (!over);
}

// A barrier of `threads` threads (whole warps) under a number of its own, 1 to 15; 0 is
// sync_block's.
NB_DEVICE void sync_threads(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// --- copies into shared memory that complete on a barrier ----------------------------------------

// `bytes`, `global` and `shared` are multiples of 16.
NB_DEVICE void copy_bulk(uint8_t* shared, const void* global, int bytes, uint8_t* barrier,
                         uint64_t policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
               "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
               : "memory");
}
// For bytes that other blocks read too.
NB_DEVICE uint64_t shared_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// One box of a two-dimensional tensor map that begins at element `column` of row `row`; what lies
// outside the tensor arrives as zeros and counts as bytes.
NB_DEVICE void copy_box(uint8_t* shared, const TensorMap* map, int column, int row,
                        uint8_t* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
               "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
               : "memory");
}

// --- products of a warpgroup ---------------------------------------------------------------------

// d[64 x kN] = a[64 x 16] b[16 x kN], plus d if `keep`; float32 sums; begun here, finished at a
// wait_products. Warp w of the warpgroup has rows 16w on of a and d. Lane 4g + t holds
//     a: as in multiply_add_tile
//     d: rows g (elements 4j, 4j + 1) and g + 8 (4j + 2, 4j + 3), columns 8j + 2t, 8j + 2t + 1
// b is [kN][16] in shared memory, where its matrix descriptor says.
#define NB_NAMES_32                                                                                \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"     \
  "%25,%26,%27,%28,%29,%30,%31"
#define NB_NAMES_64                                                                                \
  NB_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,"      \
              "%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define NB_SUMS_8(i)                                                                               \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),      \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define NB_SUMS_32(i) NB_SUMS_8(i), NB_SUMS_8(i + 8), NB_SUMS_8(i + 16), NB_SUMS_8(i + 24)
#define NB_BEGIN_PRODUCT(SHAPE, TYPE, NAMES, REST)                                                 \
  "{\n"                                                                                            \
  ".reg .pred p;\n"                                                                                \
  "setp.ne.b32 p, " REST ", 0;\n"                                                                  \
  "wgmma.mma_async.sync.aligned." SHAPE "k16.f32." TYPE "." TYPE " {" NAMES "}, "
#define NB_PRODUCT_32(TYPE)                                                                        \
  asm volatile(NB_BEGIN_PRODUCT("m64n64", TYPE, NB_NAMES_32,                                       \
                                "%37") "{%32,%33,%34,%35}, %36, p, 1, 1, 0;\n}"                    \
               : NB_SUMS_32(0)                                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep)                     \
               : "memory")
#define NB_PRODUCT_64(TYPE)                                                                        \
  asm volatile(NB_BEGIN_PRODUCT("m64n128", TYPE, NB_NAMES_64,                                      \
                                "%69") "{%64,%65,%66,%67}, %68, p, 1, 1, 0;\n}"                    \
               : NB_SUMS_32(0), NB_SUMS_32(32)                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep)                     \
               : "memory")

template <class T>
NB_DEVICE void begin_product(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int keep) {
  if constexpr (T::kIsBF16) {
    NB_PRODUCT_32("bf16");
  } else {
    NB_PRODUCT_32("f16");
  }
}
template <class T>
NB_DEVICE void begin_product(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int keep) {
  if constexpr (T::kIsBF16) {
    NB_PRODUCT_64("bf16");
  } else {
    NB_PRODUCT_64("f16");
  }
}
#undef NB_NAMES_32
#undef NB_NAMES_64
#undef NB_SUMS_8
#undef NB_SUMS_32
#undef NB_BEGIN_PRODUCT
#undef NB_PRODUCT_32
#undef NB_PRODUCT_64

// Before the first product, and whenever registers that one uses were written by anything else.
NB_DEVICE void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes the group of products begun so far; waits until at most kPending groups are unfinished.
NB_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
NB_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Waits for all. The sums pass through, so that no use of them moves ahead of the wait.
template <int kCount>
NB_DEVICE void finish_products(float (&d)[kCount]) {
  wait_products<0>();
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// --- registers -----------------------------------------------------------------------------------

// Gives registers back / asks for more: kCount for each thread, by all threads of a warpgroup.
template <int kCount>
NB_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
NB_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace cuda
}  // namespace nibblock
#endif
