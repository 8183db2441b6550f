// What the kernels for CUDA devices are told of a packed weight, by their launch and by the tests.
#pragma once

#include "cuda_decode.h"
#include "int4_linear.h"

namespace nibblock {
namespace cuda {

// Fills the fields that DecodeParams and TileParams share. The plan has refused what is too large
// for 32 bits.
template <class Params>
inline void set_weight(const Int4Format& f, Params* q) {
  const Int4Geometry g = int4_geometry(f);
  q->panel_stride = g.panel_stride;
  q->scales_at = g.scales_at;
  q->offsets_at = g.offsets_at;
  q->n = static_cast<int32_t>(f.n);
  q->k = static_cast<int32_t>(f.k);
  q->k_pad = static_cast<int32_t>(g.k_pad);
  q->panels = static_cast<int32_t>(g.panels);
  q->groups = static_cast<int32_t>(g.groups);
  q->shift = group_shift(f.group);
  q->wide_scale = f.scale_type == Dtype::kF32;
}

}  // namespace cuda
}  // namespace nibblock
