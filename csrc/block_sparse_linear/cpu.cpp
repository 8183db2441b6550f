// block_sparse_linear on the CPU: the scalar kernels, which are the oracle in C++, and the tables
// of all.
//
// The scalar bodies follow the formulas with float64 sums. Every other kernel is tested against
// them and against NumPy. They also serve CPUs without AVX2.
#include <stdlib.h>

#include "../common/kernel_table.h"
#include "block_sparse_linear.h"

namespace nibblock {
namespace {

int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// sum over the stored blocks of output column `at` of row m, in float64. `dx` turns S around.
double column_sum(const BlockLayout& s, const void* values, Dtype vtype, bool dx, const void* x,
                  Dtype xtype, int64_t row, int64_t at) {
  const int64_t B = s.block, out = at / B, i = at % B;
  const int32_t* ptr = dx ? s.col_ptr : s.row_ptr;
  double sum = 0.0;
  for (int64_t e = ptr[out]; e < ptr[out + 1]; ++e) {
    const int64_t in = dx ? s.col_row[e] : s.col[e], z = dx ? s.col_block[e] : e;
    const int64_t depth = min64(B, (dx ? s.n : s.k) - in * B);
    for (int64_t j = 0; j < depth; ++j) {
      const float v = load_as_f32(values, vtype, (z * B + (dx ? j : i)) * B + (dx ? i : j));
      sum += static_cast<double>(load_as_f32(x, xtype, row + in * B + j)) * v;
    }
  }
  return sum;
}

Status product(const BlockSparseParams& p, bool dx) {
  const int64_t width = dx ? p.s.k : p.s.n;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      for (int64_t i = 0; i < width; ++i) {
        double sum = column_sum(p.s, p.values, p.vtype, dx, p.x, p.xtype, m * p.x_stride, i);
        if (p.bias) sum += load_as_f32(p.bias, p.bias_type, i);
        // Subtracting +0 keeps the bits of y0, -0 included, where the product is zero.
        if (p.y0) sum = load_as_f32(p.y0, p.xtype, m * p.y0_stride + i) - (0.0 - sum);
        store_f32_as(p.y, p.xtype, m * p.y_stride + i, static_cast<float>(sum));
      }
    }
  };
  parallel_for(*p.parallel, p.m, body);
  return kOk;
}

// x[row] . L[j] over `count`, where L is [rank, count], or with `turned` [count, rank].
double low_rank_dot(const void* x, Dtype xtype, int64_t row, const void* l, Dtype ltype,
                    int64_t rank, bool turned, int64_t j, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    sum += static_cast<double>(load_as_f32(x, xtype, row + i)) *
           load_as_f32(l, ltype, turned ? i * rank + j : j * count + i);
  }
  return sum;
}

struct ScalarAdd {
  TileAdd base;  // first: the callback gets its address
  const Int4BlockSparseParams* p;
  bool dx;
};

void scalar_add(const TileAdd* self, int64_t m0, int64_t rows, int64_t n0, int64_t cols, float* acc,
                int64_t acc_stride) {
  const ScalarAdd& a = *reinterpret_cast<const ScalarAdd*>(self);
  const Int4BlockSparseParams& p = *a.p;
  const Int4LinearParams& b = p.base;
  const int64_t inner = a.dx ? b.w.n : b.w.k, outer = a.dx ? b.w.k : b.w.n;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = (m0 + i) * b.x_stride;
    for (int64_t j = 0; j < cols; ++j) {
      double sum = acc[i * acc_stride + j];
      sum += column_sum(p.s, p.values, p.vtype, a.dx, b.x, b.xtype, row, n0 + j);
      for (int64_t r = 0; r < p.rank; ++r) {
        const double t =
            a.dx ? low_rank_dot(b.x, b.xtype, row, p.c, p.ltype, p.rank, true, r, inner)
                 : low_rank_dot(b.x, b.xtype, row, p.a, p.ltype, p.rank, false, r, inner);
        sum += t * (a.dx ? load_as_f32(p.a, p.ltype, r * outer + n0 + j)
                         : load_as_f32(p.c, p.ltype, (n0 + j) * p.rank + r));
      }
      acc[i * acc_stride + j] = static_cast<float>(sum);
    }
  }
}

Status fused_scalar(const Int4BlockSparseParams& p, bool dx) {
  const Int4LinearKernel* kernel = int4_base_kernel(p.base, dx, Isa::kScalar);
  if (!kernel) return kNoKernel;
  const ScalarAdd add = {{scalar_add, nullptr, nullptr}, &p, dx};
  Int4LinearParams base = p.base;
  base.add = &add.base;
  return kernel->run(base);
}

}  // namespace

Status block_sparse_linear_scalar(const BlockSparseParams& p) { return product(p, false); }
Status block_sparse_linear_dx_scalar(const BlockSparseParams& p) { return product(p, true); }
Status int4_block_sparse_linear_scalar(const Int4BlockSparseParams& p) {
  return fused_scalar(p, false);
}
Status int4_block_sparse_linear_dx_scalar(const Int4BlockSparseParams& p) {
  return fused_scalar(p, true);
}

Status block_weight_grad_scalar(const BlockWeightGradParams& p) {
  const int64_t B = p.s.block;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {  // transposed order: it names row, column and block
      const int64_t z = p.s.col_block[t], n0 = p.s.col_row[t] * B, k0 = p.s.col[z] * B;
      for (int64_t i = 0; i < B; ++i) {
        for (int64_t j = 0; j < B; ++j) {
          double sum = 0.0;
          for (int64_t m = 0; m < p.m && n0 + i < p.s.n && k0 + j < p.s.k; ++m) {
            sum += static_cast<double>(load_as_f32(p.g, p.gtype, m * p.g_stride + n0 + i)) *
                   load_as_f32(p.x, p.gtype, m * p.x_stride + k0 + j);
          }
          store_f32_as(p.out, p.out_type, (z * B + i) * B + j, static_cast<float>(sum));
        }
      }
    }
  };
  parallel_for(*p.parallel, p.s.count, body);
  return kOk;
}

bool block_layout_in_range(const BlockLayout& s) {
  const int64_t rows = ceil_div(s.n, s.block), cols = ceil_div(s.k, s.block);
  const auto climbs = [&](const int32_t* ptr, int64_t count) {
    int bad = ptr[0] != 0 || ptr[count] != s.count;
    for (int64_t i = 0; i < count; ++i) bad |= ptr[i] > ptr[i + 1];
    return !bad;
  };
  const auto below = [&](const int32_t* index, int64_t limit) {
    int bad = 0;
    for (int64_t i = 0; i < s.count; ++i) {
      bad |= static_cast<uint32_t>(index[i]) >= static_cast<uint32_t>(limit);
    }
    return !bad;
  };
  return climbs(s.row_ptr, rows) && climbs(s.col_ptr, cols) && below(s.col, cols) &&
         below(s.col_row, rows) && below(s.col_block, s.count);
}

const Int4LinearKernel* int4_base_kernel(const Int4LinearParams& base, bool dx, Isa isa) {
  const Int4LinearTable t = dx ? int4_linear_dx_table() : int4_linear_table();
  for (int i = 0; i < t.count; ++i) {
    if (t.rows[i].isa <= isa && t.rows[i].serves(base)) return &t.rows[i];
  }
  return nullptr;
}

// --- the tables ----------------------------------------------------------------------------------

namespace {

bool any(const BlockSparseParams&) { return true; }
bool few_rows(const BlockSparseParams& p) { return p.m <= 4; }
// float32 and float16 x keep their precision, which bfloat16 tiles do not have.
bool tiles(const BlockSparseParams& p) { return p.m >= 5 && p.xtype == Dtype::kBF16; }
bool tiles_grad(const BlockWeightGradParams& p) { return p.gtype == Dtype::kBF16; }
bool tiles_fused(const Int4BlockSparseParams& p) {
  return p.base.m >= 5 && p.base.xtype == Dtype::kBF16 && p.base.compute == Compute::kBF16;
}
bool any_grad(const BlockWeightGradParams&) { return true; }
bool any_fused(const Int4BlockSparseParams&) { return true; }

const BlockSparseKernel kForward[] = {
    {"block_sparse_linear.cpu.amx.tile", Isa::kAmx, "m >= 5, bfloat16 x", tiles,
     block_sparse_linear_amx},
    {"block_sparse_linear.cpu.avx512.small", Isa::kAvx512, "m <= 4", few_rows,
     block_sparse_linear_small_avx512},
    {"block_sparse_linear.cpu.avx512.tile", Isa::kAvx512, "any call", any,
     block_sparse_linear_avx512},
    {"block_sparse_linear.cpu.avx2.small", Isa::kAvx2, "m <= 4", few_rows,
     block_sparse_linear_small_avx2},
    {"block_sparse_linear.cpu.avx2.tile", Isa::kAvx2, "any call", any, block_sparse_linear_avx2},
    {"block_sparse_linear.cpu.scalar.reference", Isa::kScalar, "any call", any,
     block_sparse_linear_scalar},
};
const BlockSparseKernel kDx[] = {
    {"block_sparse_linear_dx.cpu.amx.tile", Isa::kAmx, "m >= 5, bfloat16 x", tiles,
     block_sparse_linear_dx_amx},
    {"block_sparse_linear_dx.cpu.avx512.tile", Isa::kAvx512, "any call", any,
     block_sparse_linear_dx_avx512},
    {"block_sparse_linear_dx.cpu.avx2.tile", Isa::kAvx2, "any call", any,
     block_sparse_linear_dx_avx2},
    {"block_sparse_linear_dx.cpu.scalar.reference", Isa::kScalar, "any call", any,
     block_sparse_linear_dx_scalar},
};
const BlockWeightGradKernel kGrad[] = {
    {"block_weight_grad.cpu.amx.tile", Isa::kAmx, "bfloat16 x", tiles_grad, block_weight_grad_amx},
    {"block_weight_grad.cpu.avx512.tile", Isa::kAvx512, "any call", any_grad,
     block_weight_grad_avx512},
    {"block_weight_grad.cpu.avx2.tile", Isa::kAvx2, "any call", any_grad, block_weight_grad_avx2},
    {"block_weight_grad.cpu.scalar.reference", Isa::kScalar, "any call", any_grad,
     block_weight_grad_scalar},
};
const Int4BlockSparseKernel kFused[] = {
    {"int4_block_sparse_linear.cpu.amx.tile", Isa::kAmx, "m >= 5, bfloat16 x, compute bf16",
     tiles_fused, int4_block_sparse_linear_amx},
    {"int4_block_sparse_linear.cpu.avx512.fused", Isa::kAvx512, "any call", any_fused,
     int4_block_sparse_linear_avx512},
    {"int4_block_sparse_linear.cpu.avx2.fused", Isa::kAvx2, "any call", any_fused,
     int4_block_sparse_linear_avx2},
    {"int4_block_sparse_linear.cpu.scalar.reference", Isa::kScalar, "any call", any_fused,
     int4_block_sparse_linear_scalar},
};
const Int4BlockSparseKernel kFusedDx[] = {
    {"int4_block_sparse_linear_dx.cpu.amx.tile", Isa::kAmx, "m >= 5, bfloat16 x, compute bf16",
     tiles_fused, int4_block_sparse_linear_dx_amx},
    {"int4_block_sparse_linear_dx.cpu.avx512.fused", Isa::kAvx512, "any call", any_fused,
     int4_block_sparse_linear_dx_avx512},
    {"int4_block_sparse_linear_dx.cpu.avx2.fused", Isa::kAvx2, "any call", any_fused,
     int4_block_sparse_linear_dx_avx2},
    {"int4_block_sparse_linear_dx.cpu.scalar.reference", Isa::kScalar, "any call", any_fused,
     int4_block_sparse_linear_dx_scalar},
};

template <class Table, class Row, int N>
Table table(const Row (&rows)[N]) {
  return {rows, N};
}

}  // namespace

BlockSparseTable block_sparse_linear_table() { return table<BlockSparseTable>(kForward); }
BlockSparseTable block_sparse_linear_dx_table() { return table<BlockSparseTable>(kDx); }
BlockWeightGradTable block_weight_grad_table() { return table<BlockWeightGradTable>(kGrad); }
Int4BlockSparseTable int4_block_sparse_linear_table() {
  return table<Int4BlockSparseTable>(kFused);
}
Int4BlockSparseTable int4_block_sparse_linear_dx_table() {
  return table<Int4BlockSparseTable>(kFusedDx);
}

const BlockSparseKernel* block_sparse_select(const BlockSparseTable& t,
                                             const BlockSparseParams& p) {
  return select_row(t, p);
}
const BlockWeightGradKernel* block_weight_grad_select(const BlockWeightGradTable& t,
                                                      const BlockWeightGradParams& p) {
  return select_row(t, p);
}
const Int4BlockSparseKernel* int4_block_sparse_select(const Int4BlockSparseTable& t,
                                                      const Int4BlockSparseParams& p) {
  return select_row(t, p);
}

Status block_sparse_run(const BlockSparseTable& t, const BlockSparseParams& p,
                        const char* forced_id) {
  return run_row(t, p, forced_id, p.m == 0);
}
Status block_weight_grad_run(const BlockWeightGradTable& t, const BlockWeightGradParams& p,
                             const char* forced_id) {
  return run_row(t, p, forced_id, p.s.count == 0);
}
Status int4_block_sparse_run(const Int4BlockSparseTable& t, const Int4BlockSparseParams& p,
                             const char* forced_id) {
  return run_row(t, p, forced_id, p.base.m == 0);
}

}  // namespace nibblock
