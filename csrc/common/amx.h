// The AMX tile operations nibblock uses, with tile numbers known at compile time.
//
// Built normally each is one instruction. They are written as asm rather than with _tile_loadd and
// its kin for two reasons: GCC's macros paste the tile number as text, so it cannot be a template
// argument, and they declare no memory operand, so GCC may move a store of freshly dequantised
// weights past the tile load that reads it. The "memory" clobber here closes that hole.
//
// Built with -DNIBBLOCK_EMULATE_AMX they are a software model (amx_emulation.h), so that a machine
// without AMX can prove the kernels.
//
// Rules: configure() at the start of a task and release() at its end. The tile state belongs to the
// thread and is shared with whatever else runs on it (oneDNN reconfigures it), so "already
// configured" never survives a task.
#pragma once

#include <stdint.h>
#include <string.h>

namespace nibblock {
namespace amx {

constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 64;
constexpr int kTileBytes = kTileRows * kTileRowBytes;

// The operand of LDTILECFG: palette 1 is eight tiles of at most 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "LDTILECFG reads 64 bytes");

// Every tile 16 x 64 bytes.
static inline TileConfig full_tiles() {
  TileConfig c;
  memset(&c, 0, sizeof c);
  c.palette = 1;
  for (int t = 0; t < 8; ++t) {
    c.row_bytes[t] = kTileRowBytes;
    c.rows[t] = kTileRows;
  }
  return c;
}

}  // namespace amx
}  // namespace nibblock

#ifdef NIBBLOCK_EMULATE_AMX
#include "amx_emulation.h"
#else

namespace nibblock {
namespace amx {

static inline void configure(const TileConfig& c) {
  __asm__ volatile("ldtilecfg %0" : : "m"(c) : "memory");
}
static inline void release() { __asm__ volatile("tilerelease" : : : "memory"); }

// Tile T from rows at p, p + stride, ... (stride in bytes).
template <int T>
static inline void load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
static inline void store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
static inline void zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
}

// C[m][n] += sum over pairs of bfloat16: A rows are m, B rows are pairs of the summed index.
template <int C, int A, int B>
static inline void dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
// C[m][n] += sum over quadruples of int8 (both signed), in int32.
template <int C, int A, int B>
static inline void dot_int8() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

}  // namespace amx
}  // namespace nibblock
#endif
