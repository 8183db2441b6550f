// block_gain on the CPU: the scalar kernel, which is the oracle in C++, and the table of all.
#include <stdlib.h>

#include "../common/kernel_table.h"
#include "block_gain.h"

namespace nibblock {
namespace {

int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

double at(const void* p, Dtype type, int64_t stride, int64_t row, int64_t column) {
  return load_as_f32(p, type, row * stride + column);
}

// Both sums of block (i, j), by the formula. `signs` holds B^2 numbers.
void gain_of_block(const BlockGainParams& p, int64_t i, int64_t j, double* signs, double* sums) {
  const int64_t B = p.block, middle = (p.m + 1) / 2;
  const int64_t n0 = i * B, n1 = min64(p.n, n0 + B), k0 = j * B, k1 = min64(p.k, k0 + B);
  for (int half = 0; half < 2; ++half) {
    const int64_t from[2] = {0, middle}, to[2] = {middle, p.m};
    for (int64_t n = n0; n < n1; ++n) {
      for (int64_t k = k0; k < k1; ++k) {
        double sum = 0.0;
        for (int64_t m = from[1 - half]; m < to[1 - half]; ++m) {
          sum += at(p.g, p.gtype, p.g_stride, m, n) * at(p.x, p.xtype, p.x_stride, m, k);
        }
        signs[(n - n0) * B + k - k0] = sum > 0.0 ? 1.0 : sum < 0.0 ? -1.0 : sum;
      }
    }
    for (int64_t m = from[half]; m < to[half]; ++m) {
      double z = 0.0;
      for (int64_t n = n0; n < n1; ++n) {
        double row = 0.0;
        for (int64_t k = k0; k < k1; ++k) {
          row += signs[(n - n0) * B + k - k0] * at(p.x, p.xtype, p.x_stride, m, k);
        }
        z += row * at(p.g, p.gtype, p.g_stride, m, n);
      }
      sums[0] += z;
      sums[1] += z * z;
    }
  }
}

}  // namespace

// Float64 sums; a task is a block column. Nothing is written before every allocation succeeded.
Status block_gain_scalar(const BlockGainParams& p) {
  const int64_t rows = (p.n + p.block - 1) / p.block, cols = (p.k + p.block - 1) / p.block;
  double* sums =
      static_cast<double*>(calloc(static_cast<size_t>(2 * rows * cols + 1), sizeof(double)));
  if (!sums) return kOutOfMemory;
  int failed = 0;
  auto body = [&](int64_t begin, int64_t end) {
    const size_t size = static_cast<size_t>(p.block * p.block) * sizeof(double);
    double* signs = static_cast<double*>(malloc(size));
    if (!signs) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t i = 0; i < rows; ++i) gain_of_block(p, i, j, signs, sums + (i * cols + j) * 2);
    }
    free(signs);
  };
  parallel_for(*p.parallel, cols, body);
  if (!failed) add_gain_sums(p, sums);
  free(sums);
  return failed ? kOutOfMemory : kOk;
}

// --- the table -----------------------------------------------------------------------------------

namespace {

bool any(const BlockGainParams&) { return true; }

const BlockGainKernel kRows[] = {
    {"block_gain.cpu.avx512.tile", Isa::kAvx512, "any call", any, block_gain_avx512},
    {"block_gain.cpu.avx2.tile", Isa::kAvx2, "any call", any, block_gain_avx2},
    {"block_gain.cpu.scalar.reference", Isa::kScalar, "any call", any, block_gain_scalar},
};
constexpr int kCount = sizeof(kRows) / sizeof(kRows[0]);

}  // namespace

BlockGainTable block_gain_table() { return {kRows, kCount}; }

Status block_gain_run(const BlockGainParams& p, const char* forced_id) {
  return run_row(block_gain_table(), p, forced_id, p.m == 0 || p.n == 0 || p.k == 0);
}

}  // namespace nibblock
