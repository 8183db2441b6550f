// Codes and scales of the packed layout, as the tensor cores' operands and as float32.
#pragma once

#include "../common/cuda_common.cuh"

namespace nibblock {
namespace cuda {

// The pair of codes in the low bits of both halves of w, centred: code - 8 or code - 128. Every
// value is a small integer, so the conversion is exact: a code is put into the low mantissa bits of
// a power of two, which is then subtracted, before any scale is applied.
template <class T, int kBits>
NB_DEVICE uint32_t pair(uint32_t w) {
  constexpr uint32_t kOne = T::kOnes;
  if constexpr (kBits == 4 && T::kIsBF16) {
    return fma_pair<T>((w & 0x000f000fu) | 0x43004300u, kOne, 0xc308c308u);  // 128 + code, - 136
  } else if constexpr (kBits == 4) {
    return fma_pair<T>((w & 0x000f000fu) | 0x64006400u, kOne, 0xe408e408u);  // 1024 + code, - 1032
  } else if constexpr (T::kIsBF16) {
    // Seven mantissa bits hold the low seven bits of a code; the eighth chooses what is subtracted
    // from 128 + low: 256 below 128, 128 from there on.
    const uint32_t low = (w & 0x007f007fu) | 0x43004300u;
    return fma_pair<T>((w & 0x00800080u) ^ 0x43804380u, 0xbf80bf80u, low);
  } else {
    return fma_pair<T>((w & 0x00ff00ffu) | 0x64006400u, kOne, 0xe480e480u);  // - 1152
  }
}

// Codes of a lane's row, 8 k, as four pairs of consecutive k.
template <class T, int kBits>
NB_DEVICE void pairs(uint32_t w0, uint32_t w1, uint32_t (&out)[4]) {
  if constexpr (kBits == 4 && !T::kIsBF16) {
    // A high nibble stands as 1024 + 16 code: / 16, then - 72. Saves every other shift.
    for (int p = 0; p < 4; p += 2) {
      const uint32_t w = w0 >> (4 * p);
      out[p] = pair<T, kBits>(w);
      out[p + 1] = fma_pair<T>((w & 0x00f000f0u) | 0x64006400u, 0x2c002c00u, 0xd480d480u);
    }
  } else {
    for (int p = 0; p < 4; ++p) {
      const uint32_t w = kBits == 4 ? w0 >> (4 * p) : ((p & 1) ? w1 : w0) >> (p >= 2 ? 8 : 0);
      out[p] = pair<T, kBits>(w);
    }
  }
}

// Four scales or offsets as float32.
NB_DEVICE Floats4 load_scales(const uint8_t* shared, bool wide) {
  if (wide) return load_shared<Floats4>(shared);
  const uint64_t v = load_shared<uint64_t>(shared);
  Floats4 out;
  for (int i = 0; i < 4; ++i) out.f[i] = widen<Float16>(static_cast<uint16_t>(v >> (16 * i)));
  return out;
}

// bias[n]; type: 0 float32, 1 bfloat16, 2 float16.
NB_DEVICE float load_bias(const void* bias, int type, int n) {
  if (type == 0) return load_global(static_cast<const float*>(bias) + n);
  const uint16_t bits = load_global(static_cast<const uint16_t*>(bias) + n);
  return type == 1 ? widen<BFloat16>(bits) : widen<Float16>(bits);
}

}  // namespace cuda
}  // namespace nibblock
