// int4_linear forward for one or two rows of x: the loop over k of cpu_integer.h in one function.
//
// With so few rows nothing is reused, so everything outside the dot products counts: float sums
// stay in registers over all blocks, scales go from memory to a multiply without a detour, and
// prefetching runs on into the next panels, because a panel of a small layer (4.5 KiB of codes at K
// = 576) ends before the hardware prefetcher has understood it. The sums are the same, operation by
// operation, as those of the tiles in cpu_integer.h.
#pragma once

#include "activations.h"
#include "cpu_integer_tiles.h"
#include "vector_scales.h"

namespace nibblock {
namespace {

// Vectors of rows [v0, v0 + C) times R quantised rows into acc [R][C * kLanes].
template <class O, int BITS, int ACT, int R, int C>
static void decode(const Int4LinearParams& p, const Int4Geometry& g, const QuantizedRows& a,
                   int64_t v0, float* acc) {
  using I = typename O::I;
  using F = typename O::F;
  constexpr int kPerPanel = 16 / O::kLanes;
  constexpr int kSteps = ACT == 16 ? 4 : 2;
  constexpr int64_t kLineBytes = line_bytes(BITS);
  // Enough independent sums to cover the latency of the dot product (5 cycles, two a cycle).
  // Stepwise it ends in an addition, one cycle.
  constexpr int kSets = O::kStepwise || R * C >= 8 ? 1 : R * C >= 4 || kSteps == 2 ? 2 : 4;
  const uint8_t *codes[C], *scales[C], *offsets[C], *palettes[C];
  int64_t lanes[C];
  NB_UNROLL
  for (int c = 0; c < C; ++c) {
    const int64_t v = v0 + c, lane = (v % kPerPanel) * O::kLanes;
    const uint8_t* panel = p.packed + (v / kPerPanel) * g.panel_stride;
    codes[c] = panel + lane * 4;
    scales[c] = panel + g.scales_at;
    offsets[c] = panel + g.offsets_at;
    palettes[c] = panel + g.palette_at;
    lanes[c] = lane;
  }
  RunningScales<O, C> scale, offset;
  const int64_t scale_bytes = dtype_size(p.w.scale_type);
  // The next C vectors' panels. Behind the last ones this names memory that is never read: a
  // prefetch does not fault.
  const int64_t next_panels = ceil_div(C, kPerPanel) * g.panel_stride;
  F y[R][C];
  NB_UNROLL
  for (int r = 0; r < R; ++r) {
    NB_UNROLL
    for (int c = 0; c < C; ++c) y[r][c] = O::set1f(0.0f);
  }
  for (int64_t b = 0; b < a.blocks; ++b) {
    const int64_t k0 = b * a.block;
    const int64_t k1 = k0 + a.block < a.k_pad ? k0 + a.block : a.k_pad;
    const int64_t group = k0 / g.group;
    I sum[R][C][kSets];
    NB_UNROLL
    for (int r = 0; r < R; ++r) {
      NB_UNROLL
      for (int c = 0; c < C; ++c) {
        sum[r][c][0] = O::set1(a.init[b * a.rows + r]);
        NB_UNROLL
        for (int s = 1; s < kSets; ++s) sum[r][c][s] = O::set1(0);
      }
    }
    const int64_t at = k0 / 8 * kLineBytes;
    int64_t ahead = O::kPrefetch;
    if (at + ahead >= g.scales_at) ahead += next_panels - g.scales_at;
    NB_UNROLL
    for (int c = 0; c < C; ++c) {
      const int64_t next = next_panels + (group * kPanelRows + lanes[c]) * scale_bytes;
      O::prefetch(scales[c] + next);
      if (p.w.affine) O::prefetch(offsets[c] + next);
    }
    scale.enter(p.w, g, scales, lanes, group);
    if (p.w.affine) offset.enter(p.w, g, offsets, lanes, group);
    const uint8_t* x = a.q + b * a.block_stride;
    for (int64_t j = at; j < at + (k1 - k0) / 8 * kLineBytes; j += kLineBytes) {
      I w[C][kSteps], found[C][2];
      NB_UNROLL
      for (int c = 0; c < C; ++c) {
        O::prefetch(codes[c] + j + ahead);
        if (BITS == 8) O::prefetch(codes[c] + j + ahead + 64);
        if (!O::kStepwise) unpack8<O, BITS, ACT>(codes[c] + j, w[c], palettes[c]);
        if (O::kStepwise && BITS == kPalette) look_up<O>(codes[c] + j, palettes[c], found[c]);
      }
      NB_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        NB_UNROLL
        for (int c = 0; c < C && O::kStepwise; ++c) {
          w[c][s] = BITS == kPalette ? operand_of<O, 8, ACT>(found[c][s % 2], s)
                                     : unpack_step<O, BITS, ACT>(codes[c] + j, s);
        }
        NB_UNROLL
        for (int r = 0; r < R; ++r) {
          const I xv = O::broadcast(x + r * a.stride + 4 * s);
          NB_UNROLL
          for (int c = 0; c < C; ++c) {
            sum[r][c][s % kSets] = O::template dot<ACT>(sum[r][c][s % kSets], w[c][s], xv);
          }
        }
      }
      x += 4 * kSteps;
    }
    NB_UNROLL
    for (int c = 0; c < C; ++c) {
      const F wscale = scale.of(p.w, scales[c], lanes[c], group, c);
      F woffset;
      if (p.w.affine) woffset = offset.of(p.w, offsets[c], lanes[c], group, c);
      NB_UNROLL
      for (int r = 0; r < R; ++r) {
        I total = sum[r][c][0];
        NB_UNROLL
        for (int s = 1; s < kSets; ++s) total = O::add(total, sum[r][c][s]);
        if (p.w.affine) y[r][c] = O::fmaf(woffset, O::set1f(a.sum[b * a.rows + r]), y[r][c]);
        const F s = O::mulf(wscale, O::set1f(a.scale[b * a.rows + r]));
        y[r][c] = O::fmaf(O::to_float(total), s, y[r][c]);
      }
    }
  }
  NB_UNROLL
  for (int r = 0; r < R; ++r) {
    NB_UNROLL
    for (int c = 0; c < C; ++c) O::storef(acc + (r * C + c) * O::kLanes, y[r][c]);
  }
}

}  // namespace
}  // namespace nibblock
