// block_scores: how much every B x B block of a weight's gradient matters, without the gradient.
// C interface.
//
//     scores[I, J]   += ||g_I^T x_J||_F^2                 (or, with a sketch, an unbiased estimate)
//     movement[I, J] += <W_IJ, g_I^T x_J>
//
// g_I are columns [I B, (I + 1) B) of g [m, n], x_J columns [J B, (J + 1) B) of x [m, k]; the last
// block row and column may be ragged. Tiles of the gradient exist in cache, one panel a thread, and
// are summed and dropped.
//
// The sketch replaces x_J by x_J Omega_J, B columns by s, with independent signs: E[Omega Omega^T]
// = s I, so E||g_I^T x_J Omega_J||_F^2 / s = ||g_I^T x_J||_F^2, for s / B of the multiplications.
#pragma once

#include "../common/cpu_features.h"
#include "../common/parallel.h"
#include "../common/status.h"
#include "../common/types.h"
#include "../int4_linear/int4_linear.h"

namespace nibblock {

constexpr int64_t kMostSamples = 32;

// One call. Rows of g, x and w are contiguous; nothing is assumed about alignment.
struct BlockScoresParams {
  int64_t m, n, k;
  int64_t block;  // B: 16, 32, 64 or 128
  const void* g;  // [m, n] gtype
  int64_t g_stride;
  Dtype gtype;
  const void* x;  // [m, k] xtype
  int64_t x_stride;
  Dtype xtype;
  int64_t sketch;  // s, 1 .. kMostSamples; 0: exact
  uint64_t seed;   // of the signs
  float* scores;   // [ceil(n / B), ceil(k / B)], strides in elements; added to
  int64_t scores_stride[2];
  float* movement;  // the same, or null; exact only
  int64_t movement_stride[2];
  const void* w;  // [n, k] wtype; null where movement is
  int64_t w_stride;
  Dtype wtype;
  const Parallel* parallel;
};

struct BlockScoresKernel {
  const char* id;  // "block_scores.cpu.avx512.tile"
  Isa isa;
  const char* serves_text;
  bool (*serves)(const BlockScoresParams& p);
  Status (*run)(const BlockScoresParams& p);
};
struct BlockScoresTable {
  const BlockScoresKernel* rows;
  int count;
};
NB_API BlockScoresTable block_scores_table();
NB_API Status block_scores_run(const BlockScoresParams& p, const char* forced_id);

// --- what the kernel files share -----------------------------------------------------------------

// 64 signs of column k: bit q set is -1 for sample q. A counter-based generator (SplitMix64's
// finaliser: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), so
// that a sign depends on (seed, k, q) and on nothing else.
static inline uint64_t block_scores_mix(uint64_t v) {
  v = (v ^ (v >> 30)) * 0xbf58476d1ce4e5b9ull;
  v = (v ^ (v >> 27)) * 0x94d049bb133111ebull;
  return v ^ (v >> 31);
}
static inline uint64_t block_scores_signs(uint64_t seed, int64_t k) {
  const uint64_t step = 0x9e3779b97f4a7c15ull;
  return block_scores_mix(block_scores_mix(seed + step) + step * (static_cast<uint64_t>(k) + 1));
}

Status block_scores_scalar(const BlockScoresParams& p);
Status block_scores_avx2(const BlockScoresParams& p);
Status block_scores_avx512(const BlockScoresParams& p);

}  // namespace nibblock
