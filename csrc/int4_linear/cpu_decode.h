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

// Vectors of rows [v0, v0 + C), whole panels, times R quantised rows into acc [R][C * kLanes].
//
// A group of 32 is 16 instructions of products for each vector: what is done once a block must be
// little. So there is one pointer a panel for codes and one for scales, which move by constants,
// the type of the scales is known, and nothing is divided.
template <class O, int BITS, int ACT, int R, int C, Dtype TYPE>
static void decode_as(const Int4LinearParams& p, const Int4Geometry& g, const QuantizedRows& a,
                      int64_t v0, float* acc) {
  using I = typename O::I;
  using F = typename O::F;
  constexpr int kPerPanel = 16 / O::kLanes, kPanels = C / kPerPanel;
  static_assert(C % kPerPanel == 0, "whole panels");
  constexpr int kSteps = ACT == 16 ? 4 : 2;
  constexpr int64_t kLineBytes = line_bytes(BITS);
  constexpr int64_t kScaleBytes = scale_bytes(TYPE);
  // Enough independent sums to cover the latency of the dot product (5 cycles, two a cycle).
  // Stepwise it ends in an addition, one cycle.
  constexpr int kSets = O::kStepwise || R * C >= 8 ? 1 : R * C >= 4 || kSteps == 2 ? 2 : 4;
  const uint8_t *codes[kPanels], *scales[kPanels], *palettes[kPanels];
  NB_UNROLL
  for (int i = 0; i < kPanels; ++i) {
    codes[i] = p.packed + (v0 / kPerPanel + i) * g.panel_stride;
    scales[i] = codes[i] + g.scales_at;
    palettes[i] = codes[i] + g.palette_at;
  }
  const int64_t to_offsets = g.offsets_at - g.scales_at;
  const bool affine = p.w.affine;
  // The next C vectors' panels. Behind the last ones this names memory that is never read: a
  // prefetch does not fault.
  const int64_t next_panels = kPanels * g.panel_stride;
  const int64_t block_bytes = a.block / 8 * kLineBytes, code_bytes = a.k_pad / 8 * kLineBytes;
  const int64_t blocks_of_group = a.block > 0 ? ceil_div(g.group, a.block) : 1;
  const uint8_t* x = a.q;
  const float *xscale = a.scale, *xsum = a.sum;
  const int32_t* init = a.init;
  F y[R][C], unit[C], offset_unit[C];
  NB_UNROLL
  for (int c = 0; c < C; ++c) {
    unit[c] = offset_unit[c] = O::set1f(0.0f);
    NB_UNROLL
    for (int r = 0; r < R; ++r) y[r][c] = O::set1f(0.0f);
  }
  int64_t group = 0, at_scale = 0, left = blocks_of_group, at = 0;
  for (int64_t b = 0; b < a.blocks; ++b, at += block_bytes) {
    const int64_t end = at + block_bytes < code_bytes ? at + block_bytes : code_bytes;
    I sum[R][C][kSets];
    NB_UNROLL
    for (int r = 0; r < R; ++r) {
      NB_UNROLL
      for (int c = 0; c < C; ++c) {
        sum[r][c][0] = O::set1(init[r]);
        NB_UNROLL
        for (int s = 1; s < kSets; ++s) sum[r][c][s] = O::set1(0);
      }
    }
    const int64_t ahead = O::kPrefetch + (at + O::kPrefetch >= g.scales_at  //
                                              ? next_panels - g.scales_at
                                              : 0);
    NB_UNROLL
    for (int i = 0; i < kPanels; ++i) {
      O::prefetch(scales[i] + at_scale + next_panels);
      if (affine) O::prefetch(scales[i] + at_scale + next_panels + to_offsets);
    }
    if (TYPE == Dtype::kI8 && (group & ((int64_t{1} << g.run_shift) - 1)) == 0) {
      NB_UNROLL
      for (int c = 0; c < C; ++c) {
        const uint8_t* units = scales[c / kPerPanel] + g.units_at +
                               ((group >> g.run_shift) * 16 + c % kPerPanel * O::kLanes) * 2;
        unit[c] = O::load_half(units);
        if (affine) offset_unit[c] = O::load_half(units + to_offsets);
      }
    }
    const uint8_t* xb = x;
    for (int64_t j = at; j < end; j += kLineBytes) {
      I w[C][kSteps], found[C][2];
      NB_UNROLL
      for (int i = 0; i < kPanels; ++i) {
        O::prefetch(codes[i] + j + ahead);
        if (BITS == 8) O::prefetch(codes[i] + j + ahead + 64);
      }
      NB_UNROLL
      for (int c = 0; c < C; ++c) {
        const uint8_t* line = codes[c / kPerPanel] + j + c % kPerPanel * O::kBytes;
        if (!O::kStepwise) unpack8<O, BITS, ACT>(line, w[c], palettes[c / kPerPanel]);
        if (O::kStepwise && BITS == kPalette) look_up<O>(line, palettes[c / kPerPanel], found[c]);
      }
      NB_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        NB_UNROLL
        for (int c = 0; c < C && O::kStepwise; ++c) {
          const uint8_t* line = codes[c / kPerPanel] + j + c % kPerPanel * O::kBytes;
          w[c][s] = BITS == kPalette ? operand_of<O, 8, ACT>(found[c][s % 2], s)
                                     : unpack_step<O, BITS, ACT>(line, s);
        }
        NB_UNROLL
        for (int r = 0; r < R; ++r) {
          const I xv = O::broadcast(xb + r * a.stride + 4 * s);
          NB_UNROLL
          for (int c = 0; c < C; ++c) {
            sum[r][c][s % kSets] = O::template dot<ACT>(sum[r][c][s % kSets], w[c][s], xv);
          }
        }
      }
      xb += 4 * kSteps;
    }
    NB_UNROLL
    for (int c = 0; c < C; ++c) {
      const uint8_t* scale =
          scales[c / kPerPanel] + at_scale + c % kPerPanel * O::kLanes * kScaleBytes;
      const F wscale = scale_at<O, TYPE>(scale, unit[c]);
      F woffset;
      if (affine) woffset = scale_at<O, TYPE>(scale + to_offsets, offset_unit[c]);
      NB_UNROLL
      for (int r = 0; r < R; ++r) {
        I total = sum[r][c][0];
        NB_UNROLL
        for (int s = 1; s < kSets; ++s) total = O::add(total, sum[r][c][s]);
        if (affine) y[r][c] = O::fmaf(woffset, O::set1f(xsum[r]), y[r][c]);
        const F s = O::mulf(wscale, O::set1f(xscale[r]));
        y[r][c] = O::fmaf(O::to_float(total), s, y[r][c]);
      }
    }
    x += a.block_stride;
    xscale += R;
    xsum += R;
    init += R;
    if (--left == 0) {
      left = blocks_of_group;
      ++group;
      at_scale += kPanelRows * kScaleBytes;
    }
  }
  NB_UNROLL
  for (int r = 0; r < R; ++r) {
    NB_UNROLL
    for (int c = 0; c < C; ++c) O::storef(acc + (r * C + c) * O::kLanes, y[r][c]);
  }
}

template <class O, int BITS, int ACT, int R, int C>
static void decode(const Int4LinearParams& p, const Int4Geometry& g, const QuantizedRows& a,
                   int64_t v0, float* acc) {
  if (p.w.scale_type == Dtype::kF16) {
    decode_as<O, BITS, ACT, R, C, Dtype::kF16>(p, g, a, v0, acc);
  } else if (p.w.scale_type == Dtype::kF32) {
    decode_as<O, BITS, ACT, R, C, Dtype::kF32>(p, g, a, v0, acc);
  } else {
    decode_as<O, BITS, ACT, R, C, Dtype::kI8>(p, g, a, v0, acc);
  }
}

}  // namespace
}  // namespace nibblock
