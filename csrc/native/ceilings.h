// What this machine can do at most, measured: reading and copying memory, and each arithmetic
// unit's rate. Every benchmark of the package states its figures as shares of these.
//
// A burst runs on one thread, touches registers only (tiles on AMX) and works on random operands:
// zeros would draw less power and clock higher. Each instruction set's bursts are in a file of
// their own, because setup.py takes a file's compiler flags from its name.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../common/cpu_features.h"

namespace nibblock {
namespace ceilings {

constexpr int kStreams = 8;             // read side by side by one thread
constexpr size_t kOperandBytes = 4096;  // random bytes a burst may load from

// Random operands in the three forms the bursts need, 64-byte aligned.
struct Operands {
  alignas(64) float f32[kOperandBytes / 4];      // uniform in +-1
  alignas(64) uint16_t bf16[kOperandBytes / 2];  // the same values, truncated
  alignas(64) uint8_t bytes[kOperandBytes];
};

// Reads `lines` lines of 64 bytes from each of kStreams streams that are `span` bytes apart.
// Returns a value that depends on every byte, so that no load can be left out.
uint64_t read_sse2(const uint8_t* base, size_t span, size_t lines);
uint64_t read_avx2(const uint8_t* base, size_t span, size_t lines);
uint64_t read_avx512(const uint8_t* base, size_t span, size_t lines);

// Copies as many lines, stream by stream the same way, with stores that bypass the caches.
void copy_sse2(const uint8_t* from, uint8_t* to, size_t span, size_t lines);
void copy_avx2(const uint8_t* from, uint8_t* to, size_t span, size_t lines);
void copy_avx512(const uint8_t* from, uint8_t* to, size_t span, size_t lines);

// One burst: `iterations` rounds of k<Name>Ops operations (a multiply-add counts two).
void burst_fma_avx2(const Operands& o, int64_t iterations);
void burst_fma_avx512(const Operands& o, int64_t iterations);
void burst_vnni_int8(const Operands& o, int64_t iterations);
void burst_vnni_int16(const Operands& o, int64_t iterations);
void burst_avx512_bf16(const Operands& o, int64_t iterations);
void burst_amx_bf16(const Operands& o, int64_t iterations);
void burst_amx_int8(const Operands& o, int64_t iterations);

constexpr int kAccumulators =
    12;  // hides 2 ports x 4 to 5 cycles and leaves registers for operands
constexpr double kFmaAvx2Ops = kAccumulators * 8 * 2.0;
constexpr double kFmaAvx512Ops = kAccumulators * 16 * 2.0;
constexpr double kVnniInt8Ops = kAccumulators * 64 * 2.0;
constexpr double kVnniInt16Ops = kAccumulators * 32 * 2.0;
constexpr double kAvx512Bf16Ops = kAccumulators * 32 * 2.0;
constexpr double kAmxBf16Ops = 4 * 16 * 16 * 32 * 2.0;  // 2 x 2 tiles of accumulators
constexpr double kAmxInt8Ops = 4 * 16 * 16 * 64 * 2.0;

}  // namespace ceilings
}  // namespace nibblock
