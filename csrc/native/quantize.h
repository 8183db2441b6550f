// Quantiser: a float32 weight [N, K] -> codes and one scale (and offset) for each row and group of
// K.
//
//     affine      w ~ scale * code + offset             code in 0 .. L, L = 15 or 255
//     symmetric   w ~ scale * (code - Z)                Z = 8 or 128
//
// "rtn": scale and offset from the group's own range, codes rounded to nearest (ties to even).
//     affine:    scale = (max - min) / L, offset = min
//     symmetric: scale = m / -Z, m the value of largest magnitude (min on a tie), so that m is
//     exact
// "mse": the codes, scale and offset with the least weighted squared error found by
//     1. a grid of clipped ranges; for each, codes, then scale and offset by weighted least
//     squares;
//     2. from the best of the grid, codes and least squares in turn until nothing improves;
//     3. a comparison in float64 with rtn, which is kept unless the search beat it.
//
// A group is first scaled by a power of two to a largest magnitude in [1, 2): exact, and no square
// or difference can overflow or vanish. Torch-free. One thread handles a row from end to end, lanes
// are summed in one fixed order and products are never contracted into FMA, so codes and scales are
// bitwise the same at any number of threads and with or without AVX2.
//
// Source: alternating codes and least squares is Lloyd's method on a uniform grid; ours throughout.
#pragma once

#include <stdint.h>

namespace nibblock {
namespace native {

struct QuantizeParams {
  int64_t n, k;
  int64_t group;  // resolved: k (at least 1) for the whole row
  int64_t groups;
  int bits;                 // 4 or 8
  bool affine, search;      // search: "mse"
  const float* weight;      // [n, k]
  const float* importance;  // [k], each group scaled to a largest value in [1, 2); or null
  uint8_t* qweight;         // [n, ceil(k / 2)] (low nibble = even k) or [n, k]
  float* scales;            // [n, groups]
  float* offsets;           // [n, groups], affine only
};

// Floats of scratch that one call needs: five arrays of a padded group and the codes of a row.
inline int64_t quantize_scratch(const QuantizeParams& p) { return 5 * (p.group + 8) + p.k + 8; }

// Quantises rows [begin, end). Returns the first row with a value that is not finite, or -1.
int64_t quantize_rows_baseline(const QuantizeParams& p, int64_t begin, int64_t end, float* scratch);
int64_t quantize_rows_avx2(const QuantizeParams& p, int64_t begin, int64_t end, float* scratch);

}  // namespace native
}  // namespace nibblock
