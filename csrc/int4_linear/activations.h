// Activations as integers: how the vector kernels of int4_linear take x.
//
// A row of x is cut into the blocks between two flushes, min(group, 128) long. Each block gets one
// scale, max|x| / 32767 (or / 127), and its elements become int16 (int8) by rounding to nearest.
// With int16 the rounding error is at most 2^-16 of the block's largest element, far below what
// rounding a weight to bfloat16 costs, so this is the arithmetic behind compute="bf16" for float32
// and float16 x, and for bfloat16 x wherever VPDPWSSD or VPMADDWD is faster than bfloat16 (on every
// x86 CPU without AMX: VDPBF16PS runs at a quarter of VPDPWSSD's rate here).
//
// For tiles that scale in integers (cpu_integer_stretch.h) the scales of the blocks in a stretch of
// kFlushK are held as 16-bit parts of their largest.
//
// Included by files compiled for one ISA each, hence static and in an anonymous namespace.
#pragma once

#include <immintrin.h>

#include "../common/kernel.h"
#include "int4_linear.h"

namespace nibblock {
namespace {

// Block by block, all rows of a block together: a tile walks the rows of one block, and rows that
// stand k_pad elements apart would crowd into a few cache sets.
struct QuantizedRows {
  int64_t rows, k_pad, block, blocks;
  int64_t padded_k;      // elements of a row that are written: the last block ends here
  int64_t stride;        // bytes between rows of a block
  int64_t block_stride;  // bytes between blocks
  uint8_t* q;     // int16 in the order of k, or int8 in the order k0 k4 k1 k5 k2 k6 k3 k7 of each 8
  float* scale;   // [blocks][rows]; in stretches [stretches][rows], the largest of its blocks
  int32_t* init;  // [blocks][rows] what the integer sum starts from: -zero * sum(q), 0 when affine;
                  // in stretches two int16, -8 * sum(q) of the even k and of the odd
  float* sum;     // [blocks][rows] scale * sum(q): what the offset multiplies when affine
  int32_t* part;  // in stretches [blocks][rows], twice the int16 that is a block's part of scale
  uint8_t* nonfinite;  // [rows]
  bool stretches;      // see cpu_integer_stretch.h
  void* memory;
};

static inline int64_t flush_block(const Int4Geometry& g) {
  return g.group < kFlushK ? g.group : kFlushK;
}

static bool quantized_rows_alloc(QuantizedRows* a, const Int4Geometry& g, int64_t k, int64_t rows,
                                 int act_bits, bool stretches = false) {
  a->rows = rows;
  a->stretches = stretches;
  a->k_pad = g.k_pad;
  a->block = flush_block(g);
  a->blocks = a->block > 0 ? ceil_div(k, a->block) : 0;
  a->padded_k = a->blocks * a->block < g.k_pad ? a->blocks * a->block : g.k_pad;
  a->stride = a->block * act_bits / 8;
  a->block_stride = rows * a->stride;
  // At least k_pad a row, for callers that arrange q themselves.
  const int64_t row_k = a->blocks * a->block > g.k_pad ? a->blocks * a->block : g.k_pad;
  const int64_t bytes = round_up(rows * row_k * act_bits / 8, 64);
  const int64_t meta = round_up(rows * a->blocks * 4, 64);
  char* mem = static_cast<char*>(aligned_malloc(bytes + 4 * meta + rows));
  a->memory = mem;
  if (!mem) return false;
  a->q = reinterpret_cast<uint8_t*>(mem);
  mem += bytes;
  a->scale = reinterpret_cast<float*>(mem);
  a->init = reinterpret_cast<int32_t*>(mem + meta);
  a->sum = reinterpret_cast<float*>(mem + 2 * meta);
  a->part = reinterpret_cast<int32_t*>(mem + 3 * meta);
  a->nonfinite = reinterpret_cast<uint8_t*>(mem + 4 * meta);
  return true;
}

// buf[0 .. n) = x[at .. at + n) in float32, buf[n .. padded) = 0. O::load_f16 converts 8 halves.
template <class O>
static inline void load_block(const void* x, Dtype type, int64_t at, int64_t n, int64_t padded,
                              float* buf) {
  int64_t i = 0;
  if (type == Dtype::kF32) {
    memcpy(buf, static_cast<const char*>(x) + at * 4, static_cast<size_t>(n) * 4);
    i = n;
  } else {
    uint16_t half[kFlushK];
    memcpy(half, static_cast<const char*>(x) + at * 2, static_cast<size_t>(n) * 2);
    if (type == Dtype::kBF16) {
      for (; i < n; ++i) buf[i] = bits_to_f32(static_cast<uint32_t>(half[i]) << 16);
    } else {
      for (int64_t j = n; j < round_up(n, 8); ++j) half[j] = 0;
      for (; i < n; i += 8) O::load_f16(half + i, buf + i);
      i = n;
    }
  }
  for (; i < padded; ++i) buf[i] = 0.0f;
}

// The largest magnitude of v[0 .. n) by its bit pattern, n a multiple of 16: integer maxima are
// cheap, and NaN and infinity come out above every finite value.
static inline uint32_t largest_bits(const float* v, int64_t n) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i top = _mm256_setzero_si256();
  for (int64_t i = 0; i < n; i += 8) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + i));
    top = _mm256_max_epi32(top, _mm256_and_si256(bits, magnitude));
  }
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(half));
}

// v[0 .. n) * inverse as int16 in the order of k, or int8 in that of a packed line (int4_linear.h);
// n a multiple of 16. Returns their sums over k % 8.
template <int ACT>
static inline __m256i round_block(const float* v, int64_t n, __m256 inverse, uint8_t* out) {
  const __m256 magic = _mm256_set1_ps(12582912.0f);
  const __m256i bias = _mm256_set1_epi32(0x4b400000);
  // Adding 1.5 * 2^23 rounds to an integer (ties to even) and leaves it in the low mantissa bits.
  auto rounded = [&](const float* at) {
    const __m256 x = _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(at), inverse), magic);
    return _mm256_sub_epi32(_mm256_castps_si256(x), bias);
  };
  __m256i sums = _mm256_setzero_si256();
  for (int64_t i = 0; i < n; i += 16) {
    const __m256i a = rounded(v + i), b = rounded(v + i + 8);
    sums = _mm256_add_epi32(sums, _mm256_add_epi32(a, b));
    const __m256i ab = _mm256_packs_epi32(a, b);  // a0-3 b0-3, a4-7 b4-7
    if (ACT == 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 2 * i),
                          _mm256_permute4x64_epi64(ab, 0xd8));
    } else {  // a0 a4 a1 a5 ... and the same of b
      const __m256i bytes = _mm256_packs_epi16(ab, ab);
      const __m128i first = _mm256_castsi256_si128(bytes);
      const __m128i second = _mm256_extracti128_si256(bytes, 1);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm_unpacklo_epi8(first, second));
    }
  }
  return sums;
}

static inline int32_t lane_sum(__m256i v) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

// One row of x into row `m` of `a`. ACT is 16 or 8. Padded elements become 0. In AVX2 at every
// level: with blocks of 32 the arithmetic is a few vectors between two divisions.
template <class O, int ACT>
static void quantize_row(const Int4LinearParams& p, int64_t m, int64_t row,
                         const QuantizedRows& a) {
  const int64_t K = p.w.k;
  const float levels = ACT == 16 ? 32767.0f : 127.0f;
  const int32_t zero = p.w.bits == 8 ? 128 : 8;
  uint32_t worst = 0;
  for (int64_t b = 0; b < a.blocks; ++b) {
    const int64_t k0 = b * a.block;
    const int64_t len = min64(a.block, K - k0);
    // At most kFlushK + 63, a multiple of 16: a short last block reaches up to k_pad.
    const int64_t padded = (b + 1 < a.blocks ? k0 + a.block : a.padded_k) - k0;
    alignas(64) float buf[kFlushK + 64];
    const float* v = buf;
    if (p.xtype == Dtype::kF32 && len == padded) {
      v = static_cast<const float*>(p.x) + m * p.x_stride + k0;
    } else {
      load_block<O>(p.x, p.xtype, m * p.x_stride + k0, len, padded, buf);
    }
    const uint32_t top = largest_bits(v, padded);
    worst = top > worst ? top : worst;
    float max = bits_to_f32(top);
    float scale = 0.0f, inverse = 0.0f;
    if (top != 0 && top < 0x7f800000u) {
      scale = max / levels;
      if (max < 1e-30f) {  // 32767 / max would overflow
        for (int64_t i = 0; i < padded; ++i) buf[i] = v[i] * 1.8446744073709552e19f;
        max *= 1.8446744073709552e19f;
        v = buf;
      }
      inverse = levels / max;
    } else {
      memset(buf, 0, static_cast<size_t>(padded) * 4);
      v = buf;
    }
    uint8_t* out = a.q + b * a.block_stride + row * a.stride;
    const int32_t sum = lane_sum(round_block<ACT>(v, padded, _mm256_set1_ps(inverse), out));
    a.scale[b * a.rows + row] = scale;
    a.init[b * a.rows + row] = p.w.affine ? 0 : -zero * sum;
    a.sum[b * a.rows + row] = scale * static_cast<float>(sum);
  }
  a.nonfinite[row] = worst >= 0x7f800000u;
}

// The largest of each of four vectors.
static inline __m128i largest_lanes(const __m256i* v) {
  __m128i half[4];
  for (int i = 0; i < 4; ++i) {
    half[i] = _mm_max_epi32(_mm256_castsi256_si128(v[i]), _mm256_extracti128_si256(v[i], 1));
  }
  const __m128i a =
      _mm_max_epi32(_mm_unpacklo_epi32(half[0], half[1]), _mm_unpackhi_epi32(half[0], half[1]));
  const __m128i b =
      _mm_max_epi32(_mm_unpacklo_epi32(half[2], half[3]), _mm_unpackhi_epi32(half[2], half[3]));
  return _mm_max_epi32(_mm_unpacklo_epi64(a, b), _mm_unpackhi_epi64(a, b));
}

// quantize_row for stretches: int8 in blocks of 32, four at a time, because what is done once a
// block (the largest, two quotients, the sums) takes longer than its elements. A last stretch may
// have fewer blocks: the others are zeros that are not written.
template <class O>
static void quantize_stretches(const Int4LinearParams& p, int64_t m, int64_t row,
                               const QuantizedRows& a) {
  constexpr int64_t kBlock = 32, kBlocks = kFlushK / kBlock;
  const __m128i infinity = _mm_set1_epi32(0x7f800000);
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  bool nonfinite = false;
  for (int64_t b0 = 0, stretch = 0; b0 < a.blocks; b0 += kBlocks, ++stretch) {
    const int64_t k0 = b0 * kBlock, len = min64(kFlushK, p.w.k - k0);
    alignas(64) float buf[kFlushK];
    const float* v = buf;
    if (p.xtype == Dtype::kF32 && len == kFlushK) {
      v = static_cast<const float*>(p.x) + m * p.x_stride + k0;
    } else {
      load_block<O>(p.x, p.xtype, m * p.x_stride + k0, len, kFlushK, buf);
    }
    __m256i tops[kBlocks];
    for (int64_t b = 0; b < kBlocks; ++b) {
      tops[b] = _mm256_setzero_si256();
      for (int64_t i = 0; i < kBlock; i += 8) {
        const __m256i bits =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + b * kBlock + i));
        tops[b] = _mm256_max_epi32(tops[b], _mm256_and_si256(bits, magnitude));
      }
    }
    const __m128i top = largest_lanes(tops);
    const __m128 max = _mm_castsi128_ps(top);
    const __m128 scale = _mm_div_ps(max, _mm_set1_ps(127.0f));
    const bool lost = _mm_movemask_ps(_mm_castsi128_ps(_mm_cmplt_epi32(top, infinity))) != 15;
    const __m128 zero = _mm_cmpeq_ps(max, _mm_setzero_ps());
    const __m128 tiny = _mm_andnot_ps(zero, _mm_cmplt_ps(max, _mm_set1_ps(1e-30f)));
    __m128 up = _mm_set1_ps(1.0f);
    if (lost || _mm_movemask_ps(tiny)) {  // elements change first: NaN to 0, and up where 127 / max
      nonfinite |= lost;                  // would overflow
      up = _mm_blendv_ps(up, _mm_set1_ps(1.8446744073709552e19f), tiny);
      alignas(16) float factor[kBlocks];
      _mm_store_ps(factor, up);
      for (int64_t i = 0; i < kFlushK; ++i) buf[i] = lost ? 0.0f : v[i] * factor[i / kBlock];
      v = buf;
    }
    alignas(16) float inverse[kBlocks];
    _mm_store_ps(inverse,
                 _mm_andnot_ps(zero, _mm_div_ps(_mm_set1_ps(127.0f), _mm_mul_ps(max, up))));
    __m128i sums[kBlocks];  // over k % 4
    for (int64_t b = 0; b < kBlocks; ++b) {
      alignas(32) uint8_t nowhere[kBlock];
      uint8_t* out = b0 + b < a.blocks ? a.q + (b0 + b) * a.block_stride + row * a.stride : nowhere;
      const __m256i sum = round_block<8>(v + b * kBlock, kBlock, _mm256_set1_ps(inverse[b]), out);
      sums[b] = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    }
    const __m128 ab = _mm_castsi128_ps(
        _mm_add_epi32(_mm_unpacklo_epi64(sums[0], sums[1]), _mm_unpackhi_epi64(sums[0], sums[1])));
    const __m128 cd = _mm_castsi128_ps(
        _mm_add_epi32(_mm_unpacklo_epi64(sums[2], sums[3]), _mm_unpackhi_epi64(sums[2], sums[3])));
    const __m128i even = _mm_castps_si128(_mm_shuffle_ps(ab, cd, 0x88));
    const __m128i odd = _mm_castps_si128(_mm_shuffle_ps(ab, cd, 0xdd));
    // -8 * sum: 16 bits hold it, for a lane of a block of 32.
    const __m128i low = _mm_and_si128(_mm_slli_epi32(_mm_sub_epi32(_mm_setzero_si128(), even), 3),
                                      _mm_set1_epi32(0xffff));
    const __m128i high = _mm_slli_epi32(_mm_sub_epi32(_mm_setzero_si128(), odd), 19);
    // The largest scale, and each as a part of it.
    __m128 most = _mm_max_ps(scale, _mm_movehl_ps(scale, scale));
    most = _mm_max_ss(most, _mm_movehdup_ps(most));
    const float largest = lost ? 0.0f : _mm_cvtss_f32(most);
    const float lift = largest < 1e-30f ? 1.8446744073709552e19f : 1.0f;
    const float share = largest > 0.0f ? 32767.0f / (largest * lift) : 0.0f;
    const __m128 lifted = _mm_mul_ps(scale, _mm_set1_ps(lift));
    const __m128i part =
        lost ? _mm_setzero_si128() : _mm_cvtps_epi32(_mm_mul_ps(lifted, _mm_set1_ps(share)));
    alignas(16) int32_t inits[kBlocks], parts[kBlocks];
    alignas(16) float xsums[kBlocks];
    _mm_store_si128(reinterpret_cast<__m128i*>(inits), _mm_or_si128(low, high));
    _mm_store_si128(reinterpret_cast<__m128i*>(parts),
                    _mm_or_si128(part, _mm_slli_epi32(part, 16)));
    _mm_store_ps(xsums, _mm_mul_ps(scale, _mm_cvtepi32_ps(_mm_add_epi32(even, odd))));
    for (int64_t b = b0; b < min64(b0 + kBlocks, a.blocks); ++b) {
      a.init[b * a.rows + row] = inits[b - b0];
      a.part[b * a.rows + row] = parts[b - b0];
      a.sum[b * a.rows + row] = lost ? 0.0f : xsums[b - b0];
    }
    a.scale[stretch * a.rows + row] = largest;
  }
  a.nonfinite[row] = nonfinite;
}

constexpr int64_t kChunks = 8;  // held at a time: bounds the workspace

// Rows [m0, m0 + rows) of x in equal chunks, which threads take whole where there are enough: what
// one wrote or read stays with it.
struct QuantizedChunks {
  QuantizedRows at[kChunks] = {};
  int64_t m0, rows, count, chunk;

  ~QuantizedChunks() {
    for (const QuantizedRows& a : at) free(a.memory);
  }
  // Up to kChunks * most rows from row `first` on, chunks of at most `most`.
  template <class O, int ACT>
  bool make(const Int4LinearParams& p, int64_t first, int64_t most, bool stretches = false) {
    m0 = first;
    rows = min64(p.m - first, kChunks * most);
    count = ceil_div(rows, most);
    chunk = ceil_div(rows, count);
    const Int4Geometry g = int4_geometry(p.w);
    for (int64_t c = 0; c < count; ++c) {
      if (!quantized_rows_alloc(&at[c], g, p.w.k, min64(rows - c * chunk, chunk), ACT, stretches))
        return false;
    }
    auto quantize = [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        if (ACT == 8 && stretches) {
          quantize_stretches<O>(p, m0 + r, r % chunk, at[r / chunk]);
        } else {
          quantize_row<O, ACT>(p, m0 + r, r % chunk, at[r / chunk]);
        }
      }
    };
    // Below this waking the other threads costs more than they save.
    parallel_for(rows * p.w.k < 65536 ? kSerial : *p.parallel, rows, quantize);
    return true;
  }
  // f(row of x) for those with a NaN or an infinity.
  template <class F>
  void each_nonfinite(F f) const {
    for (int64_t r = 0; r < rows; ++r) {
      if (at[r / chunk].nonfinite[r % chunk]) f(m0 + r);
    }
  }
};

}  // namespace
}  // namespace nibblock
