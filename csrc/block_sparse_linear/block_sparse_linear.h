// block_sparse_linear: products with a weight of which only some B x B blocks exist. C interface.
//
//     y[m, n]  = sum over blocks (I, J) with n in I of  sum_{k in J} x[m, k] * S[n, k]
//                (+ bias[n]) (+ y0[m, n])
//     dx[m, k] = sum over blocks (I, J) with k in J of  sum_{n in I} dy[m, n] * S[n, k]
//     dS_z[n, k] = sum_m dy[m, I_z B + n] * x[m, J_z B + k]              (block_weight_grad)
//
// Values are Z blocks [B][B], row-major (n, then k), in the order of the block list: sorted by row
// block, then column block. This one order serves forward, both gradients, the optimiser and the
// file; there is no second copy of the values. The last block row and column may be ragged (N, K no
// multiple of B): the elements outside are ignored on input and zero in gradients.
//
// The layout is one int32 array, built and validated once
// (python/nibblock/ops/block_sparse_linear.py):
//
//     row_ptr   [ceil(N / B) + 1]  blocks row_ptr[I] .. row_ptr[I + 1] belong to block row I
//     col       [Z]                column block of each
//     col_ptr   [ceil(K / B) + 1]  the transposed order: entries col_ptr[J] .. col_ptr[J + 1] of
//               the next two
//     col_row   [Z]                row block
//     col_block [Z]                position of the block in the values
#pragma once

#include "../common/cpu_features.h"
#include "../common/parallel.h"
#include "../common/status.h"
#include "../common/types.h"
#include "../int4_linear/int4_linear.h"

namespace nibblock {

struct BlockLayout {
  int64_t n, k;   // out_features, in_features
  int64_t block;  // B: 16, 32, 64 or 128
  int64_t count;  // Z
  const int32_t* row_ptr;
  const int32_t* col;
  const int32_t* col_ptr;
  const int32_t* col_row;
  const int32_t* col_block;
};

static inline int64_t block_layout_size(int64_t n, int64_t k, int64_t block, int64_t count) {
  return (n + block - 1) / block + 1 + (k + block - 1) / block + 1 + 3 * count;
}

static inline BlockLayout block_layout(const int32_t* layout, int64_t n, int64_t k, int64_t block,
                                       int64_t count) {
  BlockLayout b;
  b.n = n;
  b.k = k;
  b.block = block;
  b.count = count;
  b.row_ptr = layout;
  b.col = b.row_ptr + (n + block - 1) / block + 1;
  b.col_ptr = b.col + count;
  b.col_row = b.col_ptr + (k + block - 1) / block + 1;
  b.col_block = b.col_row + count;
  return b;
}

// Whether every index of a layout is inside its range: what keeps a kernel inside its buffers. One
// pass over the array, under a microsecond for a thousand blocks. Order and duplicates are the
// builder's business.
NB_API bool block_layout_in_range(const BlockLayout& s);

// One call of the forward or, with x = dy and y = dx, of the input gradient. Rows are contiguous
// along their last dimension; nothing is assumed about alignment. y overlaps no input except that
// y0 may be y.
struct BlockSparseParams {
  BlockLayout s;
  const void* values;  // [Z][B][B] vtype
  Dtype vtype;         // kF32 or kBF16
  int64_t m;
  const void* x;
  int64_t x_stride;  // elements
  void* y;
  int64_t y_stride;
  Dtype xtype;       // of x, y and y0
  const void* bias;  // [n] bias_type, or null (forward)
  Dtype bias_type;
  const void* y0;  // added to the result, row stride y0_stride, or null (forward)
  int64_t y0_stride;
  const Parallel* parallel;
};

struct BlockSparseKernel {
  const char* id;  // "block_sparse_linear.cpu.avx512.tile"
  Isa isa;
  const char* serves_text;
  bool (*serves)(const BlockSparseParams& p);
  Status (*run)(const BlockSparseParams& p);
};
struct BlockSparseTable {
  const BlockSparseKernel* rows;
  int count;
};
NB_API BlockSparseTable block_sparse_linear_table();
NB_API BlockSparseTable block_sparse_linear_dx_table();
NB_API const BlockSparseKernel* block_sparse_select(const BlockSparseTable& t,
                                                    const BlockSparseParams& p);
NB_API Status block_sparse_run(const BlockSparseTable& t, const BlockSparseParams& p,
                               const char* forced_id);

// The sampled product of two dense matrices over their rows.
struct BlockWeightGradParams {
  BlockLayout s;
  int64_t m;
  const void* g;  // dy [m, n] gtype
  int64_t g_stride;
  const void* x;  // [m, k] gtype
  int64_t x_stride;
  Dtype gtype;
  void* out;       // [Z][B][B] out_type; overwritten
  Dtype out_type;  // kF32 or kBF16; sums are float32
  const Parallel* parallel;
};
struct BlockWeightGradKernel {
  const char* id;  // "block_weight_grad.cpu.avx512.tile"
  Isa isa;
  const char* serves_text;
  bool (*serves)(const BlockWeightGradParams& p);
  Status (*run)(const BlockWeightGradParams& p);
};
struct BlockWeightGradTable {
  const BlockWeightGradKernel* rows;
  int count;
};
NB_API BlockWeightGradTable block_weight_grad_table();
NB_API const BlockWeightGradKernel* block_weight_grad_select(const BlockWeightGradTable& t,
                                                             const BlockWeightGradParams& p);
NB_API Status block_weight_grad_run(const BlockWeightGradTable& t, const BlockWeightGradParams& p,
                                    const char* forced_id);

// int4_block_sparse_linear: y = x dequant(Q)^T (+ bias) + x S^T (+ (x A^T) C^T), or the input
// gradient of all of it, written once: the adapter is added to the int4 kernel's float32 sums
// (Int4LinearParams::add).
struct Int4BlockSparseParams {
  Int4LinearParams base;  // its `add` is ignored
  BlockLayout s;          // n, k as base.w's; count may be 0
  const void* values;
  Dtype vtype;    // kF32 or kBF16
  int64_t rank;   // 0: no low-rank pair
  const void* a;  // [rank, k] ltype
  const void* c;  // [n, rank] ltype
  Dtype ltype;
};
struct Int4BlockSparseKernel {
  const char* id;  // "int4_block_sparse_linear.cpu.avx512.fused"
  Isa isa;
  const char* serves_text;
  bool (*serves)(const Int4BlockSparseParams& p);
  Status (*run)(const Int4BlockSparseParams& p);
};
struct Int4BlockSparseTable {
  const Int4BlockSparseKernel* rows;
  int count;
};
NB_API Int4BlockSparseTable int4_block_sparse_linear_table();
NB_API Int4BlockSparseTable int4_block_sparse_linear_dx_table();
NB_API const Int4BlockSparseKernel* int4_block_sparse_select(const Int4BlockSparseTable& t,
                                                             const Int4BlockSparseParams& p);
NB_API Status int4_block_sparse_run(const Int4BlockSparseTable& t, const Int4BlockSparseParams& p,
                                    const char* forced_id);

// --- what the kernel files share -----------------------------------------------------------------

// The best int4 kernel up to level `isa` for the base of a fused call, or null.
const Int4LinearKernel* int4_base_kernel(const Int4LinearParams& base, bool dx, Isa isa);

Status block_sparse_linear_avx2(const BlockSparseParams& p);
Status block_sparse_linear_avx512(const BlockSparseParams& p);
Status block_sparse_linear_dx_avx2(const BlockSparseParams& p);
Status block_sparse_linear_dx_avx512(const BlockSparseParams& p);
Status block_sparse_linear_small_avx2(const BlockSparseParams& p);
Status block_sparse_linear_small_avx512(const BlockSparseParams& p);
Status int4_block_sparse_linear_avx2(const Int4BlockSparseParams& p);
Status int4_block_sparse_linear_avx512(const Int4BlockSparseParams& p);
Status int4_block_sparse_linear_dx_avx2(const Int4BlockSparseParams& p);
Status int4_block_sparse_linear_dx_avx512(const Int4BlockSparseParams& p);
Status block_weight_grad_avx2(const BlockWeightGradParams& p);
Status block_weight_grad_avx512(const BlockWeightGradParams& p);
Status block_sparse_linear_amx(const BlockSparseParams& p);
Status block_sparse_linear_dx_amx(const BlockSparseParams& p);
Status block_weight_grad_amx(const BlockWeightGradParams& p);
Status int4_block_sparse_linear_amx(const Int4BlockSparseParams& p);
Status int4_block_sparse_linear_dx_amx(const Int4BlockSparseParams& p);
Status block_sparse_linear_scalar(const BlockSparseParams& p);
Status block_sparse_linear_dx_scalar(const BlockSparseParams& p);
Status block_weight_grad_scalar(const BlockWeightGradParams& p);
Status int4_block_sparse_linear_scalar(const Int4BlockSparseParams& p);
Status int4_block_sparse_linear_dx_scalar(const Int4BlockSparseParams& p);

}  // namespace nibblock
