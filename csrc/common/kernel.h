// What every vector kernel file needs besides its instructions.
#pragma once

#include <stdint.h>
#include <stdlib.h>

// GCC keeps a register tile in registers only if its loops are gone before it looks at arrays.
#define NB_UNROLL _Pragma("GCC unroll 16")
// For the loop over a product's depth: one round of a tile is about 20 instructions, and where the
// other thread of the core is busy so short a loop is fetched too slowly for its FMAs. Four rounds
// are not: 75 -> 100 GFLOP/s of the 102 that Zen 3 has.
#define NB_UNROLL_DEPTH _Pragma("GCC unroll 4")
#define NB_INLINE static inline __attribute__((always_inline))

namespace nibblock {
namespace {

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

static inline void* aligned_malloc(int64_t bytes) {
  void* p = nullptr;
  const size_t size = (static_cast<size_t>(bytes > 0 ? bytes : 1) + 63) / 64 * 64;
  return posix_memalign(&p, 64, size) == 0 ? p : nullptr;
}

}  // namespace
}  // namespace nibblock
