// What the AMX kernels of int4_linear share: packed weights -> bfloat16 tile rows, activations ->
// tile rows, 16 x 16 transposes, and vectors of outputs. Included by cpu_amx_*.cpp only (AVX-512
// with VBMI-free instructions and AVX512_BF16), hence static and in an anonymous namespace.
//
// Dequantisation, 16 rows (n) x 32 k, 4 bits. The 16-entry table of a (row, group),
// bf16(scale * (code - 8) + offset'), is looked up by VPERMW, one instruction for 32 weights:
//   1. four lines are transposed as 4 x 4 dwords inside each 128-bit lane: 8 shuffles. Each 16
//      bytes then hold the 32 codes of one row, eight words of four nibbles.
//   2. per row: broadcast the 16 bytes (a load), shift lane p right by 4p (VPSRLVW), VPERMW, store.
//      VPERMW reads 5 bits of each word: a nibble and one bit of the next, so the table stands
//      twice.
// Word 8p + 2l + j of the result is k = 8l + 2p + j: a fixed order of k inside the 32, which the
// packing of x repeats, so nothing is ever put back.
// Ports, for 16 rows x 32 k: VPSRLVW takes port 0 and VPERMW both 0 and 5 (two uops here; VPERMB is
// one but needs two bytes of index), so 32 uops on port 0 and 24 on port 5; measured 38 cycles. A
// table is one FMA and half a VCVTNE2PS2BF16 (three uops): 32 cycles for 16 rows, once per group.
// Computing each weight as scale * float(code) + offset' and rounding it would take 8 shifts, 8
// lookups, 8 FMAs and 4 conversions of three uops for 128 weights, 72 cycles for the same 512
// whatever the group: the table wins even at group 32, and at 128 the rows cost 46.
#pragma once

#include <immintrin.h>

#include "../common/amx.h"
#include "int4_linear.h"

#define NB_AMX_INLINE static inline __attribute__((always_inline))
#define NB_AMX_MEMBER inline __attribute__((always_inline))

namespace nibblock {
namespace {

constexpr int64_t kStepK = 32;  // bfloat16 elements in a tile row

// Keeps the compiler from carrying values around memory that was just written (GCC would turn the
// reloads below into lane shuffles on the port that is already the busiest).
NB_AMX_INLINE void compiler_barrier() { __asm__ volatile("" : : : "memory"); }

// Of a panel's rows for one group, as float32.
NB_AMX_INLINE __m512 load_scales(const Int4Format& f, const Int4Geometry& g, const uint8_t* section,
                                 int64_t group) {
  auto halves = [](const uint8_t* at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  };
  if (f.scale_type == Dtype::kF32) return _mm512_loadu_ps(section + group * 64);
  if (f.scale_type == Dtype::kF16) return halves(section + group * 32);
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(section + group * 16));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)),
                       halves(section + g.units_at + (group >> g.run_shift) * 32));
}

// Scale and centred offset of one panel's rows for the 32 k of a step, and for 4 bits the tables
// made of them.
struct PanelScales {
  alignas(64) uint16_t table[2 * 16 * 16];
  alignas(64) float scale[2 * 16];
  alignas(64) float offset[2 * 16];
  int second;  // where those of the second 16 k start: 16 if these are a group of their own, else 0
};

// offset' = offset + zero * scale; a symmetric weight's offset is -zero * scale, so its offset' is
// 0.
NB_AMX_INLINE void load_group_scales(const Int4Format& f, const Int4Geometry& g,
                                     const uint8_t* panel, int64_t group, float* scale_out,
                                     float* offset_out) {
  const __m512 scale = load_scales(f, g, panel + g.scales_at, group);
  __m512 offset = _mm512_setzero_ps();
  if (f.affine) {
    offset = _mm512_fmadd_ps(_mm512_set1_ps(f.bits == 8 ? 128.0f : 8.0f), scale,
                             load_scales(f, g, panel + g.offsets_at, group));
  }
  _mm512_store_ps(scale_out, scale);
  _mm512_store_ps(offset_out, offset);
}

// Of the step whose first k lies in `group`.
NB_AMX_INLINE void load_panel_scales(const Int4Format& f, const Int4Geometry& g,
                                     const uint8_t* panel, int64_t group, PanelScales* out) {
  load_group_scales(f, g, panel, group, out->scale, out->offset);
  // (Behind the last group there are only codes of padding, which meet zeros of x.)
  out->second = g.group == kStepK / 2 && group + 1 < g.groups ? 16 : 0;
  if (out->second) load_group_scales(f, g, panel, group + 1, out->scale + 16, out->offset + 16);
  if (int4_stored_bits(f) == 8) return;
  compiler_barrier();
  __m512 codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  if (f.palette) {
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(panel + g.palette_at));
    const __m128i centred = _mm_xor_si128(values, _mm_set1_epi8(static_cast<char>(0x80)));
    codes = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(centred));
  }
  for (int r = 0; r < 16 + out->second; r += 2) {
    const __m512 even =
        _mm512_fmadd_ps(codes, _mm512_set1_ps(out->scale[r]), _mm512_set1_ps(out->offset[r]));
    const __m512 odd = _mm512_fmadd_ps(codes, _mm512_set1_ps(out->scale[r + 1]),
                                       _mm512_set1_ps(out->offset[r + 1]));
    _mm512_store_si512(out->table + 16 * r,
                       reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even)));
  }
}

// rows[i]: lane L = row 4L + i of the panel, its dwords of the four lines in order.
NB_AMX_INLINE void transpose_lines(__m512i a, __m512i b, __m512i c, __m512i d, __m512i rows[4]) {
  const __m512i ab0 = _mm512_unpacklo_epi32(a, b), ab1 = _mm512_unpackhi_epi32(a, b);
  const __m512i cd0 = _mm512_unpacklo_epi32(c, d), cd1 = _mm512_unpackhi_epi32(c, d);
  rows[0] = _mm512_unpacklo_epi64(ab0, cd0);
  rows[1] = _mm512_unpackhi_epi64(ab0, cd0);
  rows[2] = _mm512_unpacklo_epi64(ab1, cd1);
  rows[3] = _mm512_unpackhi_epi64(ab1, cd1);
}

// Byte at which row r stands in four vectors of transpose_lines stored one after the other.
constexpr int row_at(int r) { return (r & 3) * 64 + (r >> 2) * 16; }

// One row of 32 weights as bfloat16, from what prepare() left in `codes`.
template <int Bits>
struct RowReader;

template <>
struct RowReader<4> {
  alignas(64) uint8_t codes[256];
  __m512i shifts;

  NB_AMX_MEMBER void prepare(const uint8_t* lines) {
    __m512i rows[4];
    transpose_lines(_mm512_loadu_si512(lines), _mm512_loadu_si512(lines + 64),
                    _mm512_loadu_si512(lines + 128), _mm512_loadu_si512(lines + 192), rows);
    for (int i = 0; i < 4; ++i) _mm512_store_si512(codes + 64 * i, rows[i]);
    shifts = _mm512_setr_epi64(0, 0, 0x0004000400040004, 0x0004000400040004, 0x0008000800080008,
                               0x0008000800080008, 0x000c000c000c000c, 0x000c000c000c000c);
    compiler_barrier();
  }
  NB_AMX_MEMBER __m512i row(const PanelScales& s, int r) const {
    auto table_of = [&](int i) {
      return _mm256_load_si256(reinterpret_cast<const __m256i*>(s.table + 16 * i));
    };
    const __m512i words = _mm512_srlv_epi16(
        _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(codes + row_at(r)))),
        shifts);
    if (s.second) {
      // Groups of 16: the second table stands behind the first, bit 4 of the index chooses. k of
      // 16 and more are words 4..7 of each lane.
      const __m512i second = _mm512_broadcast_i32x4(_mm_setr_epi16(0, 0, 0, 0, 16, 16, 16, 16));
      const __m512i index = _mm512_ternarylogic_epi64(words, _mm512_set1_epi16(15), second, 0xea);
      return _mm512_permutexvar_epi16(
          index, _mm512_inserti64x4(_mm512_castsi256_si512(table_of(r)), table_of(r + 16), 1));
    }
    return _mm512_permutexvar_epi16(words, _mm512_broadcast_i64x4(table_of(r)));
  }
};

// 8 bits have no table: each weight is scale * float(code - 128) + offset', in the order of k.
template <>
struct RowReader<8> {
  alignas(64) uint8_t codes[512];

  NB_AMX_MEMBER void prepare(const uint8_t* lines) {
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const __m512i order =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    for (int half = 0; half < 2; ++half) {
      const uint8_t* at = lines + 256 * half;
      __m512i rows[4];
      transpose_lines(_mm512_loadu_si512(at), _mm512_loadu_si512(at + 64),
                      _mm512_loadu_si512(at + 128), _mm512_loadu_si512(at + 192), rows);
      for (int i = 0; i < 4; ++i) {
        _mm512_store_si512(codes + 256 * half + 64 * i,
                           _mm512_xor_si512(_mm512_shuffle_epi8(rows[i], order), sign));
      }
    }
    compiler_barrier();
  }
  NB_AMX_MEMBER __m512i row(const PanelScales& s, int r) const {
    __m512 w[2];
    for (int half = 0; half < 2; ++half) {
      const int i = r + half * s.second;
      const __m512 scale = _mm512_set1_ps(s.scale[i]), offset = _mm512_set1_ps(s.offset[i]);
      const __m128i bytes =
          _mm_load_si128(reinterpret_cast<const __m128i*>(codes + 256 * half + row_at(r)));
      w[half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), scale, offset);
    }
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(w[1], w[0]));
  }
};

// Row pair_row<Bits>(j) of a forward x tile holds the pair (k 2j, 2j + 1): the order of k above.
template <int Bits>
constexpr int pair_row(int j) {
  return Bits == 4 ? 4 * (j & 3) + (j >> 2) : j;
}

// out[c] = element c of 16 rows of 16 dwords. The 128-bit part of the transpose is done by masked
// broadcast loads, which leaves 32 shuffles (instead of 64) on port 5.
NB_AMX_INLINE void transpose16(const void* src, int64_t stride, __m512i out[16]) {
  const char* base = static_cast<const char*>(src);
  for (int j = 0; j < 4; ++j) {
    __m512i v[4];
    for (int i = 0; i < 4; ++i) {
      const char* at = base + i * stride + 16 * j;
      auto row = [&](int lane) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 4 * lane * stride));
      };
      v[i] = _mm512_castsi128_si512(row(0));
      v[i] = _mm512_mask_broadcast_i32x4(v[i], 0x00f0, row(1));
      v[i] = _mm512_mask_broadcast_i32x4(v[i], 0x0f00, row(2));
      v[i] = _mm512_mask_broadcast_i32x4(v[i], 0xf000, row(3));
    }
    transpose_lines(v[0], v[1], v[2], v[3], out + 4 * j);
  }
}

// x[at .. at + count), float32 or bfloat16, as 32 bfloat16: rounded to nearest even, zeros behind
// `count`.
NB_AMX_INLINE __m512i load_row_bf16(const void* x, Dtype type, int64_t at, int64_t count) {
  const __mmask32 mask = count >= 32 ? 0xffffffffu : (1u << (count < 0 ? 0 : count)) - 1u;
  if (type == Dtype::kF32) {
    const float* p = static_cast<const float*>(x) + at;
    const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
    const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), p + 16);
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  }
  return _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + at);
}

// y[at + i] = v[i] in type, where mask has bit i.
NB_AMX_INLINE void store_outputs(void* y, Dtype type, int64_t at, __m512 v, __mmask16 mask) {
  if (type == Dtype::kF32) {
    _mm512_mask_storeu_ps(static_cast<float*>(y) + at, mask, v);
    return;
  }
  const __m256i half = type == Dtype::kBF16 ? reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v))
                                            : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + at, mask, half);
}

// Mask of the 16 outputs from `at` that are below `end`.
NB_AMX_INLINE __mmask16 mask_below(int64_t at, int64_t end) {
  const int64_t left = end - at;
  return left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1u);
}

NB_AMX_INLINE __m512 load_bias(const void* bias, Dtype type, int64_t at, __mmask16 mask) {
  if (!bias) return _mm512_setzero_ps();
  if (type == Dtype::kF32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(bias) + at);
  const __m256i raw = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(bias) + at);
  if (type == Dtype::kF16) return _mm512_cvtph_ps(raw);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

NB_AMX_INLINE void* allocate(int64_t bytes) {
  void* p = nullptr;
  return posix_memalign(&p, 64, static_cast<size_t>(bytes > 0 ? bytes : 64)) == 0 ? p : nullptr;
}

}  // namespace
}  // namespace nibblock
