// Block-sparse products on AMX bfloat16 tiles: how the operands lie, and the loop over them.
//
// x is operand A, plain rows of 32 (blocks of 16: 16) columns; a block is operand B, in pairs of
// the summed index. Forward and dx differ only in how a block becomes B: for dx two stored rows are
// interleaved (2 VPERMT2W for 32 x 2 values), for the forward a 16 x 16 transpose of pairs (150
// cycles for 32 x 32). Either costs more than the four TDPBF16PS (64 cycles) with which 32 rows of
// x meet the block, so blocks are laid out once a call, for all rows and threads, in the order in
// which the product walks them; x is copied into tile order once a chunk, because tile rows 8 KiB
// apart would share one set of L1.
//
// 32 rows x 32 columns of output are four accumulators; a step is four tile loads (32 cycles) under
// four TDPs (64). kPassSteps of blocks stay in L1 while x streams down the chunk from L2, 32 bytes
// a cycle of the 43 it delivers, fetched a tile ahead; sums are loaded and stored once a pass (96
// cycles for up to 768). Blocks of 16 fill half of a TDP: twice the cycles for each product.
//
// An output is a float32 sum over pairs in the order of the layout, the same for any tile, chunk
// and thread. Operands are bfloat16: x as it is, values rounded to nearest.
#pragma once

#include "../int4_linear/cpu_amx_tiles.h"
#include "floats_avx512.h"

#include "cpu_product.h"

namespace nibblock {
namespace {

constexpr int64_t kPassSteps = 12;  // 24 KiB of laid out blocks

template <int B>
struct AmxShape {
  static constexpr int kDeep = B < 32 ? 16 : 32;  // summed in a step
  static constexpr int kSteps = B / kDeep;
  static constexpr int kCols = B < 32 ? 16 : 32;  // output columns of a panel
  static constexpr int kColTiles = kCols / 16;
  static constexpr int kTile = kDeep * 32;  // bytes, of either operand
  static constexpr int kPanelBytes = kSteps * kColTiles * kTile;
  static constexpr int kBlockBytes = B * B * 2;      // [panel][step][column tile]
  static constexpr int kPass = kPassSteps / kSteps;  // blocks
  static constexpr int kRows = 32;                   // of x in two tiles
};

// Tiles 0..3 are sums (rows i, columns j at 2i + j), 4 and 5 x, 6 and 7 blocks.
template <int B>
static amx::TileConfig block_tiles() {
  amx::TileConfig c = amx::full_tiles();
  for (int t = 4; B < 32 && t < 6; ++t) {
    c.row_bytes[t] = 32;
    c.rows[t + 2] = 8;
  }
  return c;
}

// Block `z` as operand B. `live` of its summed rows exist; the others become zero, whatever they
// hold, because 0 * NaN is NaN.
template <int B>
static void lay_out_tiles(const void* values, Dtype type, int64_t z, bool dx, int64_t live,
                          uint8_t* out) {
  using S = AmxShape<B>;
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  alignas(64) uint8_t rows[amx::kTileBytes];
  for (int c0 = 0; c0 < B; c0 += S::kCols) {
    for (int d0 = 0; d0 < B; d0 += S::kDeep, out += S::kColTiles * S::kTile) {
      if (dx) {  // rows are n, which is summed; columns k
        for (int j = 0; j < S::kDeep / 2; ++j) {
          const int64_t n = d0 + 2 * j, at = (z * B + n) * B + c0;
          const __m512i even = load_row_bf16(values, type, at, n < live ? S::kCols : 0);
          const __m512i odd = load_row_bf16(values, type, at + B, n + 1 < live ? S::kCols : 0);
          _mm512_store_si512(out + 64 * j, _mm512_permutex2var_epi16(even, low, odd));
          if (S::kColTiles == 1) continue;
          _mm512_store_si512(out + S::kTile + 64 * j, _mm512_permutex2var_epi16(even, high, odd));
        }
        continue;
      }
      for (int t = 0; t < S::kColTiles; ++t) {  // rows are n, the columns of the output
        for (int i = 0; i < 16; ++i) {
          const int64_t at = (z * B + c0 + 16 * t + i) * B + d0;
          const int64_t count = min64(S::kDeep, live - d0);
          _mm512_store_si512(rows + 64 * i, load_row_bf16(values, type, at, count));
        }
        compiler_barrier();
        __m512i pairs[16];
        transpose16(rows, 64, pairs);
        for (int j = 0; j < S::kDeep / 2; ++j) {
          _mm512_store_si512(out + t * S::kTile + 64 * j, pairs[j]);
        }
      }
    }
  }
}

// All blocks, in the order of the walk.
template <int B>
static void lay_out_all(const Walk& w, const void* values, Dtype type, int64_t begin, int64_t end,
                        uint8_t* out) {
  for (int64_t e = begin; e < end; ++e) {
    const int64_t z = w.block ? w.block[e] : e, live = min64(B, w.in_size - w.in[e] * B);
    lay_out_tiles<B>(values, type, z, w.dx, live, out + e * AmxShape<B>::kBlockBytes);
  }
}

// Rows [32 * pair, ...) of x as [column block][step][pair][2 tiles]; zeros outside of x.
template <int B>
static void pack_pair(const Walk& w, const void* x, Dtype type, int64_t stride, const PackedRows& p,
                      int64_t pair) {
  using S = AmxShape<B>;
  uint8_t* out = static_cast<uint8_t*>(p.data) + pair * 2 * S::kTile;
  const int64_t step_bytes = p.tiles * 2 * S::kTile;
  for (int64_t r = 0; r < S::kRows; ++r) {
    const int64_t m = pair * S::kRows + r;
    uint8_t* to = out + r * S::kDeep * 2;
    for (int64_t j = 0; j < w.ins; ++j) {
      if (w.used[j] == w.used[j + 1]) continue;
      for (int s = 0; s < S::kSteps; ++s) {
        const int64_t k = j * B + s * S::kDeep;
        const int64_t count = m < p.rows ? min64(S::kDeep, w.in_size - k) : 0;
        const __m512i v = load_row_bf16(x, type, (p.m0 + m) * stride + k, count);
        uint8_t* at = to + (j * S::kSteps + s) * step_bytes;
        if (S::kDeep == 32) {
          _mm512_storeu_si512(at, v);
        } else {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_castsi512_si256(v));
        }
      }
    }
  }
}

struct AmxJob {
  const uint8_t* x;    // first row pair, column block 0
  int64_t step_bytes;  // of x from one step to the next
  const int32_t* in;   // column block of each entry
  int64_t count;
  const uint8_t* w;  // first entry's panel
  float* acc;
  int64_t acc_stride;  // bytes
  bool first;
};

// Two tiles of rows (one with Single) times the entries of a pass.
template <int B, bool Single>
NB_AMX_INLINE void multiply_pair(const AmxJob& t) {
  using S = AmxShape<B>;
  constexpr bool kWide = S::kColTiles == 2;
  char* acc = reinterpret_cast<char*>(t.acc);
  char* below = acc + 16 * t.acc_stride;
  if (t.first) {
    amx::zero<0>();
    if (kWide) amx::zero<1>();
    if (!Single) amx::zero<2>();
    if (!Single && kWide) amx::zero<3>();
  } else {
    amx::load<0>(acc, t.acc_stride);
    if (kWide) amx::load<1>(acc + 64, t.acc_stride);
    if (!Single) amx::load<2>(below, t.acc_stride);
    if (!Single && kWide) amx::load<3>(below + 64, t.acc_stride);
  }
  for (int64_t e = 0; e < t.count; ++e) {
    const uint8_t* w = t.w + e * S::kBlockBytes;
    const uint8_t* x = t.x + t.in[e] * S::kSteps * t.step_bytes;
    for (int s = 0; s < S::kSteps; ++s, x += t.step_bytes, w += S::kColTiles * S::kTile) {
      amx::load<4>(x, S::kDeep * 2);
      amx::load<6>(w, 64);
      amx::dot_bf16<0, 4, 6>();
      if (kWide) {
        amx::load<7>(w + S::kTile, 64);
        amx::dot_bf16<1, 4, 7>();
      }
      if (!Single) {
        amx::load<5>(x + S::kTile, S::kDeep * 2);
        amx::dot_bf16<2, 5, 6>();
        if (kWide) amx::dot_bf16<3, 5, 7>();
      }
#pragma GCC unroll 32
      for (int i = 0; i < 2 * S::kTile; i += 64) {  // the next pair's tiles
        _mm_prefetch(reinterpret_cast<const char*>(x + 2 * S::kTile + i), _MM_HINT_T0);
      }
    }
  }
  amx::store<0>(acc, t.acc_stride);
  if (kWide) amx::store<1>(acc + 64, t.acc_stride);
  if (!Single) amx::store<2>(below, t.acc_stride);
  if (!Single && kWide) amx::store<3>(below + 64, t.acc_stride);
}

}  // namespace
}  // namespace nibblock
