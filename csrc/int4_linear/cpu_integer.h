// int4_linear forward on integer dot products: one body for AVX2, AVX-512 and AVX-512-VNNI.
//
//     y[m, n] = sum_blocks xscale[m, b] * scale[n, g] * (init + sum_k q[m, k] * code[n, k])
//                          (+ offset[n, g] * xsum[m, b]) + bias[n]
//
// The ISA file that includes this defines the vector operations O:
//     kLanes        16 or 8 rows n of a panel in one vector (a panel has 16: AVX2 takes it in
//                   halves)
//     kRows, kCols  largest register tile of a panel: rows of x, vectors of rows of W
//     kDirectRows, kDirectCols  the same without a panel
//     kDecodeCols   vectors of rows of W for one or two rows of x
//     kStepwise     unpack codes one operand at a time: 16 registers do not hold those of a line
//     I, F          integer and float vectors, and the static functions used below
//
// Three ways:
//   decode  one or two rows: cpu_decode.h.
//   direct  up to kDirectRows rows: codes are unpacked on the fly; every weight byte is read once,
//           from several panels at a time, because one stream does not fill this kind of CPU's
//           memory pipes.
//   panel   more rows: the codes of one flush block x kCols vectors are unpacked once into L1 (128
//           k x 64 n x 2 B = 16 KiB) and reused by all row tiles of a chunk of rows. The next
//           block's codes are fetched by the tiles, a line at a time: unpacking takes one cycle in
//           ten at 16 rows, and what it fetched in a burst would fill the line buffers.
//
// Budget on AVX-512-VNNI, int16: VPDPWSSD does 32 multiply-adds and issues twice a cycle: 64 a
// cycle and core, against 16 for VDPBF16PS and 32 for fp32 FMA. A 6 x 4 tile loads 6 broadcasts and
// 4 vectors for 24 dot products: 10 loads in 12 cycles, 2 possible a cycle. The flush costs 4
// instructions and one load and store for each accumulator, every 128 k (64 dot products) or, with
// groups of 32, every 16.
// Decode: 64 bytes of codes (128 weights) take 6 shifts and masks and 4 dot products, 5 cycles: 33
// GB/s a core at 2.6 GHz, above what the memory delivers.
//
// Determinism: an output's sum runs over k in one order whatever the tile it falls into.
#pragma once

#include "cpu_decode.h"
#include "cpu_integer_stretch.h"

namespace nibblock {
namespace {

// Rows of x that a task multiplies: with an adapter beside them they are read again for every tile,
// and fit the second cache.
constexpr int64_t kRowChunk = 256;

// Conversion to the type of x, and the store of one finished row of a tile. `bias` has whole
// vectors, or is null.
template <class O>
static inline void store_row(const Int4LinearParams& p, int64_t m, int64_t n0, int64_t count,
                             const float* bias, const float* acc) {
  char* y = static_cast<char*>(p.y) + (m * p.y_stride + n0) * dtype_size(p.xtype);
  alignas(64) float out[64];
  const bool straight = p.xtype == Dtype::kF32 && count % O::kLanes == 0;
  float* to = straight ? reinterpret_cast<float*>(y) : out;
  for (int64_t i = 0; i < count; i += O::kLanes) {
    typename O::F v = O::loadf(acc + i);
    if (bias) v = O::addf(v, O::loadf(bias + i));
    O::storef(to + i, v);
  }
  if (straight) return;
  if (p.xtype == Dtype::kF32) {
    memcpy(y, out, static_cast<size_t>(count) * 4);
  } else if (p.xtype == Dtype::kBF16) {
    uint16_t half[64];
    for (int64_t i = 0; i < count; ++i) half[i] = f32_to_bf16(out[i]);
    memcpy(y, half, static_cast<size_t>(count) * 2);
  } else {
    uint16_t half[64];
    for (int64_t i = 0; i < round_up(count, 8); i += 8) O::store_f16(out + i, half + i);
    memcpy(y, half, static_cast<size_t>(count) * 2);
  }
}

// All of a chunk of rows for the vectors of rows [v0, v0 + C).
template <class O, int BITS, int ACT, int C>
static void column_tile(const Int4LinearParams& p, const Int4Geometry& g, const QuantizedRows& a,
                        int64_t m0, int64_t v0, float* acc, uint8_t* panel) {
  constexpr int kPerPanel = 16 / O::kLanes;
  constexpr int kSteps = ACT == 16 ? 4 : 2;
  constexpr int64_t kLineBytes = line_bytes(BITS);
  constexpr int64_t kPanels = C < kPerPanel ? 1 : C / kPerPanel;
  constexpr bool kInStretches = can_stretch<O, BITS, ACT>() && C <= O::kCols;
  const bool unpacked = a.rows > O::kDirectRows;
  const int64_t tiles = unpacked ? ceil_div(a.rows, O::kRows) : 1;
  const int64_t n0 = v0 * O::kLanes;
  const int64_t count = p.w.n - n0 < C * O::kLanes ? p.w.n - n0 : C * O::kLanes;
  const bool parts = ACT == 16 && unpacked && p.add && p.add->add_part && count > 0;
  const IntegerRows x = {a.q, a.scale, m0, a.rows, a.block, a.stride, a.block_stride};
  // Groups of less than kFlushK share a call of the tiles: entering one costs a dozen dot
  // products.
  constexpr int64_t kMostBlocks = kFlushK / 16;
  const int64_t stretch = a.block > 0 ? kFlushK / a.block : 1;
  alignas(64) float scale[kMostBlocks * C * O::kLanes], offset[kMostBlocks * C * O::kLanes];
  StretchScales<O, C> in_parts;
  TileArgs t;
  t.x_stride = a.stride;
  t.scale = a.stretches ? in_parts.unit : scale;
  t.offset = !p.w.affine ? nullptr : a.stretches ? in_parts.offset : offset;
  t.parts = in_parts.part;
  t.ahead_step = kLineBytes;
  t.x_block = a.block_stride;
  t.rows = a.rows;
  const int64_t group_bytes = kPanelRows * dtype_size(p.w.scale_type);
  constexpr int64_t acc_stride = C * O::kLanes;
  memset(acc, 0, static_cast<size_t>(a.rows * acc_stride) * 4);
  const uint8_t *codes[C], *scales[kPanels], *offsets[kPanels];
  NB_UNROLL
  for (int c = 0; c < C; ++c) {
    const uint8_t* at = p.packed + (v0 / kPerPanel + c / kPerPanel) * g.panel_stride;
    codes[c] = at + c % kPerPanel * O::kBytes;
    scales[c / kPerPanel] = at + g.scales_at;
    offsets[c / kPerPanel] = at + g.offsets_at;
    t.palette[c] = at + g.palette_at;
  }
  if (a.rows == 1) decode<O, BITS, ACT, 1, C>(p, g, a, v0, acc);
  if (a.rows == 2) decode<O, BITS, ACT, 2, C>(p, g, a, v0, acc);
  for (int64_t b = 0; b < a.blocks && a.rows > 2; b += stretch) {
    t.blocks = a.blocks - b < stretch ? a.blocks - b : stretch;
    const int64_t k0 = b * a.block, end = k0 + t.blocks * a.block;
    const int64_t k1 = end < a.k_pad ? end : a.k_pad;
    // A block is a group, or the only one of its stretch.
    const int64_t group = a.block == g.group ? b : k0 / g.group;
    scales_of<O, C>(p.w.scale_type, g, scales, group, t.blocks, scale);
    if (p.w.affine) scales_of<O, C>(p.w.scale_type, g, offsets, group, t.blocks, offset);
    if constexpr (kInStretches) {
      if (a.stretches) in_parts.set(scale, p.w.affine ? offset : nullptr, t.blocks);
    }
    const int64_t lines = (k1 - k0) / 8;
    t.lines = lines / t.blocks;
    NB_UNROLL
    for (int c = 0; c < C; ++c) t.w[c] = codes[c] + k0 / 8 * kLineBytes;
    if (unpacked) {
      uint8_t* out = panel;
      for (int64_t line = 0; line < lines; ++line) {
        NB_UNROLL
        for (int c = 0; c < C; ++c) {
          typename O::I w[kSteps];
          unpack8<O, BITS, ACT>(t.w[c] + line * kLineBytes, w, t.palette[c]);
          NB_UNROLL
          for (int s = 0; s < kSteps; ++s) O::store(out + (s * C + c) * O::kBytes, w[s]);
        }
        out += kSteps * C * O::kBytes;
      }
      t.w[0] = panel;
      for (int64_t s = 0; s < kPanels; ++s) {
        const uint8_t* at = codes[0] + s * g.panel_stride + (k1 / g.group) * group_bytes;
        O::prefetch(at + g.scales_at);
        if (p.w.affine) O::prefetch(at + g.offsets_at);
      }
    }
    // The next block of these panels, or the first of the next ones. Behind the last ones this
    // names memory that is never read: a prefetch does not fault.
    const int64_t next = k1 < a.k_pad ? k1 / 8 * kLineBytes : kPanels * g.panel_stride;
    for (int64_t i = 0; i < tiles; ++i) {
      t.streams = 0;
      for (int64_t s = i; unpacked && s < kPanels * kLineBytes / 64 && t.streams < 4; s += tiles) {
        t.ahead[t.streams++] =
            codes[0] + s * 64 / kLineBytes * g.panel_stride + next + s * 64 % kLineBytes;
      }
      // Tiles of nearly equal height: 16 rows are 6 + 5 + 5, not 6 + 6 + 4.
      const int64_t r0 = a.rows * i / tiles, r1 = a.rows * (i + 1) / tiles;
      t.x = a.q + b * a.block_stride + r0 * a.stride;
      t.xscale = a.scale + (a.stretches ? b / stretch : b) * a.rows + r0;
      t.part = a.part + b * a.rows + r0;
      t.init = a.init + b * a.rows + r0;
      t.xsum = a.sum + b * a.rows + r0;
      t.acc = acc + r0 * acc_stride;
      const int rows = static_cast<int>(r1 - r0);
      TileFn fn = nullptr;
      if (!unpacked) fn = tile_for<O, BITS, ACT, false, C>(rows);
      if constexpr (C <= O::kCols) {
        if (unpacked) fn = tile_for<O, 8, ACT, true, C>(rows);
        if constexpr (kInStretches) {
          if (a.stretches) fn = stretch_tile_for<O, C>(rows);
        }
      }
      fn(t);
    }
    if (parts) p.add->add_part(p.add, x, n0, count, k0, k1, acc, acc_stride);
  }
  if (p.add && count > 0) {
    (parts ? p.add->add_rest : p.add->add)(p.add, m0, a.rows, n0, count, acc, acc_stride);
  }
  alignas(64) float bias[C * O::kLanes] = {};
  for (int64_t i = 0; p.bias && i < count; ++i) bias[i] = load_as_f32(p.bias, p.bias_type, n0 + i);
  for (int64_t r = 0; r < a.rows && count > 0; ++r)
    store_row<O>(p, m0 + r, n0, count, p.bias ? bias : nullptr, acc + r * acc_stride);
}

template <class O, int BITS, int ACT>
static Status forward(const Int4LinearParams& p) {
  const Int4Geometry g = int4_geometry(p.w);
  constexpr int kPerPanel = 16 / O::kLanes;
  const int64_t vectors = g.panels * kPerPanel;
  // Wide tiles reuse each broadcast of x; narrow layers are cut finer so that the threads get equal
  // shares.
  const int most = p.m <= 2 ? O::kDecodeCols : p.m <= O::kDirectRows ? O::kDirectCols : O::kCols;
  const int cols = vectors >= 16 * most       ? most
                   : vectors >= 4 * kPerPanel ? 2 * kPerPanel
                                              : kPerPanel;
  const int width = cols < most ? cols : most;
  const int64_t tiles = ceil_div(vectors, width);
  // Below this waking the other threads costs more than they save.
  const Parallel& parallel = p.m * p.w.n * p.w.k < 131072 ? kSerial : *p.parallel;
  for (int64_t m0 = 0; m0 < p.m; m0 += kChunks * kRowChunk) {
    QuantizedChunks a;
    const bool stretches = can_stretch<O, BITS, ACT>() && flush_block(g) == O::kPairLines * 8 &&
                           p.m - m0 > O::kDirectRows;
    if (!a.make<O, ACT>(p, m0, kRowChunk, stretches)) return kOutOfMemory;
    bool failed = false;
    auto multiply = [&](int64_t begin, int64_t end) {
      float* acc = static_cast<float*>(
          aligned_malloc(a.chunk * width * O::kLanes * 4 + kFlushK * 2 * width * O::kBytes));
      if (!acc) {
        failed = true;
        return;
      }
      uint8_t* panel = reinterpret_cast<uint8_t*>(acc + a.chunk * width * O::kLanes);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t c = t / tiles, first = m0 + c * a.chunk;
        int64_t v = t % tiles * width;
        const int64_t stop = v + width < vectors ? v + width : vectors;
        // The last tile of a row may be narrower: full, half, then single panels.
        if (stop - v == 4) {
          column_tile<O, BITS, ACT, 4>(p, g, a.at[c], first, v, acc, panel);
          v += 4;
        }
        if (stop - v >= 2) {
          column_tile<O, BITS, ACT, 2>(p, g, a.at[c], first, v, acc, panel);
          v += 2;
        }
        if (O::kLanes == 16 && stop - v >= 1)
          column_tile<O, BITS, ACT, O::kLanes == 16 ? 1 : 2>(p, g, a.at[c], first, v, acc, panel);
      }
      free(acc);
    };
    parallel_for(parallel, a.count * tiles, multiply);
    if (failed) return kOutOfMemory;
    a.each_nonfinite([&](int64_t m) { int4_linear_nonfinite_row(p, m); });
  }
  return kOk;
}

template <class O, int ACT>
static Status forward_any_bits(const Int4LinearParams& p) {
  if (p.w.palette) return forward<O, kPalette, ACT>(p);
  return p.w.bits == 4 ? forward<O, 4, ACT>(p) : forward<O, 8, ACT>(p);
}

}  // namespace
}  // namespace nibblock
