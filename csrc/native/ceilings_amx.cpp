// Ceilings of AMX: TDPBF16PS and TDPBUSD on 2 x 2 tiles of accumulators. See ceilings.h.
//
// cpu_features() has asked the kernel for the tile state before any of this may run. The tile
// configuration belongs to the thread and is shared with other libraries, so each burst loads its
// own and releases it.
#include <immintrin.h>

#include "ceilings.h"

namespace nibblock {
namespace ceilings {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "LDTILECFG reads 64 bytes");

// Tiles 0 to 3 accumulate, 4 and 5 hold A, 6 and 7 hold B.
inline void begin(const void* operands) {
  const TileConfig config;
  _tile_loadconfig(&config);
  const uint8_t* p = static_cast<const uint8_t*>(operands);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, p, 64);
  _tile_loadd(5, p + 1024, 64);
  _tile_loadd(6, p + 2048, 64);
  _tile_loadd(7, p + 3072, 64);
}

inline void end() {
  alignas(64) uint8_t sink[1024];
  _tile_stored(0, sink, 64);
  __asm__ volatile("" ::"r"(sink) : "memory");
  _tile_release();
}

}  // namespace

void burst_amx_bf16(const Operands& o, int64_t iterations) {
  begin(o.bf16);
  for (int64_t t = 0; t < iterations; ++t) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  end();
}

void burst_amx_int8(const Operands& o, int64_t iterations) {
  begin(o.bytes);
  for (int64_t t = 0; t < iterations; ++t) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  end();
}

}  // namespace ceilings
}  // namespace nibblock
