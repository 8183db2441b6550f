// The block-sparse products for AVX-512. The bodies are in cpu_product.h, cpu_small.h and cpu_weight_grad.h.
#include "floats_avx512.h"

#include "cpu_product.h"
#include "cpu_weight_grad.h"

namespace nibblock {

Status block_sparse_linear_avx512(const BlockSparseParams& p) { return product<Floats512>(p, false); }
Status block_sparse_linear_dx_avx512(const BlockSparseParams& p) { return product<Floats512>(p, true); }
Status block_weight_grad_avx512(const BlockWeightGradParams& p) { return weight_grad<Floats512>(p); }

}  // namespace nibblock
