// block_gain: what a step of its own wins for every B x B block of a weight. C interface.
//
//     z_t           = sum over n in I, k in J of g[t, n] D[n, k] x[t, k]
//     gain[I, J]    += sum_t z_t
//     squares[I, J] += sum_t z_t^2
//
// The m tokens fall into two halves, the first of ceil(m / 2). D are the signs (-1, 0, 1) of the
// gradient g_I^T x_J of the half that t is not in. Blocks as in block_scores.h; python/nibblock/
// sparse/_gain.py says what the two sums are for.
#pragma once

#include "../common/cpu_features.h"
#include "../common/parallel.h"
#include "../common/status.h"
#include "../common/types.h"
#include "../int4_linear/int4_linear.h"

namespace nibblock {

// One call. Rows of g and x are contiguous; nothing is assumed about alignment.
struct BlockGainParams {
  int64_t m, n, k;
  int64_t block;  // B: 16, 32, 64 or 128
  const void* g;  // [m, n] gtype
  int64_t g_stride;
  Dtype gtype;
  const void* x;  // [m, k] xtype
  int64_t x_stride;
  Dtype xtype;
  float* gain;  // [ceil(n / B), ceil(k / B)], strides in elements; added to
  int64_t gain_stride[2];
  float* squares;  // the same
  int64_t squares_stride[2];
  const Parallel* parallel;
};

struct BlockGainKernel {
  const char* id;  // "block_gain.cpu.avx512.tile"
  Isa isa;
  const char* serves_text;
  bool (*serves)(const BlockGainParams& p);
  Status (*run)(const BlockGainParams& p);
};
struct BlockGainTable {
  const BlockGainKernel* rows;
  int count;
};
NB_API BlockGainTable block_gain_table();
NB_API Status block_gain_run(const BlockGainParams& p, const char* forced_id);

// --- what the kernel files share -----------------------------------------------------------------

// Adds both sums of every block, [rows][cols][2], to where the caller wants them.
static inline void add_gain_sums(const BlockGainParams& p, const double* sums) {
  const int64_t rows = (p.n + p.block - 1) / p.block, cols = (p.k + p.block - 1) / p.block;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j, sums += 2) {
      p.gain[i * p.gain_stride[0] + j * p.gain_stride[1]] += static_cast<float>(sums[0]);
      p.squares[i * p.squares_stride[0] + j * p.squares_stride[1]] += static_cast<float>(sums[1]);
    }
  }
}

Status block_gain_scalar(const BlockGainParams& p);
Status block_gain_avx2(const BlockGainParams& p);
Status block_gain_avx512(const BlockGainParams& p);

}  // namespace nibblock
