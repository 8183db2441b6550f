// block_scores on the CPU: the scalar kernel, which is the oracle in C++, and the table of all.
#include <stdlib.h>

#include "../common/kernel_table.h"
#include "block_scores.h"

namespace nibblock {
namespace {

int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

float at(const void* p, Dtype type, int64_t stride, int64_t row, int64_t column) {
  return load_as_f32(p, type, row * stride + column);
}

// The squared norm of block (i, j) and its product with the weight, by the formula.
void exact_block(const BlockScoresParams& p, int64_t i, int64_t j, double* square, double* moved) {
  const int64_t B = p.block;
  for (int64_t n = i * B; n < min64(p.n, (i + 1) * B); ++n) {
    for (int64_t k = j * B; k < min64(p.k, (j + 1) * B); ++k) {
      double sum = 0.0;
      for (int64_t m = 0; m < p.m; ++m) {
        sum += static_cast<double>(at(p.g, p.gtype, p.g_stride, m, n)) *
               at(p.x, p.xtype, p.x_stride, m, k);
      }
      *square += sum * sum;
      if (p.w) *moved += sum * at(p.w, p.wtype, p.w_stride, n, k);
    }
  }
}

// z[m][q] = sum over k in block column j of sign(k, q) x[m, k].
void sketch_column(const BlockScoresParams& p, int64_t j, double* z) {
  const int64_t first = j * p.block, last = min64(p.k, first + p.block);
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t q = 0; q < p.sketch; ++q) z[m * p.sketch + q] = 0.0;
    for (int64_t k = first; k < last; ++k) {
      const uint64_t signs = block_scores_signs(p.seed, k);
      const double v = at(p.x, p.xtype, p.x_stride, m, k);
      for (int64_t q = 0; q < p.sketch; ++q) {
        z[m * p.sketch + q] += signs >> q & 1 ? -v : v;
      }
    }
  }
}

double sketched_block(const BlockScoresParams& p, int64_t i, const double* z) {
  double square = 0.0;
  for (int64_t n = i * p.block; n < min64(p.n, (i + 1) * p.block); ++n) {
    for (int64_t q = 0; q < p.sketch; ++q) {
      double sum = 0.0;
      for (int64_t m = 0; m < p.m; ++m) {
        sum += at(p.g, p.gtype, p.g_stride, m, n) * z[m * p.sketch + q];
      }
      square += sum * sum;
    }
  }
  return square / static_cast<double>(p.sketch);
}

}  // namespace

// Float64 sums; a task is a block column. Nothing is written before every allocation succeeded.
Status block_scores_scalar(const BlockScoresParams& p) {
  const int64_t rows = (p.n + p.block - 1) / p.block, cols = (p.k + p.block - 1) / p.block;
  const int64_t count = rows * cols;
  double* sums = static_cast<double*>(calloc(static_cast<size_t>(2 * count + 1), sizeof(double)));
  if (!sums) return kOutOfMemory;
  int failed = 0;
  auto body = [&](int64_t begin, int64_t end) {
    double* z = nullptr;
    if (p.sketch) {
      z = static_cast<double*>(malloc(static_cast<size_t>(p.m * p.sketch + 1) * sizeof(double)));
      if (!z) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
    }
    for (int64_t j = begin; j < end; ++j) {
      if (z) sketch_column(p, j, z);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t to = i * cols + j;
        if (z) {
          sums[to] = sketched_block(p, i, z);
        } else {
          exact_block(p, i, j, &sums[to], &sums[count + to]);
        }
      }
    }
    free(z);
  };
  parallel_for(*p.parallel, cols, body);
  for (int64_t i = 0; i < rows && !failed; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      p.scores[i * p.scores_stride[0] + j * p.scores_stride[1]] +=
          static_cast<float>(sums[i * cols + j]);
      if (!p.movement) continue;
      p.movement[i * p.movement_stride[0] + j * p.movement_stride[1]] +=
          static_cast<float>(sums[count + i * cols + j]);
    }
  }
  free(sums);
  return failed ? kOutOfMemory : kOk;
}

// --- the table -----------------------------------------------------------------------------------

namespace {

bool any(const BlockScoresParams&) { return true; }

const BlockScoresKernel kRows[] = {
    {"block_scores.cpu.avx512.tile", Isa::kAvx512, "any call", any, block_scores_avx512},
    {"block_scores.cpu.avx2.tile", Isa::kAvx2, "any call", any, block_scores_avx2},
    {"block_scores.cpu.scalar.reference", Isa::kScalar, "any call", any, block_scores_scalar},
};
constexpr int kCount = sizeof(kRows) / sizeof(kRows[0]);

}  // namespace

BlockScoresTable block_scores_table() { return {kRows, kCount}; }

Status block_scores_run(const BlockScoresParams& p, const char* forced_id) {
  return run_row(block_scores_table(), p, forced_id, p.m == 0 || p.n == 0 || p.k == 0);
}

}  // namespace nibblock
