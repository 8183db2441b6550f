// block_scores for AVX2; the body is in cpu_scores.h.
#include "../block_sparse_linear/floats_avx2.h"

#include "cpu_scores.h"

namespace nibblock {

Status block_scores_avx2(const BlockScoresParams& p) { return block_scores<Floats2>(p); }

}  // namespace nibblock
