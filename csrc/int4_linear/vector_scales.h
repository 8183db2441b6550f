// A vector of scales (or offsets) of one group as float32, however they are stored. Included by the
// kernel bodies of one ISA file each, hence static and in an anonymous namespace.
#pragma once

#include "int4_linear.h"

namespace nibblock {
namespace {

// Of the rows lane .. lane + O::kLanes of a panel; `section` is where the panel's scales start.
template <class O>
static inline typename O::F group_scales(const Int4Format& f, const Int4Geometry& g,
                                         const uint8_t* section, int64_t lane, int64_t group) {
  const int64_t at = group * kPanelRows + lane;
  if (f.scale_type == Dtype::kF32) return O::loadf(section + at * 4);
  if (f.scale_type == Dtype::kF16) return O::load_half(section + at * 2);
  const int64_t unit = (group >> g.run_shift) * kPanelRows + lane;
  return O::mulf(O::load_int8(section + at), O::load_half(section + g.units_at + unit * 2));
}

// A vector of scales (or offsets) at `at`; `unit` is what int8 ones are parts of.
template <class O, Dtype TYPE>
NB_INLINE typename O::F scale_at(const uint8_t* at, typename O::F unit) {
  if (TYPE == Dtype::kF32) return O::loadf(at);
  if (TYPE == Dtype::kF16) return O::load_half(at);
  return O::mulf(O::load_int8(at), unit);
}

constexpr int64_t scale_bytes(Dtype type) {
  return type == Dtype::kF32 ? 4 : type == Dtype::kF16 ? 2 : 1;
}

// Those of `count` groups, at most kFlushK wide together, for C vectors of rows of W, whole panels:
// out [count][C * kLanes]. `sections` are where the panels' scales start. Nothing is divided, and
// the type is asked for once: with groups of 32 this comes every 128 k of a tile.
template <class O, int C, Dtype TYPE>
static inline void scales_of(const Int4Geometry& g, const uint8_t* const* sections, int64_t group,
                             int64_t count, float* out) {
  constexpr int kPerPanel = kPanelRows / O::kLanes;
  constexpr int64_t kBytes = scale_bytes(TYPE);
  for (int c = 0; c < C; ++c) {
    const uint8_t* section = sections[c / kPerPanel];
    const int64_t lane = c % kPerPanel * O::kLanes;
    typename O::F unit = O::set1f(0.0f);
    if (TYPE == Dtype::kI8) {  // a run of groups is no shorter than kFlushK
      const int64_t run = (group >> g.run_shift) * kPanelRows + lane;
      unit = O::load_half(section + g.units_at + run * 2);
    }
    const uint8_t* at = section + (group * kPanelRows + lane) * kBytes;
    for (int64_t i = 0; i < count; ++i) {
      O::storef(out + (i * C + c) * O::kLanes,
                scale_at<O, TYPE>(at + i * kPanelRows * kBytes, unit));
    }
  }
}

template <class O, int C>
static inline void scales_of(Dtype type, const Int4Geometry& g, const uint8_t* const* sections,
                             int64_t group, int64_t count, float* out) {
  if (type == Dtype::kF16) {
    scales_of<O, C, Dtype::kF16>(g, sections, group, count, out);
  } else if (type == Dtype::kF32) {
    scales_of<O, C, Dtype::kF32>(g, sections, group, count, out);
  } else {
    scales_of<O, C, Dtype::kI8>(g, sections, group, count, out);
  }
}

}  // namespace
}  // namespace nibblock
