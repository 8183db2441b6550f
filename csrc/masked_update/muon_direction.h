// muon_direction: the orthogonalised momentum of B x B blocks, by Newton and Schulz's iteration.
//
//     g = grad * multiplier        m = momentum * m + g        u = nesterov ? g + momentum * m : m
//     X = u / ||u||_F, then `steps` times:  A = X^T X,  X = X (a I + b A + c A^2)
//
// The polynomial lifts every singular value towards 1 (0.7 to 1.2 after five steps) and keeps the
// singular vectors. a, b and c are those of Jordan et al., Muon, 2024.
//
// A block is scaled by a power of two before anything is squared, so its size does not matter. Sums
// run over k upwards, one fused multiply-add an element, at every level: the same bits everywhere.
#pragma once

#include <string.h>

#include "masked_update.h"

namespace nibblock {

constexpr float kMuonA = 3.4445f, kMuonB = -4.7750f, kMuonC = 2.0315f;

struct MuonTensor {
  const void* grad;  // [count][B][B]
  void* out;         // as grad
  Dtype type;        // of both: kF32 or kBF16
  float* momentum;   // [count][B][B], or null: u = g
  int64_t count;
  int64_t first_task;  // a task is a block
};
struct MuonParams {
  const MuonTensor* tensors;
  int64_t tensor_count, task_count;
  int64_t block, steps;  // block: 16, 32, 64 or 128
  float momentum;
  bool nesterov;
  float multiplier;
  const Parallel* parallel;
};
struct MuonKernel {
  const char* id;  // "muon_direction.cpu.avx512.tile"
  Isa isa;
  const char* serves_text;
  Status (*run)(const MuonParams& p);
};
struct MuonTable {
  const MuonKernel* rows;
  int count;
};
NB_API MuonTable muon_direction_table();
NB_API Status muon_direction_run(const MuonParams& p);

// Floats of a thread's scratch: X, its successor, A and the polynomial of A.
static inline int64_t muon_scratch(int64_t block) { return 4 * block * block; }

// 2^-floor(log2 m) for the largest magnitude m of a block, whose bits these are. 0 for a block that
// is zero, denormals counting as such, and NaN for one with an infinity or a NaN.
static inline float muon_scale(uint32_t largest) {
  if (largest < 0x00800000u) return 0.0f;
  if (largest >= 0x7f800000u) return NAN;
  const uint32_t exponent = largest >> 23;  // 1 to 254; at 254 the inverse would be denormal
  const uint32_t bits = (exponent < 254 ? 254 - exponent : 1) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  return scale;
}

Status muon_direction_scalar(const MuonParams& p);
Status muon_direction_avx2(const MuonParams& p);
Status muon_direction_avx512(const MuonParams& p);

}  // namespace nibblock
