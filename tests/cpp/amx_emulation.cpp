// The AMX kernels of int4_linear over emulated tiles, as a library that tests/test_amx_emulation.py
// compiles and calls. Built with -DNIBBLOCK_EMULATE_AMX and without any -mamx flag.
#include <stdlib.h>

#include <thread>
#include <vector>

#include "../../csrc/common/amx.h"
#include "../../csrc/int4_linear/int4_linear.h"

using namespace nibblock;

namespace {

// Contiguous ranges on `threads` threads; the thread that called keeps the last one.
void run_threads(const Parallel* self, int64_t tasks, void (*body)(void*, int64_t, int64_t),
                 void* ctx) {
  std::vector<std::thread> pool;
  for (int t = 0; t + 1 < self->threads; ++t) {
    pool.emplace_back([=] {
      const int64_t begin = tasks * t / self->threads, end = tasks * (t + 1) / self->threads;
      if (begin < end) body(ctx, begin, end);
      if (!amx::released()) abort();
    });
  }
  const int64_t begin = tasks * (self->threads - 1) / self->threads;
  if (begin < tasks) body(ctx, begin, tasks);
  for (std::thread& t : pool) t.join();
}

}  // namespace

// which: 0 forward bf16, 1 forward int8, 2 dx bf16. types: 0 float32, 1 bfloat16, 2 float16; x is
// bfloat16 unless which is 1.
extern "C" NB_API int amx_run(int which, int64_t n, int64_t k, int64_t group, int bits, int affine,
                              int scale_type, const uint8_t* packed, int64_t m, const void* x,
                              int64_t x_stride, void* y, int64_t y_stride, int xtype,
                              const void* bias, int bias_type, int threads) {
  const Parallel parallel = {run_threads, threads};
  const Int4LinearParams p = {
      {n, k, group, bits, affine, static_cast<Dtype>(scale_type)},
      packed,
      m,
      x,
      x_stride,
      y,
      y_stride,
      static_cast<Dtype>(xtype),
      bias,
      static_cast<Dtype>(bias_type),
      which == 1 ? Compute::kInt8 : Compute::kBF16,
      &parallel,
  };
  const Status status = which == 0   ? int4_linear_amx_bf16(p)
                        : which == 1 ? int4_linear_amx_int8(p)
                                     : int4_linear_dx_amx_bf16(p);
  if (!amx::released()) abort();  // a task left its tiles configured
  return status;
}

extern "C" NB_API int64_t packed_bytes(int64_t n, int64_t k, int64_t group, int bits, int affine,
                                       int scale_type) {
  return int4_geometry({n, k, group, bits, affine, static_cast<Dtype>(scale_type)}).bytes;
}

// Misuses, one each, that the emulation must answer by aborting (run in a child process).
extern "C" NB_API void amx_misuse(int which) {
  alignas(64) static uint8_t buffer[amx::kTileBytes];
  amx::TileConfig config = amx::full_tiles();
  if (which == 0) amx::zero<0>();  // no configuration
  if (which == 1) config.rows[3] = 17;
  if (which == 2) config.row_bytes[2] = 32;
  if (which == 3) config.palette = 0;
  amx::configure(config);
  amx::zero<0>();
  amx::load<1>(buffer, 64);
  if (which != 4) amx::load<2>(buffer, 64);
  amx::dot_bf16<0, 1, 2>();
  amx::release();
  if (which == 5) amx::store<0>(buffer, 64);
}
