// The block-sparse AMX kernels over emulated tiles, as a library that tests/test_amx_blocks.py
// compiles and calls. Built with -DNIBBLOCK_EMULATE_AMX and without any -mamx flag.
#include <stdlib.h>

#include <thread>
#include <vector>

#include "../../csrc/block_sparse_linear/block_sparse_linear.h"
#include "../../csrc/common/amx.h"

using namespace nibblock;

namespace {

void run_threads(const Parallel* self, int64_t tasks, void (*body)(void*, int64_t, int64_t),
                 void* ctx) {
  std::vector<std::thread> pool;
  for (int t = 0; t < self->threads; ++t) {
    pool.emplace_back([=] {
      const int64_t begin = tasks * t / self->threads, end = tasks * (t + 1) / self->threads;
      if (begin < end) body(ctx, begin, end);
      if (!amx::released()) abort();  // a task left its tiles configured
    });
  }
  for (std::thread& t : pool) t.join();
}

const Dtype kTypes[] = {Dtype::kF32, Dtype::kBF16, Dtype::kF16};

}  // namespace

// x, y and y0 are bfloat16 with these row strides; vtype and bias_type: 0 float32, 1 bfloat16.
extern "C" NB_API int blocks_product(int dx, int64_t n, int64_t k, int64_t block, int64_t count,
                                     const int32_t* layout, const void* values, int vtype,
                                     int64_t m, const void* x, int64_t x_stride, void* y,
                                     int64_t y_stride, const void* bias, int bias_type,
                                     const void* y0, int64_t y0_stride, int threads) {
  const Parallel parallel = {run_threads, threads};
  BlockSparseParams p = {};
  p.s = block_layout(layout, n, k, block, count);
  p.values = values;
  p.vtype = kTypes[vtype];
  p.m = m;
  p.x = x;
  p.x_stride = x_stride;
  p.y = y;
  p.y_stride = y_stride;
  p.xtype = Dtype::kBF16;
  p.bias = bias;
  p.bias_type = kTypes[bias_type];
  p.y0 = y0;
  p.y0_stride = y0_stride;
  p.parallel = &parallel;
  const Status status = dx ? block_sparse_linear_dx_amx(p) : block_sparse_linear_amx(p);
  if (!amx::released()) abort();
  return status;
}

extern "C" NB_API int blocks_grad(int64_t n, int64_t k, int64_t block, int64_t count,
                                  const int32_t* layout, int64_t m, const void* g, int64_t g_stride,
                                  const void* x, int64_t x_stride, void* out, int out_type,
                                  int threads) {
  const Parallel parallel = {run_threads, threads};
  BlockWeightGradParams p = {};
  p.s = block_layout(layout, n, k, block, count);
  p.m = m;
  p.g = g;
  p.g_stride = g_stride;
  p.x = x;
  p.x_stride = x_stride;
  p.gtype = Dtype::kBF16;
  p.out = out;
  p.out_type = kTypes[out_type];
  p.parallel = &parallel;
  return block_weight_grad_amx(p);
}

// packed: 4 bits, symmetric, group 32, float32 scales. The low-rank pair is float32.
extern "C" NB_API int blocks_fused(int dx, int64_t n, int64_t k, int64_t block, int64_t count,
                                   const int32_t* layout, const void* values, int vtype,
                                   const uint8_t* packed, int64_t m, const void* x,
                                   int64_t x_stride, void* y, int64_t y_stride, const void* bias,
                                   int64_t rank, const void* a, const void* c, int threads) {
  const Parallel parallel = {run_threads, threads};
  Int4BlockSparseParams f = {};
  f.s = block_layout(layout, n, k, block, count);
  f.values = values;
  f.vtype = kTypes[vtype];
  f.rank = rank;
  f.a = a;
  f.c = c;
  f.ltype = Dtype::kF32;
  Int4LinearParams& p = f.base;
  p.w = {n, k, 32, 4, 0, Dtype::kF32};
  p.packed = packed;
  p.m = m;
  p.x = x;
  p.x_stride = x_stride;
  p.y = y;
  p.y_stride = y_stride;
  p.xtype = Dtype::kBF16;
  p.bias = bias;
  p.bias_type = Dtype::kF32;
  p.compute = Compute::kBF16;
  p.parallel = &parallel;
  return dx ? int4_block_sparse_linear_dx_amx(f) : int4_block_sparse_linear_amx(f);
}

extern "C" NB_API int64_t blocks_packed_bytes(int64_t n, int64_t k) {
  return int4_geometry({n, k, 32, 4, 0, Dtype::kF32}).bytes;
}
