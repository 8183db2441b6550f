// The block-sparse products for AVX2. The bodies are in cpu_product.h, cpu_small.h and cpu_weight_grad.h.
#include "floats_avx2.h"

#include "cpu_product.h"
#include "cpu_weight_grad.h"

namespace nibblock {

Status block_sparse_linear_avx2(const BlockSparseParams& p) { return product<Floats2>(p, false); }
Status block_sparse_linear_dx_avx2(const BlockSparseParams& p) { return product<Floats2>(p, true); }
Status block_weight_grad_avx2(const BlockWeightGradParams& p) { return weight_grad<Floats2>(p); }

}  // namespace nibblock
