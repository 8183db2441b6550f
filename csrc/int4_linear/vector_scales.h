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

// The same for kernels that walk along k group by group, for C vectors of rows of W: the units of
// int8 scales are converted once in a run of groups.
template <class O, int C>
struct RunningScales {
  alignas(64) float units[C * O::kLanes] = {};

  // Comes before the first `of` of a group.
  inline void enter(const Int4Format& f, const Int4Geometry& g, const uint8_t* const* sections,
                    const int64_t* lanes, int64_t group) {
    if (f.scale_type != Dtype::kI8 || (group & ((int64_t{1} << g.run_shift) - 1))) return;
    for (int c = 0; c < C; ++c) {
      const int64_t unit = (group >> g.run_shift) * kPanelRows + lanes[c];
      O::storef(units + c * O::kLanes, O::load_half(sections[c] + g.units_at + unit * 2));
    }
  }
  inline typename O::F of(const Int4Format& f, const uint8_t* section, int64_t lane, int64_t group,
                          int c) const {
    const int64_t at = group * kPanelRows + lane;
    if (f.scale_type == Dtype::kF32) return O::loadf(section + at * 4);
    if (f.scale_type == Dtype::kF16) return O::load_half(section + at * 2);
    return O::mulf(O::load_int8(section + at), O::loadf(units + c * O::kLanes));
  }
  // Both, for all C.
  inline void load(const Int4Format& f, const Int4Geometry& g, const uint8_t* const* sections,
                   const int64_t* lanes, int64_t group, float* out) {
    enter(f, g, sections, lanes, group);
    for (int c = 0; c < C; ++c) {
      O::storef(out + c * O::kLanes, of(f, sections[c], lanes[c], group, c));
    }
  }
};

}  // namespace
}  // namespace nibblock
