// How a bfloat16 AMX call is cut: into chunks of rows, groups of columns and passes over the summed
// index. Included by cpu_amx_bf16.cpp only; the words and the budget are explained there.
//
// Two ways through the steps, chosen by whether the chunk's packed x fits half of L2 (kResidentX):
//   it does     long passes of 64 steps: both operands come from L2, sums almost never leave the
//               tiles (on AMX this 2 x 2 loop was measured at 102 cycles a step), one pair of units
//               at a time
//   it does not passes of 6 steps, for which L1 (48 KiB) holds 64 columns of weights, 24 KiB,
//               32 rows of x, 12 KiB, and two blocks of sums, 8 KiB. (With longer passes neither
//               weights nor x would survive one pass of the other.) L2 (2 MiB) holds a chunk's
//               slice of x twice, this pass's and the next one's on its way from L3, 384 KiB, and
//               the sums of a group of columns, at most 768 KiB; x is read again for each group,
//               2..4 bytes a cycle.
// Chunks are as large as that allows, 512 rows, because each one dequantises all of W again.
#pragma once

#include "../common/amx.h"
#include "../common/kernel.h"
#include "int4_linear.h"

namespace nibblock {
namespace {

// Steps in a pass, rows in a chunk and sizes in L2: tuned together, see above.
constexpr int64_t kBlockSteps = 6;
constexpr int64_t kLongBlockSteps = 64;  // of a chunk whose x stays in L2
constexpr int64_t kRing = 4;   // steps of weights kept by a chunk of one block, which reuses none
constexpr int64_t kRows = 32;  // rows of x in a block
constexpr int64_t kChunkBlocks = 16;  // blocks of rows in a chunk
constexpr int64_t kUnit = 32;         // columns in a unit
constexpr int64_t kPair = 2;          // units that share a slice of x in L1
constexpr int64_t kStepBytes = 2 * amx::kTileBytes;
constexpr int64_t kSumBytes = 4 * amx::kTileBytes;
constexpr int64_t kResidentX = 1 << 20;    // x of a chunk below this stays in L2 as a whole
constexpr int64_t kGroupSums = 768 << 10;  // sums of a chunk's group of columns
constexpr int64_t kPackedX = 16 << 20;    // packed x held at a time, below malloc's limit for reuse
constexpr int64_t kSerialPack = 1 << 16;  // elements of x below which one thread packs them

struct Problem {
  const Int4LinearParams* p;
  Int4Geometry g;
  int64_t columns, summed;  // of the output; of x
  int64_t units, steps;     // the same in 32s
  int64_t code_bytes;       // of 32 k of a panel
};

// How one run over some blocks of rows is cut. Cuts never fall inside a sum.
struct Plan {
  int64_t first, blocks;   // blocks of 32 rows
  int64_t chunks, groups;  // tasks = chunks x groups of columns
  int64_t block_steps;     // at most, in a pass
  int64_t passes;          // over the steps
  uint8_t* x;              // packed: [chunk][pass][block][step][2 tiles]
};

// Piece i of `total` cut into `parts`.
static inline int64_t cut(int64_t total, int64_t parts, int64_t i) { return total * i / parts; }

static inline int64_t block_tiles(const Problem& q, int64_t block) {
  return q.p->m - block * kRows > 16 ? 2 : 1;
}

static int64_t gcd(int64_t a, int64_t b) { return b ? gcd(b, a % b) : a; }

static Plan make_plan(const Problem& q, int64_t first, int64_t blocks) {
  const int64_t threads = max64(1, q.p->parallel->threads);
  const int64_t pairs = ceil_div(q.units, kPair);
  Plan plan;
  plan.first = first;
  plan.blocks = blocks;
  plan.chunks = ceil_div(blocks, kChunkBlocks);
  // Few columns and many threads: smaller chunks, at the price of dequantising more often.
  while (plan.chunks * pairs < threads && 2 * plan.chunks <= blocks) ++plan.chunks;
  const int64_t chunk_blocks = ceil_div(blocks, plan.chunks);
  const bool resident = chunk_blocks * q.steps * kStepBytes <= kResidentX;
  int64_t group_pairs = 1;
  if (!resident) {
    group_pairs = max64(1, min64(8, kGroupSums / (chunk_blocks * kPair * kSumBytes)));
  }
  plan.groups = ceil_div(pairs, group_pairs);
  const int64_t multiple =
      threads / gcd(threads, plan.chunks);  // the same number of tasks per thread
  plan.groups = min64(pairs, round_up(plan.groups, multiple));
  plan.block_steps = resident ? kLongBlockSteps : kBlockSteps;
  plan.passes = max64(1, ceil_div(q.steps, plan.block_steps));
  plan.x = nullptr;
  return plan;
}

}  // namespace
}  // namespace nibblock
