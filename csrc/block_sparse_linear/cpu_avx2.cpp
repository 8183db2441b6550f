// The block-sparse products for AVX2. The bodies are in cpu_product.h, cpu_small.h and
// cpu_weight_grad.h.
#include "floats_avx2.h"

#include "cpu_fused.h"
#include "cpu_product.h"
#include "cpu_small.h"
#include "cpu_weight_grad.h"

namespace nibblock {

Status block_sparse_linear_avx2(const BlockSparseParams& p) { return product<Floats2>(p, false); }
Status block_sparse_linear_dx_avx2(const BlockSparseParams& p) { return product<Floats2>(p, true); }
Status block_weight_grad_avx2(const BlockWeightGradParams& p) { return weight_grad<Floats2>(p); }
Status block_sparse_linear_small_avx2(const BlockSparseParams& p) { return small<Floats2>(p); }
Status int4_block_sparse_linear_avx2(const Int4BlockSparseParams& p) {
  return fused<Floats2>(p, false, Isa::kAvx2);
}
Status int4_block_sparse_linear_dx_avx2(const Int4BlockSparseParams& p) {
  return fused<Floats2>(p, true, Isa::kAvx2);
}

}  // namespace nibblock
