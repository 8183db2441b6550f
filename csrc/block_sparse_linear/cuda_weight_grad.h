// block_weight_grad on CUDA tensor cores: which thread does what, places in shared memory, and how
// the sum over tokens is cut. Plain functions that g++ compiles too; tests/cpp/cuda_weight_grad.cpp
// runs them all.
//
//     out_z[n, k] = sum_m g[m, I_z B + n] * x[m, J_z B + k]
//
//   - Tokens are the inner dimension of the product. g and x lie token by token, so both operands
//     are read transposed out of shared memory, which ldmatrix does; nothing is transposed before.
//   - A thread block takes a run of neighbours of the block list: 4 blocks of 32, 2 of 64, one of
//     128. A stage is 32 tokens of 128 columns of x (32 or 64 of each block) and of as many columns
//     of g as the run has block rows. The list is sorted by block row, so neighbours mostly share
//     g's.
//   - A row of a stage is 256 bytes. Its 16-byte units are permuted by the token's low bits, so
//     that the 8 rows of an 8 x 8 matrix meet all banks.
//   - Few blocks and many tokens: the tokens are cut into parts of whole stages, by the shapes
//     alone. Every part leaves float32 sums; whoever comes last adds them in the order of the
//     tokens. No sum has atomics, and the bits are the same on every run and device.
//
// Sources: fragments of mma.m16n8k16, ldmatrix and cp.async as in NVIDIA's PTX ISA manual; one
// program for each stored block as in Gale et al., arXiv 2211.15841.
#pragma once

#include <stdint.h>

#include "../common/cuda_host_device.h"

namespace nibblock {
namespace cuda {

constexpr int kGradTokens = 32;    // of one stage: two products deep
constexpr int kGradColumns = 128;  // of x and, at most, of g
constexpr int kGradUnits = kGradColumns / 8;
constexpr int kGradOperand = kGradTokens * kGradColumns * 2;  // bytes of one operand of a stage
constexpr int kGradStages = 4;
constexpr int kGradRows = kGradStages * 2 * kGradOperand;  // place of the run's block rows
constexpr int kGradFlag = kGradRows + 16;                  // place of "this one came last"
constexpr int kGradSharedBytes = kGradFlag + 16;

// What the compiler knows of one kernel. A warp's tile is 32 x 32, of blocks of 128 64 x 32.
template <int kBlock>
struct GradShape {
  static constexpr int block = kBlock;
  static constexpr int run = kGradColumns / kBlock;      // blocks of a thread block
  static constexpr int n_tiles = kBlock == 128 ? 4 : 2;  // of 16 n, of a warp
  static constexpr int k_pairs = 2;                      // of 16 k, of a warp
  static constexpr int warps_n = kBlock / (16 * n_tiles);
  static constexpr int warps_k = kBlock / (16 * k_pairs);
  static constexpr int warps = run * warps_n * warps_k;
  static constexpr int threads = 32 * warps;
  static constexpr int sums = n_tiles * k_pairs * 2;  // of 4 float32, of a thread
  static constexpr int slot = sums * threads;         // Floats4 of one part of a run
};

// A warp's block of the run, and where its tile begins in it.
struct GradTile {
  int local, n, k;
};
template <class Shape>
NB_HD GradTile grad_tile(int warp) {
  const int in_block = warp % (Shape::warps_n * Shape::warps_k);
  return {warp / (Shape::warps_n * Shape::warps_k), in_block / Shape::warps_k * 16 * Shape::n_tiles,
          in_block % Shape::warps_k * 16 * Shape::k_pairs};
}

// Byte of an operand's stage where unit `unit` (8 columns) of a token lies.
NB_HD int grad_place(int token, int unit) {
  return (token * kGradUnits + (unit ^ (token & 7))) * 16;
}

// The row of 8 columns whose address a lane brings to ldmatrix. Operand of 16 n: matrices (tokens
// 0-7, n 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15), which are its registers in order. Operand of
// 16 k: (0-7, k 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15), i.e. both registers of each 8 k.
struct GradRow {
  int token, unit;
};
NB_HD GradRow grad_row_n(int lane) { return {(lane & 7) + 8 * (lane >> 4), (lane >> 3) & 1}; }
NB_HD GradRow grad_row_k(int lane) { return {(lane & 7) + 8 * ((lane >> 3) & 1), lane >> 4}; }

// Parts of the tokens: about two thread blocks for each of 132 multiprocessors (an H100's or
// H200's; 108 are an A100's), no part below 256 tokens. A constant, so that the bits of a gradient
// do not follow the device.
struct GradSplit {
  int32_t parts, tokens;  // tokens of a part, whole stages
};
NB_HD GradSplit grad_split(int64_t runs, int64_t m) {
  constexpr int64_t kWanted = 264, kFewest = 256;
  int64_t parts = runs > 0 ? (kWanted + runs - 1) / runs : 1;
  const int64_t most = m / kFewest;
  if (parts > most) parts = most;
  if (parts < 1) parts = 1;
  int64_t tokens = (m + parts - 1) / parts;
  tokens = (tokens + kGradTokens - 1) / kGradTokens * kGradTokens;
  if (tokens < kGradTokens) tokens = kGradTokens;
  parts = (m + tokens - 1) / tokens;
  if (parts < 1) parts = 1;
  return {static_cast<int32_t>(parts), static_cast<int32_t>(tokens)};
}

}  // namespace cuda
}  // namespace nibblock
