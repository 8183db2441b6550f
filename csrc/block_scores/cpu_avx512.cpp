// block_scores and block_gain for AVX-512; the bodies are in cpu_scores.h and cpu_gain.h.
#include "../block_sparse_linear/floats_avx512.h"

#include "cpu_gain.h"
#include "cpu_scores.h"

namespace nibblock {

Status block_scores_avx512(const BlockScoresParams& p) { return block_scores<Floats512>(p); }
Status block_gain_avx512(const BlockGainParams& p) { return block_gain<Floats512>(p); }

}  // namespace nibblock
