// The block-sparse products for AVX-512. The bodies are in cpu_product.h, cpu_small.h and
// cpu_weight_grad.h.
#include "floats_avx512.h"

#include "cpu_fused.h"
#include "cpu_product.h"
#include "cpu_small.h"
#include "cpu_weight_grad.h"

namespace nibblock {

Status block_sparse_linear_avx512(const BlockSparseParams& p) {
  return product<Floats512>(p, false);
}
Status block_sparse_linear_dx_avx512(const BlockSparseParams& p) {
  return product<Floats512>(p, true);
}
Status block_weight_grad_avx512(const BlockWeightGradParams& p) {
  return weight_grad<Floats512>(p);
}
Status block_sparse_linear_small_avx512(const BlockSparseParams& p) { return small<Floats512>(p); }
Status int4_block_sparse_linear_avx512(const Int4BlockSparseParams& p) {
  return fused<Floats512>(p, false, cpu_isa());
}
Status int4_block_sparse_linear_dx_avx512(const Int4BlockSparseParams& p) {
  return fused<Floats512>(p, true, cpu_isa());
}

}  // namespace nibblock
