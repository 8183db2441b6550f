// int4_linear input gradient on integer dot products: one body for AVX2 and AVX-512-VNNI.
//
//     dx[m, k] = sum_n dy[m, n] * (scale[n, g(k)] * (code[n, k] - zero) + rest[n, g(k)])
//
// The sum runs over n, and so does the scale: it cannot be taken out of an integer sum. It goes
// into dy instead, once for each group of k: e[m, n] = dy[m, n] * scale[n, g] in integers, whose
// product with the codes is exact. rest is 0 for a symmetric weight, offset + zero * scale else.
//
// Steps, for blocks of kFlushK n:
//   1. dy becomes int16 as the forward's x does (activations.h), once for a chunk of rows.
//   2. A task owns up to kDxUnits times 32 k and all rows of the chunk. For each block it takes the
//      scales of a group as int16 parts of the block's largest, and the codes out of the packed
//      order (16 n in a vector, 8 k in a lane) into that of a product over n (neighbouring k in a
//      vector, 2 or 4 n in a lane): a byte shuffle and two permutations for 64 or 128 weights.
//   3. kDxSlab rows at a time: VPMULHRSW makes e of dy and the scales (16 or 32 elements an
//      instruction; for int8 the scales have 7 bits, and products are packed), and the forward's
//      register tiles multiply it.
//
// With bytes on AVX2 e is the unsigned operand, 128 too large, and codes are signed: what that adds
// depends on the column alone and is taken off once for all rows, where the sum of every e would
// have to be found for every group.
//
// Budget on AVX2, int16, groups of 32: a row of a block takes 512 instructions of products for 32
// k, 24 to make e, 24 more for `rest`. FMA would take 1024, two in a cycle; VPMADDWD and VPADDD
// come at three a cycle on Zen 3: at most 1.4x the float32 kernel.
//
// Rounding: dy and the scales to int16 and e to int16 (int8), each by at most half a step of the
// largest in its block of n (for e: of the largest dy times the largest scale).
//
// Determinism: an output's sum runs over n in one order whatever the tile it falls into.
#pragma once

#include "cpu_dx.h"
#include "cpu_integer.h"

namespace nibblock {
namespace {

constexpr int64_t kDxUnit = 32;  // k that share e: a whole group, or a part of one
constexpr int64_t kDxSlab = 48;  // rows that e is made for at a time; 12 KiB of the first cache

// For int8 the sum of dy * rest stays in 32 bits: a lane adds kFlushK / 16 pairs of 2^15
// times this. For int16 each pair becomes a float before it is added.
template <int ACT>
constexpr float kRestLevels = ACT == 8 ? 4095.0f : 32767.0f;

// Scales of one group in a block of n, in parts of their largest, and what they stand for.
struct BlockScales {
  alignas(64) int16_t scale[kFlushK];
  alignas(64) int16_t rest[kFlushK];
  alignas(64) float unit[kDxUnit];  // one value, as the tiles take it
  float rest_unit;
};

// v[0 .. kFlushK) as integers up to `levels`; returns what 1 stands for.
static inline float to_parts(const float* v, float levels, int16_t* parts) {
  uint32_t top = 0;
  for (int64_t i = 0; i < kFlushK; ++i) {
    const uint32_t bits = f32_to_bits(v[i]) & 0x7fffffffu;
    top = bits > top ? bits : top;
  }
  const float max = bits_to_f32(top);
  const float up = max < 1e-30f ? 1.8446744073709552e19f : 1.0f;  // levels / max would overflow
  const float inverse = top ? levels / (max * up) : 0.0f;
  for (int64_t i = 0; i < kFlushK; ++i) {
    const uint32_t bits = f32_to_bits(v[i] * up * inverse + 12582912.0f);
    parts[i] = static_cast<int16_t>(static_cast<int32_t>(bits) - 0x4b400000);
  }
  return max / levels;
}

template <class O, int ACT>
static void block_scales(const Int4LinearParams& p, const Int4Geometry& g, int64_t n0,
                         int64_t group, BlockScales* out) {
  constexpr int kPerPanel = 16 / O::kLanes;
  const float zero = p.w.bits == 8 ? 128.0f : 8.0f;
  alignas(64) float scale[kFlushK] = {}, rest[kFlushK] = {};
  for (int64_t i = 0; i < kFlushK; i += O::kLanes) {
    const int64_t v = (n0 + i) / O::kLanes;
    if (v >= g.panels * kPerPanel) break;
    const uint8_t* panel = p.packed + v / kPerPanel * g.panel_stride;
    const int64_t lane = v % kPerPanel * O::kLanes;
    const typename O::F s = group_scales<O>(p.w, g, panel + g.scales_at, lane, group);
    O::storef(scale + i, s);
    if (!p.w.affine) continue;
    const typename O::F o = group_scales<O>(p.w, g, panel + g.offsets_at, lane, group);
    O::storef(rest + i, O::fmaf(s, O::set1f(zero), o));
  }
  // VPMULHRSW divides by 2^15.
  const float unit = to_parts(scale, ACT == 8 ? 127.0f : 32767.0f, out->scale) * 32768.0f;
  for (int64_t i = 0; i < kDxUnit; ++i) out->unit[i] = unit;
  out->rest_unit = p.w.affine ? to_parts(rest, kRestLevels<ACT>, out->rest) : 0.0f;
}

// Rows n0 .. n0 + depth and columns k0 .. k0 + C * kLanes of the codes as operands of the tiles:
// [depth / 4][1 or 2][C] vectors. int16 operands have the zero point taken off; bytes are unsigned,
// or signed, and then `init` [C] gets what takes off that rows are 128 too large.
template <class O, int BITS, int ACT, int C>
static void turn_codes(const Int4LinearParams& p, const Int4Geometry& g, int64_t n0, int64_t depth,
                       int64_t k0, uint8_t* start, uint8_t* init) {
  using I = typename O::I;
  constexpr int kPerPanel = 16 / O::kLanes, kQuads = O::kLanes / 4;
  constexpr int kSteps = ACT == 16 ? 2 : 1;  // of a quad of n
  constexpr int64_t kVectorBytes =
      kQuads * kSteps * C * O::kBytes;  // of the operands, for kLanes n
  const I zero = O::set1(p.w.bits == 8 ? 0x00800080 : 0x00080008), even = O::set1(0x00ff00ff);
  [[maybe_unused]] const I bytes_zero = O::set1(0x08080808), ones = O::set1(0x01010101);
  [[maybe_unused]] I sums[C];
  NB_UNROLL
  for (int c = 0; c < C; ++c) sums[c] = O::set1(0);
  const int64_t first = n0 / O::kLanes, last = (n0 + depth) / O::kLanes;
  for (int64_t v = first; v < last; ++v) {
    // Signed: in the order of pack8.
    const int64_t eight = v - first, low = eight & 3;
    const int64_t to_place = O::kSignedCodes && (low == 1 || low == 2) ? eight ^ 3 : eight;
    uint8_t* out = start + to_place * kVectorBytes;
    if (v >= g.panels * kPerPanel) {
      memset(out, 0, static_cast<size_t>(kVectorBytes));
      continue;
    }
    const uint8_t* panel = p.packed + v / kPerPanel * g.panel_stride;
    const uint8_t* at = panel + k0 / 8 * line_bytes(BITS) + v % kPerPanel * O::kBytes;
    NB_UNROLL
    for (int c = 0; c < C; ++c, at += O::kLanes / 8 * line_bytes(BITS)) {
      I bytes[kQuads], quads[kQuads];
      NB_UNROLL
      for (int line = 0; line < O::kLanes / 8; ++line) {
        unpack8<O, BITS, 8>(at + line * line_bytes(BITS), bytes + 2 * line, panel + g.palette_at);
      }
      O::template turn<ACT>(bytes, quads);
      NB_UNROLL
      for (int i = 0; i < kQuads; ++i) {
        uint8_t* to = out + (i * kSteps * C + c) * O::kBytes;
        if constexpr (O::kSignedCodes) {
          const I codes = O::sub8(quads[i], bytes_zero);
          O::store(to, codes);
          sums[c] = O::template dot<ACT>(sums[c], ones, codes);
        } else if (ACT == 8) {
          O::store(to, quads[i]);
        } else {
          O::store(to, O::sub16(O::and_(quads[i], even), zero));
          O::store(to + C * O::kBytes, O::sub16(O::template shr16<8>(quads[i]), zero));
        }
      }
    }
  }
  if constexpr (O::kSignedCodes) {
    NB_UNROLL
    for (int c = 0; c < C; ++c) {
      O::store(init + c * O::kBytes, O::sub(O::set1(0), O::template shl32<7>(sums[c])));
    }
  }
}

// What the tiles take besides codes, for the rows of a slab.
struct ScaledRows {
  alignas(64) uint8_t e[kDxSlab * kFlushK * 2];
  int32_t init[kDxSlab];
  float rest[kDxSlab];
};

// e of rows row .. row + rows in one block: d[n] * scale[n]. Also -zero * sum(e), for unsigned
// codes, and the sum of d * rest.
template <class O, int ACT, bool AFFINE>
static void scale_rows(const QuantizedRows& a, int64_t block, int64_t row, int64_t rows,
                       int64_t depth, const BlockScales& s, int32_t zero, ScaledRows* out) {
  using I = typename O::I;
  constexpr int64_t kWords = O::kBytes / 2;
  const I ones = O::set1(0x01010101);
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* d = a.q + block * a.block_stride + (row + r) * a.stride;
    uint8_t* e = out->e + r * kFlushK * (ACT / 8);
    I sum = O::set1(0), rest = O::set1(0);
    typename O::F fine = O::set1f(0.0f);
    for (int64_t n = 0; n < depth; n += 64) {  // a row's padding reaches a multiple of 64
      I part[64 / kWords];
      NB_UNROLL
      for (int i = 0; i < 64 / kWords; ++i) {
        const I dy = O::load(d + (n + i * kWords) * 2);
        part[i] = O::mulhrs(dy, O::load(s.scale + n + i * kWords));
        if (AFFINE) {
          const I pair = O::madd(dy, O::load(s.rest + n + i * kWords));
          if (ACT == 8) rest = O::add(rest, pair);
          if (ACT == 16) fine = O::addf(fine, O::to_float(pair));
        }
        if (ACT == 16) O::store(e + (n + i * kWords) * 2, part[i]);
      }
      NB_UNROLL
      for (int i = 0; i < 64 / kWords && ACT == 8; i += 2) {
        const I bytes = O::pack8(part[i], part[i + 1]);
        O::store(e + n + i * kWords, bytes);
        sum = O::template dot<ACT>(sum, ones, bytes);
      }
    }
    out->init[r] = ACT == 8 ? -zero * O::hsum(sum) : 0;
    // As floats: all lanes together may exceed 32 bits.
    const float total = O::hsumf(ACT == 8 ? O::to_float(rest) : fine);
    // In this order: the total alone may be as large as 2^37 of its own unit.
    out->rest[r] = AFFINE ? total * s.rest_unit * a.scale[block * a.rows + row + r] : 0.0f;
  }
}

// scale_rows for signed codes, R rows, four at most: e is 128 too large, and nothing is summed for
// the zero point. Scales are loaded once for all rows, whose sums are added up together.
template <class O, bool AFFINE, int R>
static void scale_signed(const QuantizedRows& a, int64_t block, int64_t row, int64_t depth,
                         const BlockScales& s, uint8_t* e, float* out) {
  using I = typename O::I;
  const I top_bits = O::set1(static_cast<int32_t>(0x80808080u));
  const uint8_t* d = a.q + block * a.block_stride + row * a.stride;
  I rest[4];
  NB_UNROLL
  for (int r = 0; r < 4; ++r) rest[r] = O::set1(0);
  for (int64_t n = 0; n < depth; n += 32) {
    const I scale = O::load(s.scale + n), scale2 = O::load(s.scale + n + 16);
    NB_UNROLL
    for (int r = 0; r < R; ++r) {
      const I low = O::load(d + r * a.stride + n * 2),
              high = O::load(d + r * a.stride + n * 2 + 32);
      const I bytes = O::pack8(O::mulhrs(low, scale), O::mulhrs(high, scale2));
      O::store(e + r * kFlushK + n, O::xor_(bytes, top_bits));
      if (AFFINE) {
        rest[r] = O::add(rest[r], O::add(O::madd(low, O::load(s.rest + n)),
                                         O::madd(high, O::load(s.rest + n + 16))));
      }
    }
  }
  alignas(16) float sums[4] = {};
  if (AFFINE) O::sums_of_four(rest, sums);
  const float* unit = a.scale + block * a.rows + row;
  NB_UNROLL
  for (int r = 0; r < R; ++r) out[r] = AFFINE ? sums[r] * s.rest_unit * unit[r] : 0.0f;
}

template <class O, bool AFFINE, int R = 4>
static void scale_signed_rows(const QuantizedRows& a, int64_t block, int64_t row, int64_t rows,
                              int64_t depth, const BlockScales& s, ScaledRows* out) {
  int64_t r = 0;
  for (; r + R <= rows; r += R) {
    scale_signed<O, AFFINE, R>(a, block, row + r, depth, s, out->e + r * kFlushK, out->rest + r);
  }
  for (; r < rows; ++r) {
    scale_signed<O, AFFINE, 1>(a, block, row + r, depth, s, out->e + r * kFlushK, out->rest + r);
  }
}

alignas(64) constexpr float kOnes[kDxUnit] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                              1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// The columns of one task.
template <class O, int BITS, int ACT>
struct DxTask {
  static constexpr int C = O::kDxCols;
  static constexpr int64_t kWidth = C * O::kLanes, kTiles = kDxUnit / kWidth;
  static constexpr int64_t kInit = O::kSignedCodes ? C * O::kBytes : 0;
  static constexpr int64_t kOperand = kFlushK * kWidth * (ACT / 8) + kInit;  // bytes

  const Int4LinearParams& p;
  const Int4Geometry& g;
  const QuantizedRows& a;
  float* acc;         // [units][kTiles][rows][kWidth]
  uint8_t* operands;  // [units][kTiles][kOperand]
  BlockScales* scales;
  ScaledRows* scaled;

  int64_t group_of(int64_t unit) const {
    const int64_t group = unit * kDxUnit / g.group;
    return group < g.groups ? group : g.groups - 1;  // padding of k: its codes are zero
  }

  void multiply(int64_t unit0, int64_t units, int64_t block, int64_t depth) {
    const int64_t n0 = block * kFlushK;
    for (int64_t u = 0; u < units; ++u) {
      if (u == 0 || group_of(unit0 + u) != group_of(unit0 + u - 1)) {
        block_scales<O, ACT>(p, g, n0, group_of(unit0 + u), scales + u);
      }
      for (int64_t t = 0; t < kTiles; ++t) {
        uint8_t* operand = operands + (u * kTiles + t) * kOperand;
        turn_codes<O, BITS, ACT, C>(p, g, n0, depth, (unit0 + u) * kDxUnit + t * kWidth,
                                    operand + kInit, operand);
      }
    }
    const int32_t zero = p.w.bits == 8 ? 128 : 8;
    const int64_t slabs = ceil_div(a.rows, kDxSlab);
    for (int64_t i = 0; i < slabs; ++i) {
      const int64_t m0 = a.rows * i / slabs, rows = a.rows * (i + 1) / slabs - m0;
      const BlockScales* s = nullptr;
      for (int64_t u = 0; u < units; ++u) {
        if (u == 0 || group_of(unit0 + u) != group_of(unit0 + u - 1)) {
          s = scales + u;
          if constexpr (O::kSignedCodes) {
            (p.w.affine ? scale_signed_rows<O, true>
                        : scale_signed_rows<O, false>)(a, block, m0, rows, depth, *s, scaled);
          } else {
            (p.w.affine ? scale_rows<O, ACT, true>
                        : scale_rows<O, ACT, false>)(a, block, m0, rows, depth, *s, zero, scaled);
          }
        }
        for (int64_t t = 0; t < kTiles; ++t) {
          tiles(u * kTiles + t, *s, block, m0, rows, depth);
        }
      }
    }
  }

  void tiles(int64_t tile, const BlockScales& s, int64_t block, int64_t m0, int64_t rows,
             int64_t depth) {
    TileArgs args;
    args.w[0] = operands + tile * kOperand + kInit;
    args.column_init = operands + tile * kOperand;
    args.x_stride = kFlushK * (ACT / 8);
    args.lines = depth / 8;
    args.scale = s.unit;
    args.offset = p.w.affine ? kOnes : nullptr;
    args.streams = 0;
    args.blocks = 1;
    args.x_block = args.rows = 0;
    const int64_t count = ceil_div(rows, O::kDxHeight);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r0 = rows * i / count, r1 = rows * (i + 1) / count;
      args.x = scaled->e + r0 * args.x_stride;
      args.xscale = a.scale + block * a.rows + m0 + r0;
      args.init = scaled->init + r0;
      args.xsum = scaled->rest + r0;
      args.acc = acc + (tile * a.rows + m0 + r0) * kWidth;
      tile_for<O, 8, ACT, true, C, O::kDxHeight>(static_cast<int>(r1 - r0))(args);
    }
  }
};

template <class O, int BITS, int ACT>
static Status integer_gradient_of(const Int4LinearParams& p, const Int4Geometry& g,
                                  const QuantizedChunks& a) {
  using Task = DxTask<O, BITS, ACT>;
  const Parallel& parallel = a.rows * p.w.n * p.w.k < 131072 ? kSerial : *p.parallel;
  const int64_t units = ceil_div(p.w.k, kDxUnit);
  const int64_t each = tiles_of_task(units, max64(1, parallel.threads / a.count), O::kDxUnits);
  const int64_t tasks = ceil_div(units, each);
  bool failed = false;
  auto multiply = [&](int64_t begin, int64_t end) {
    const int64_t acc_bytes = each * a.chunk * kDxUnit * 4;
    const int64_t operands = each * Task::kTiles * Task::kOperand;
    const int64_t scales = each * static_cast<int64_t>(sizeof(BlockScales));
    uint8_t* memory =
        static_cast<uint8_t*>(aligned_malloc(acc_bytes + operands + scales + sizeof(ScaledRows)));
    if (!memory) {
      failed = true;
      return;
    }
    ScaledRows* scaled = reinterpret_cast<ScaledRows*>(memory);
    float* acc = reinterpret_cast<float*>(memory + sizeof(ScaledRows));
    uint8_t* at = memory + sizeof(ScaledRows) + acc_bytes;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t c = t / tasks, unit0 = t % tasks * each, count = min64(units - unit0, each);
      const QuantizedRows& rows = a.at[c];
      Task task = {p, g, rows, acc, at, reinterpret_cast<BlockScales*>(at + operands), scaled};
      memset(acc, 0, static_cast<size_t>(acc_bytes));
      for (int64_t block = 0; block < rows.blocks; ++block) {
        task.multiply(unit0, count, block, min64(rows.padded_k - block * kFlushK, kFlushK));
      }
      for (int64_t i = 0; i < count * Task::kTiles; ++i) {
        const int64_t k0 = unit0 * kDxUnit + i * Task::kWidth;
        if (k0 >= p.w.k) break;
        store_columns<O, Task::kWidth>(p, a.m0 + c * a.chunk, rows.rows, k0,
                                       acc + i * rows.rows * Task::kWidth);
      }
    }
    free(memory);
  };
  parallel_for(parallel, a.count * tasks, multiply);
  if (failed) return kOutOfMemory;
  a.each_nonfinite([&](int64_t m) { int4_linear_dx_nonfinite_row(p, m); });
  return kOk;
}

template <class O, int BITS, int ACT>
static Status integer_gradient(const Int4LinearParams& p) {
  const Int4Geometry g = int4_geometry(p.w);
  Int4LinearParams dy = p;  // as rows of a forward: n is summed over, in blocks of kFlushK
  dy.w = {p.w.k, p.w.n, kFlushK, 4, 1, Dtype::kF32};
  for (int64_t m0 = 0; m0 < p.m; m0 += kChunks * O::kDxRows) {
    QuantizedChunks a;
    if (!a.make<O, 16>(dy, m0, O::kDxRows)) return kOutOfMemory;
    const Status status = integer_gradient_of<O, BITS, ACT>(p, g, a);
    if (status != kOk) return status;
  }
  return kOk;
}

template <class O, int ACT>
static Status integer_gradient_any_bits(const Int4LinearParams& p) {
  if (p.w.palette) return integer_gradient<O, kPalette, ACT>(p);
  return p.w.bits == 4 ? integer_gradient<O, 4, ACT>(p) : integer_gradient<O, 8, ACT>(p);
}

}  // namespace
}  // namespace nibblock
