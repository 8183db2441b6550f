// A software model of the AMX tiles, for tests on machines without AMX (see amx.h). One state per
// thread. Every misuse that the hardware answers with a fault aborts here with its name, and so do
// two it would let pass but that are always bugs in our kernels: using a tile that was never
// written since it was configured, and leaving a task without TILERELEASE (checked by released()).
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace nibblock {
namespace amx {

struct EmulatedTiles {
  bool configured;
  TileConfig config;
  bool written[8];
  alignas(64) uint8_t data[8][kTileRows][kTileRowBytes];
};

// One state for all files of a library: inline, not static.
inline EmulatedTiles& emulated_tiles() {
  static thread_local EmulatedTiles tiles;
  return tiles;
}

static inline void emulation_check(bool ok, const char* what) {
  if (ok) return;
  fprintf(stderr, "AMX emulation: %s\n", what);
  abort();
}

static inline bool released() { return !emulated_tiles().configured; }

static inline void configure(const TileConfig& c) {
  EmulatedTiles& t = emulated_tiles();
  emulation_check(c.palette == 1, "LDTILECFG: palette must be 1");
  emulation_check(c.start_row == 0, "LDTILECFG: start_row must be 0");
  for (int i = 0; i < 14; ++i) emulation_check(c.reserved[i] == 0, "LDTILECFG: reserved byte set");
  for (int i = 0; i < 16; ++i) {
    if (i >= 8) {
      emulation_check(c.rows[i] == 0 && c.row_bytes[i] == 0, "LDTILECFG: there are 8 tiles");
      continue;
    }
    emulation_check(c.rows[i] <= kTileRows && c.row_bytes[i] <= kTileRowBytes,
                    "LDTILECFG: tile larger than 16 x 64 bytes");
    emulation_check((c.rows[i] == 0) == (c.row_bytes[i] == 0), "LDTILECFG: half-empty tile");
  }
  memset(&t, 0, sizeof t);
  t.config = c;
  t.configured = true;
}

static inline void release() {
  memset(static_cast<void*>(&emulated_tiles()), 0, sizeof(EmulatedTiles));
}

static inline EmulatedTiles& usable_tiles(int tile) {
  EmulatedTiles& t = emulated_tiles();
  emulation_check(t.configured, "tile used without LDTILECFG in this task");
  emulation_check(t.config.rows[tile] > 0, "tile used that the configuration leaves empty");
  return t;
}

template <int T>
static inline void load(const void* p, int64_t stride) {
  EmulatedTiles& t = usable_tiles(T);
  memset(t.data[T], 0, sizeof t.data[T]);
  for (int r = 0; r < t.config.rows[T]; ++r) {
    memcpy(t.data[T][r], static_cast<const char*>(p) + r * stride, t.config.row_bytes[T]);
  }
  t.written[T] = true;
}

template <int T>
static inline void store(void* p, int64_t stride) {
  EmulatedTiles& t = usable_tiles(T);
  emulation_check(t.written[T], "TILESTORED of a tile that was never written");
  for (int r = 0; r < t.config.rows[T]; ++r) {
    memcpy(static_cast<char*>(p) + r * stride, t.data[T][r], t.config.row_bytes[T]);
  }
}

template <int T>
static inline void zero() {
  EmulatedTiles& t = usable_tiles(T);
  memset(t.data[T], 0, sizeof t.data[T]);
  t.written[T] = true;
}

static inline EmulatedTiles& operand_tiles(int c, int a, int b) {
  usable_tiles(c);
  usable_tiles(a);
  EmulatedTiles& t = usable_tiles(b);
  emulation_check(c != a && c != b && a != b, "TDP: operands must be three different tiles");
  emulation_check(t.written[a] && t.written[b] && t.written[c], "TDP: operand never written");
  const TileConfig& f = t.config;
  emulation_check(f.row_bytes[a] % 4 == 0 && f.row_bytes[b] % 4 == 0, "TDP: row not whole dwords");
  emulation_check(f.rows[c] == f.rows[a], "TDP: C and A differ in rows");
  emulation_check(f.row_bytes[c] == f.row_bytes[b], "TDP: C and B differ in columns");
  emulation_check(f.row_bytes[a] / 4 == f.rows[b], "TDP: A's columns and B's rows differ");
  return t;
}

// The unit reads and writes denormals as zero, whatever MXCSR says.
static inline float flush_denormal(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  memcpy(&v, &bits, 4);
  return v;
}
static inline float flushed_bf16(const uint8_t* p) {
  uint16_t half;
  memcpy(&half, p, 2);
  const uint32_t bits = (half & 0x7f80u) ? static_cast<uint32_t>(half) << 16
                                         : static_cast<uint32_t>(half & 0x8000u) << 16;
  float v;
  memcpy(&v, &bits, 4);
  return v;
}

// The even and the odd elements are summed apart with fused multiply-adds, then together, then to
// C.
template <int C, int A, int B>
static inline void dot_bf16() {
  EmulatedTiles& t = operand_tiles(C, A, B);
  const int rows = t.config.rows[C], columns = t.config.row_bytes[C] / 4, pairs = t.config.rows[B];
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < columns; ++n) {
      float even = 0.0f, odd = 0.0f, c;
      for (int k = 0; k < pairs; ++k) {
        const uint8_t* a = t.data[A][m] + 4 * k;
        const uint8_t* b = t.data[B][k] + 4 * n;
        even = flush_denormal(__builtin_fmaf(flushed_bf16(a), flushed_bf16(b), even));
        odd = flush_denormal(__builtin_fmaf(flushed_bf16(a + 2), flushed_bf16(b + 2), odd));
      }
      memcpy(&c, t.data[C][m] + 4 * n, 4);
      c = flush_denormal(flush_denormal(c) + flush_denormal(even + odd));
      memcpy(t.data[C][m] + 4 * n, &c, 4);
    }
  }
}

template <int C, int A, int B>
static inline void dot_int8() {
  EmulatedTiles& t = operand_tiles(C, A, B);
  const int rows = t.config.rows[C], columns = t.config.row_bytes[C] / 4, quads = t.config.rows[B];
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < columns; ++n) {
      int32_t c;
      memcpy(&c, t.data[C][m] + 4 * n, 4);
      for (int i = 0; i < 4 * quads; ++i) {
        const int8_t a = static_cast<int8_t>(t.data[A][m][i]);
        const int8_t b = static_cast<int8_t>(t.data[B][i / 4][4 * n + i % 4]);
        c += static_cast<int32_t>(a) * b;
      }
      memcpy(t.data[C][m] + 4 * n, &c, 4);
    }
  }
}

}  // namespace amx
}  // namespace nibblock
