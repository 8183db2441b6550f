// int4_linear on compute capability 9.0 for more rows of x than decoding has: shapes, places in
// shared memory, the matrix descriptor of x and its tensor map. Plain functions that g++ compiles
// too; tests/cpp/cuda_tile.cpp runs them all.
//
// A block makes 128 rows of the weight times 64 or 128 tokens: y^T = W x^T, so that the weight is
// the tensor cores' A operand, which may come from registers and therefore out of a conversion.
//
//     warpgroup 2, warp 0    copies: x by tensor map, codes, scales and offsets by bulk copies
//     warpgroups 0 and 1     64 rows each: convert, multiply, scale, store
//
// Stages of 128 k go round between them through two barriers each: `full` counts bytes, `empty`
// counts the 8 warps that have read the stage.
//
//   - x: two boxes of 64 k. A token is one row of 128 bytes, its eight 16-byte units exchanged by
//     the 128-byte swizzle (unit ^ row % 8), which the tensor map writes and the descriptor reads.
//     k behind K and tokens behind M arrive as zeros.
//   - Codes: the packed layout of the CPU (int4_linear.h), 128 k of a panel being one run of 1 KiB
//     (8 bits: 2 KiB). Each warp has one panel, the 16 rows that m64nNk16 wants from a warp. Lane
//     4g + t needs of every 8 k the pair k 2t, 2t + 1 of two rows: it loads the words of rows 2g
//     and 2g + 1 of that line, 8 bytes, which the four lanes of a quad share, and shifts by its
//     own t. So slot g of the product is row 2g of the panel and slot g + 8 row 2g + 1, k stands
//     in its natural order, as the tensor map delivers x, and a lane ends with neighbouring rows.
//   - Scales multiply float32 sums. A product adds the 32, 64 or 128 k of one group into `part`;
//     then sums += scale * part, as the decode kernel does. Scaling the weights themselves would
//     round them to 16 bits; this way codes and products are exact, and the error stays that of
//     float32 sums. Offsets multiply sums of x over the same k, which a small kernel leaves in
//     global memory before (16-byte loads, one float for each token and slot), because inside it
//     would be a third product.
//
// What one tile of T tokens takes for every 128 k, counted, not measured; a multiprocessor makes
// 4096 operations of the tensor cores and 128 lanes of others a clock:
//
//                                                            T = 64      T = 128
//     products, 128 * T * 128 * 2 operations                  512         1024 clocks
//     x from shared memory, twice, 128 bytes a clock          256          512
//     codes from shared memory, 128 loads of a warp           128          128
//     conversion, 128 * 128 / 2 pairs of 3.5 instructions     224          224
//     scales, groups of 128 and more: 128 * T                  64          128
//     ... groups of 64 / 32                               128 / 256    256 / 512
//     offsets                                             as much again as scales
//     from memory or L2: 8 KiB of codes, 256 T bytes of x      24           40 KiB
//
// The tensor cores are the ceiling at groups of 64 and more: the other work takes 56 % (T = 64) and
// 34 % (T = 128) of the issue slots beside them, and one warpgroup's scaling lies under the other's
// products. From memory a block needs at most 24 KiB in 512 clocks while all of them meet the
// same weights in L2; with M <= T the weights are read once, and 8 KiB in 512 clocks are 3.9 TB/s
// over 132 multiprocessors: M = 64 is near the balance of the machine, M = 128 computes.
//
// 256 tokens would halve the conversions, but `part` and `sums` would then take 256 registers of a
// thread.
//
// Sources: fragments, descriptors and swizzle as in NVIDIA's PTX ISA manual, sections wgmma and
// tensor copies; the tensor map as in the CUDA driver API; stream-K as in cuda_decode.h; weights as
// the operand from registers and warps with roles as in NVIDIA's CUTLASS mixed-input GEMM.
#pragma once

#include "cuda_decode.h"

namespace nibblock {
namespace cuda {

constexpr int kTileRows = 128;  // rows of the weight in one tile
constexpr int kGroupRows = 64;  // of one warpgroup
constexpr int kTilePanels = kTileRows / kPanel;
constexpr int kBoxK = 64;  // k of one box of x: 128 bytes
constexpr int kBoxes = kStageK / kBoxK;
constexpr int kProductK = 16;    // k of one product
constexpr int kConsumers = 256;  // threads of the two warpgroups that multiply
constexpr int kTileThreads = kConsumers + 128;
constexpr int kTileWarps = kConsumers / 32;
constexpr int kSwizzleBytes = 1024;  // eight rows: where the pattern begins anew
constexpr int kSharedMost = 227 * 1024;

// What the compiler knows of one kernel.
template <int kCount, int kBits, bool kAffine>
struct TileShape {
  static constexpr int tokens = kCount;
  static constexpr int bits = kBits;
  static constexpr bool affine = kAffine;
  static constexpr int halves = kBits / 4;  // lines of 64 bytes for each 8 k
  static constexpr int sums = kCount / 2;   // float32 of a lane: 16 rows times tokens over 32 lanes
  static constexpr int box_bytes = kCount * kBoxK * 2;
  static constexpr int panel_bytes = kStageK / 8 * 64 * halves;
  static constexpr int scale_pitch = kMaxStageG * kPanel * 4;  // of a panel
  static constexpr int scale_bytes = kTilePanels * scale_pitch;
  static constexpr int codes_at = kBoxes * box_bytes;
  static constexpr int scales_at = codes_at + kTilePanels * panel_bytes;
  static constexpr int offsets_at = scales_at + scale_bytes;
  static constexpr int x_sums_at = offsets_at + (kAffine ? scale_bytes : 0);
  static constexpr int stage_bytes = x_sums_at + (kAffine ? kMaxStageG * kCount * 4 : 0);
  static constexpr int fit = (kSharedMost - kSwizzleBytes - 256) / stage_bytes;
  static constexpr int stages = fit < 8 ? fit : 8;
  static constexpr int barriers_at = stages * stage_bytes;  // full and empty of each stage
  static constexpr int flags_at = barriers_at + 16 * stages;
  static constexpr int shared_bytes = flags_at + 16;
  static constexpr int launch_bytes = shared_bytes + kSwizzleBytes;  // with room to align
  static constexpr int slot_floats = kTileRows * kCount;             // of one partial tile
  static_assert(stage_bytes % kSwizzleBytes == 0, "the swizzle begins anew with every stage");
};

// --- which lane holds what -----------------------------------------------------------------------

// Row of its panel in slot `slot` (0..15) of a warp's share of a product.
NB_HD int tile_slot_row(int slot) { return 2 * (slot & 7) + (slot >> 3); }
// Byte of a panel's codes in a stage where a lane finds rows 2g and 2g + 1 of line `line` (8 k).
NB_HD int tile_code_byte(int halves, int line, Lane at) {
  return (line * halves + (halves == 2 ? at.t & 1 : 0)) * 64 + 8 * at.g;
}
// Shift that brings the lane's pair, k 2t and 2t + 1 of the line, to where `pair` takes it.
NB_HD int tile_code_shift(int bits, Lane at) { return bits == 4 ? 4 * at.t : 8 * (at.t >> 1); }

// --- x in shared memory --------------------------------------------------------------------------

// Byte where product `product` (0..7, 16 k each) of a stage begins in its boxes of x.
NB_HD int tile_product_byte(int tokens, int product) {
  constexpr int kEach = kBoxK / kProductK;
  return product / kEach * tokens * kBoxK * 2 + product % kEach * kProductK * 2;
}

// The matrix descriptor of [tokens][16 k] at a shared-memory address, k contiguous, 128-byte
// swizzle. Bits 0-13: address / 16. 16-29: offset along k, not used with a swizzle, 1. 32-45: bytes
// from eight rows to the next eight, / 16. 49-51: 0, the pattern begins at a multiple of 1024.
// 62-63: 1, swizzle of 128 bytes.
NB_HD uint64_t tile_descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(1) << 16 |
         static_cast<uint64_t>(kSwizzleBytes >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

// The tensor map of x, by the arguments of the driver's cuTensorMapEncodeTiled.
struct BoxMap {
  const void* address;  // multiple of 16
  uint64_t size[2];     // elements: K, M
  uint64_t row_bytes;   // multiple of 16
  uint32_t box[2];
  int element;  // CUtensorMapDataType: 9 bfloat16, 6 float16
  int swizzle;  // CUtensorMapSwizzle: 3 is 128 bytes
};
NB_HD BoxMap tile_map(const void* x, int64_t m, int64_t k, int64_t x_stride, int tokens,
                      bool is_bf16) {
  BoxMap map;
  map.address = x;
  map.size[0] = static_cast<uint64_t>(k);
  map.size[1] = static_cast<uint64_t>(m);
  // A single row needs no stride, but the driver wants one.
  map.row_bytes = static_cast<uint64_t>(m == 1 ? (k + 7) / 8 * 8 : x_stride) * 2;
  map.box[0] = kBoxK;
  map.box[1] = static_cast<uint32_t>(tokens);
  map.element = is_bf16 ? 9 : 6;
  map.swizzle = 3;
  return map;
}
NB_HD bool tile_map_exists(const void* x, int64_t m, int64_t k, int64_t x_stride) {
  return reinterpret_cast<uintptr_t>(x) % 16 == 0 && m >= 1 && k >= 1 &&
         (m == 1 || x_stride % 8 == 0) && x_stride < int64_t(1) << 38;
}

// --- sums of x for offsets -----------------------------------------------------------------------

// Slots of min(group, 128) k, whole stages of them; those behind K stay 0. [slots][m_pad] floats.
NB_HD int x_sum_shift(int shift) { return shift < 7 ? shift : 7; }
NB_HD int64_t x_sum_slots(int64_t chunks, int shift) { return chunks * stage_groups(shift); }

}  // namespace cuda
}  // namespace nibblock
