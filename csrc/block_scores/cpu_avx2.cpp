// block_scores and block_gain for AVX2; the bodies are in cpu_scores.h and cpu_gain.h.
#include "../block_sparse_linear/floats_avx2.h"

#include "cpu_gain.h"
#include "cpu_scores.h"

namespace nibblock {

Status block_scores_avx2(const BlockScoresParams& p) { return block_scores<Floats2>(p); }
Status block_gain_avx2(const BlockGainParams& p) { return block_gain<Floats2>(p); }

}  // namespace nibblock
