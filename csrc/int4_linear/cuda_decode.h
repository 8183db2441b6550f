// int4_linear on CUDA tensor cores for few rows of x: layout maps, shared-memory places and the
// schedule. Plain functions that g++ compiles too; tests/cpp/cuda_decode.cpp runs them all.
//
// The packed layout is the CPU's (int4_linear.h): no second copy of a weight exists. It fits the
// tensor cores without any shuffle:
//
//   - One line is 64 bytes: 8 consecutive k of 16 rows, one 32-bit word a row. A lane of a warp
//     loads 16 bytes, i.e. 4 rows of 8 k. Lane 4g + t takes rows 4 (g % 4) .. + 3 of line 4s + t of
//     panel g / 4 of a pair of panels: the 32 lanes read two whole runs of 256 bytes, and step s
//     covers 32 rows times 32 k.
//   - m16n8k16 wants from lane 4g + t the weight rows g and g + 8. Which row of the weight stands
//     in slot g is free, as long as it goes back to the same place: two products (u = 0, 1) use
//     slots g and g + 8 for rows 4 (g % 4) + 2u and + 2u + 1 of panel g / 4. In the end a lane owns
//     4 consecutive rows of y, which is one 8-byte store.
//   - Which k stands in which of the 16 columns is free too, if x follows: product i (i = 0, 1)
//     gives columns 2t, 2t + 1 the pair k 4i, 4i + 1 of the lane's line, and columns 2t + 8, 2t + 9
//     the pair 4i + 2, 4i + 3. The x fragments of both products are then 8 consecutive k of one
//     token: 16 bytes, one load.
//   - The pairs come out of a word by a mask (`pairs` in cuda_decode_body.cuh), because the word
//     holds even k in its low and odd k in its high half.
//
// A lane reads from shared memory only those weight bytes that it copied there itself, so weights
// need no barrier and have no bank conflicts; x and the scales are shared by the block and need one
// barrier for each stage of 128 k.
//
// Work is cut by stream-K: units of (row tile, token tile, 128 k) in one line, the persistent
// blocks take equal shares of it. A tile that several blocks touched is summed by the last of them
// to arrive, in the order of k, whoever that is: no atomics in sums, and the same bits on every run
// of one device.
//
// A block-sparse adapter (blocks of 32, 64 or 128) rides along: a block row covers the warp's 32
// rows, and a block's 32 columns of one step are the k of that step. Its values, row-major, give a
// lane 8 consecutive k of its 4 rows, which is the fragment that the codes give after conversion;
// the x they meet is in shared memory already. So an adapter costs the bytes of its values and
// neither reads x nor writes y again.
//
// Sources: fragment layout of mma.m16n8k16 and cp.async as in NVIDIA's PTX ISA manual; the stream-K
// decomposition of Osama et al., arXiv 2301.03598; weights as the 16-row operand and deep
// asynchronous loads as in Frantar et al., arXiv 2408.11743; the magic-number conversion of Kim et
// al., arXiv 2211.10017. The use of one layout for CPU and GPU is ours.
#pragma once

#include <stdint.h>

#include "../common/cuda_host_device.h"

namespace nibblock {
namespace cuda {

constexpr int kStageK = 128;  // k of one stage, and of one unit of the schedule
constexpr int kStepK = 32;    // k of one step: four lines
constexpr int kSteps = kStageK / kStepK;
constexpr int kPanel = 16;        // rows of a panel
constexpr int kWarpRows = 32;     // rows of a warp: a pair of panels
constexpr int kMaxStageG = 4;     // groups of one stage, at group 32
constexpr int kLaneBytes = 16;    // bytes of one copy
constexpr int kTokens = 8;        // tokens of one m16n8k16
constexpr int kMaxRowsOfX = 128;  // beyond, other kernels serve

// What the compiler knows of one kernel: nt token tiles of 8, warps of a block, stages in flight,
// whether a block-sparse adapter is added.
template <int kNt, int kBits, bool kAffine, bool kAdapter = false>
struct DecodeShape {
  static constexpr int nt = kNt;
  static constexpr int bits = kBits;
  static constexpr bool affine = kAffine;
  static constexpr bool adapter = kAdapter;
  static constexpr int halves = kBits / 4;  // 16-byte copies of a lane for each step
  // Many tokens read many x bytes for each weight byte: more rows then share one copy of x.
  static constexpr int warps = kNt <= 2 ? 4 : 8;
  static constexpr int threads = 32 * warps;
  static constexpr int rows = kWarpRows * warps;
  static constexpr int tokens = kTokens * kNt;
  static constexpr int weight_bytes = warps * kSteps * halves * 32 * kLaneBytes;
  static constexpr int x_bytes = tokens * kStageK * 2;
  static constexpr int scale_bytes = warps * kMaxStageG * 8 * kLaneBytes;
  static constexpr int x_at = weight_bytes;
  static constexpr int scales_at = x_at + x_bytes;
  static constexpr int offsets_at = scales_at + scale_bytes;
  static constexpr int stage_bytes = offsets_at + (kAffine ? scale_bytes : 0);
  static constexpr int stages = kNt <= 2 ? 4 : kBits == 4 ? 3 : 2;
  static constexpr int flag_at = stages * stage_bytes;  // "this block came last", one word
  static constexpr int shared_bytes = flag_at + 16;
  static constexpr int slot_floats = rows * tokens;  // of one partial tile
};

// --- which lane holds what -----------------------------------------------------------------------

struct Lane {
  int g, t;  // lane = 4g + t, as the PTX manual names them
};
NB_HD Lane lane_of(int thread) { return {(thread & 31) >> 2, thread & 3}; }

// First of the 4 consecutive rows (of the warp's 32) that lane group g loads, scales and stores.
NB_HD int lane_row(int g) { return (g >> 2) * kPanel + 4 * (g & 3); }
// Row of the warp's 32 in slot `slot` (0..15) of product u.
NB_HD int slot_row(int u, int slot) { return lane_row(slot & 7) + 2 * u + (slot >> 3); }
// k of the step (0..31) in column `column` (0..15) of product i.
NB_HD int column_k(int i, int column) {
  return 8 * ((column & 7) >> 1) + 4 * i + 2 * (column >> 3) + (column & 1);
}

// Byte of the codes of a panel where a lane's 16 bytes start. line_k: any k of its line.
NB_HD int64_t weight_byte(int halves, int line_k, int half, int g) {
  return (static_cast<int64_t>(line_k >> 3) * halves + half) * 64 + 16 * (g & 3);
}

// --- places in shared memory, in bytes of one stage ----------------------------------------------

NB_HD int weight_place(int halves, int warp, int step, int half, int lane) {
  return (((warp * kSteps + step) * halves + half) * 32 + lane) * kLaneBytes;
}

// Unit `unit` (8 k, 16 bytes) of a token. A quarter of a warp loads 4 units of 2 neighbouring
// tokens, 256 bytes apart: bit 2 of the unit is flipped in odd tokens, so that the 8 loads meet all
// 32 banks.
NB_HD int x_place(int token, int unit) {
  return (token * (kStageK / 8) + (unit ^ ((token & 1) << 2))) * kLaneBytes;
}

// Four scales (or offsets) of a group of the stage for lane group g.
NB_HD int scale_place(int warp, int slot, int g) {
  return ((warp * kMaxStageG + slot) * 8 + g) * kLaneBytes;
}

// --- groups --------------------------------------------------------------------------------------

// Shift that turns k into its group; a whole row is one group.
NB_HD int group_shift(int64_t group) {
  return group == 32 ? 5 : group == 64 ? 6 : group == 128 ? 7 : group == 256 ? 8 : 31;
}
// Groups that one stage touches.
NB_HD int stage_groups(int shift) { return shift < 7 ? kStageK >> shift : 1; }
// Group of the stage that step belongs to, and whether its sums are scaled after this step.
NB_HD int step_slot(int shift, int step) { return (kStepK * step) >> shift; }
NB_HD bool step_ends_group(int shift, int step) {
  return shift >= 7 ? step == kSteps - 1 : ((kStepK * (step + 1)) & ((1 << shift) - 1)) == 0;
}

// --- the schedule --------------------------------------------------------------------------------

// Units lie in one line: tile by tile, inside a tile by k. Tiles count token tiles fastest, so that
// blocks that need the same weights run at the same time and meet them in the L2 cache.
struct Schedule {
  int32_t chunks;       // units of one tile: stages along k
  int32_t token_tiles;  // along m
  int32_t tiles;        // row tiles * token_tiles
  int32_t blocks;       // of the persistent grid, at most tiles * chunks
};

NB_HD int64_t units(const Schedule& s) { return static_cast<int64_t>(s.tiles) * s.chunks; }
// First unit of a block; that of block `blocks` is the end.
NB_HD int64_t first_unit(const Schedule& s, int block) { return units(s) * block / s.blocks; }
// The block that has a unit.
NB_HD int owner(const Schedule& s, int64_t unit) {
  return static_cast<int>(((unit + 1) * s.blocks - 1) / units(s));
}

// Where a block stands in its share of the units.
struct Cursor {
  int32_t tile, chunk;
};
NB_HD Cursor cursor_at(const Schedule& s, int64_t unit) {
  return {static_cast<int32_t>(unit / s.chunks), static_cast<int32_t>(unit % s.chunks)};
}
NB_HD void advance(Cursor& c, int chunks) {
  if (++c.chunk == chunks) {
    c.chunk = 0;
    ++c.tile;
  }
}

// The blocks that share a tile: first .. last. One block alone writes y at once.
struct Sharers {
  int first, last;
};
NB_HD Sharers sharers(const Schedule& s, int tile) {
  const int64_t begin = static_cast<int64_t>(tile) * s.chunks;
  return {owner(s, begin), owner(s, begin + s.chunks - 1)};
}

// A block leaves at most two partial tiles, where its share begins and where it ends: slot 0 for
// the first tile it touches, slot 1 for the last one if that is another.
NB_HD int64_t partial_slot(const Schedule& s, int block, int tile) {
  const bool begins = tile == first_unit(s, block) / s.chunks;
  return 2 * static_cast<int64_t>(block) + (begins ? 0 : 1);
}

}  // namespace cuda
}  // namespace nibblock
