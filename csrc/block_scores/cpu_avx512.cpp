// block_scores for AVX-512; the body is in cpu_scores.h.
#include "../block_sparse_linear/floats_avx512.h"

#include "cpu_scores.h"

namespace nibblock {

Status block_scores_avx512(const BlockScoresParams& p) { return block_scores<Floats512>(p); }

}  // namespace nibblock
