// Element types and the bit-exact scalar conversions between them. Torch-free, ISA-free: included
// by every kernel file, so everything here is static and uses no library (a COMDAT function
// compiled with AVX-512 flags could otherwise become the copy that an AVX2 machine runs).
#pragma once

#include <stdint.h>
#include <string.h>

namespace nibblock {

// kI8 is a way to store the scales of an int4 weight (int4_linear.h) and nothing else.
enum class Dtype : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2, kI8 = 3 };

static inline int64_t dtype_size(Dtype t) { return t == Dtype::kF32 ? 4 : t == Dtype::kI8 ? 1 : 2; }

static inline float bits_to_f32(uint32_t b) {
  float f;
  memcpy(&f, &b, 4);
  return f;
}
static inline uint32_t f32_to_bits(float f) {
  uint32_t b;
  memcpy(&b, &f, 4);
  return b;
}

static inline float bf16_to_f32(uint16_t h) { return bits_to_f32(static_cast<uint32_t>(h) << 16); }

// Round to nearest, ties to even; NaN stays NaN (quiet).
static inline uint16_t f32_to_bf16(float f) {
  uint32_t b = f32_to_bits(f);
  if ((b & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((b >> 16) | 0x0040u);
  return static_cast<uint16_t>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

static inline float f16_to_f32(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  uint32_t exp = (h >> 10) & 0x1fu;
  uint32_t man = h & 0x3ffu;
  if (exp == 0x1fu) return bits_to_f32(sign | 0x7f800000u | (man << 13));
  if (exp != 0) return bits_to_f32(sign | ((exp + 112u) << 23) | (man << 13));
  // Subnormal: man * 2^-24, exact in float32.
  float f = static_cast<float>(man) * 5.9604644775390625e-08f;
  return sign ? -f : f;
}

// Round to nearest, ties to even; overflow gives infinity.
static inline uint16_t f32_to_f16(float f) {
  uint32_t b = f32_to_bits(f);
  uint32_t sign = (b >> 16) & 0x8000u;
  b &= 0x7fffffffu;
  if (b > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((b >> 13) & 0x3ffu));
  if (b >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536 or more
  if (b < 0x38800000u) {                                               // below 2^-14: subnormal
    // Adding 0.5 puts the value's 2^-24 units into the low mantissa bits, rounded by the FPU.
    float t = bits_to_f32(b) + 0.5f;
    return static_cast<uint16_t>(sign | (f32_to_bits(t) - 0x3f000000u));
  }
  uint32_t rounded = b + 0xfffu + ((b >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

static inline float load_as_f32(const void* p, Dtype t, int64_t i) {
  if (t == Dtype::kF32) {
    float f;
    memcpy(&f, static_cast<const char*>(p) + 4 * i, 4);
    return f;
  }
  uint16_t h;
  memcpy(&h, static_cast<const char*>(p) + 2 * i, 2);
  return t == Dtype::kBF16 ? bf16_to_f32(h) : f16_to_f32(h);
}

static inline void store_f32_as(void* p, Dtype t, int64_t i, float v) {
  if (t == Dtype::kF32) {
    memcpy(static_cast<char*>(p) + 4 * i, &v, 4);
    return;
  }
  uint16_t h = t == Dtype::kBF16 ? f32_to_bf16(v) : f32_to_f16(v);
  memcpy(static_cast<char*>(p) + 2 * i, &h, 2);
}

}  // namespace nibblock
