// int4_block_sparse_linear and its input gradient for AVX2 and AVX-512: the adapter's side of the
// product.
//
// The int4 kernel of this level runs as ever and hands each finished tile of float32 sums to `add`,
// before bias, rounding and the store. Blocks are laid out, and x widened, when a tile meets them:
// no memory but the stack. From 1 to 4 rows nothing is laid out. The low-rank pair is t = x A^T
// (float32, once), then t C^T in the same place.
#pragma once

#include "cpu_low_rank.h"
#include "cpu_small.h"

namespace nibblock {
namespace {

template <class O, int B>
struct Adapter {
  TileAdd base;  // first: the callback gets its address
  const Int4BlockSparseParams* p;
  Walk walk;
  SourceRows x;
  int64_t slots;       // 1, 2 or 4 for few rows, and x in `small`; else 0
  const float* small;  // pack_small's
  LowRank low_rank;
};

// Part [c0, c0 + width) of an output block that is narrower than a register tile: the tile around
// it is computed aside, a few rows at a time.
template <class O, int B>
static void add_narrow(const Adapter<O, B>& a, int64_t u, int64_t c0, int64_t width, int64_t m0,
                       int64_t rows, float* w, float* acc, int64_t acc_stride) {
  using S = Shape<O, B>;
  constexpr int64_t kSlab = 4 * S::kRows;
  alignas(64) float aside[kSlab * S::kWidth];
  const int64_t left = c0 % S::kWidth;
  for (int64_t r0 = 0; r0 < rows; r0 += kSlab) {
    const int64_t count = min64(kSlab, rows - r0);
    multiply_block_row<O, B>(a.walk, a.p->values, a.p->vtype, u, c0 - left, a.x, m0 + r0, count, w,
                             aside, S::kWidth, true);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < width; i += O::kLanes) {
        float* to = acc + (r0 + r) * acc_stride + i;
        O::storef(to, O::addf(O::loadf(to), O::loadf(aside + r * S::kWidth + left + i)));
      }
    }
  }
}

// TileAdd::add. A tile may cover parts of several output blocks, or a part of one.
template <class O, int B>
static void add_tile(const TileAdd* self, int64_t m0, int64_t rows, int64_t n0, int64_t cols,
                     float* acc, int64_t acc_stride) {
  using S = Shape<O, B>;
  const Adapter<O, B>& a = *reinterpret_cast<const Adapter<O, B>*>(self);
  alignas(64) float w[S::kPass * S::kPanelFloats];
  for (int64_t n = n0; n < n0 + cols;) {
    const int64_t u = n / B, c0 = n - u * B;
    const int64_t stop = min64(round_up(n0 + cols, 16), (u + 1) * B), width = stop - n;
    float* to = acc + (n - n0);
    if (a.walk.ptr[u] == a.walk.ptr[u + 1]) {
      n = stop;
    } else if (a.slots) {
      small_rows<O, B>(a.walk, a.p->values, a.p->vtype, u, a.small + m0 * B, a.slots, c0,
                       c0 + width, to, acc_stride, rows, true);
      n = stop;
    } else if (width >= S::kWidth && c0 % S::kWidth == 0) {
      multiply_block_row<O, B>(a.walk, a.p->values, a.p->vtype, u, c0, a.x, m0, rows, w, to,
                               acc_stride, false);
      n += S::kWidth;
    } else {
      const int64_t part = min64(width, S::kWidth - c0 % S::kWidth);
      add_narrow<O, B>(a, u, c0, part, m0, rows, w, to, acc_stride);
      n += part;
    }
  }
  a.low_rank.template add<O>(m0, rows, n0, cols, acc, acc_stride);
}

template <class O, int B>
static Status fused_of(const Int4BlockSparseParams& p, bool dx, Isa isa) {
  Int4LinearParams base = p.base;
  const Int4LinearKernel* kernel = int4_base_kernel(base, dx, isa);
  if (!kernel) return kNoKernel;
  Adapter<O, B> a;
  a.base.add = add_tile<O, B>;
  a.p = &p;
  a.walk = make_walk(p.s, dx);
  a.x = {static_cast<const char*>(base.x), base.xtype, base.x_stride};
  a.slots = !dx && base.m <= kSmallRows ? small_slots(base.m) : 0;
  const int64_t x_floats = a.slots ? (a.walk.ins * a.slots + kSmallRows) * B : 0;
  float* small = static_cast<float*>(aligned_malloc(x_floats * 4));
  Status status = kOutOfMemory;
  if (small && a.low_rank.template make<O>(p, dx)) {
    if (a.slots) {
      pack_small<O, B>(a.walk, base.x, base.xtype, base.x_stride, base.m, a.slots, small);
    }
    a.small = small;
    base.add = &a.base;
    status = kernel->run(base);
  }
  a.low_rank.release();
  free(small);
  return status;
}

template <class O>
static Status fused(const Int4BlockSparseParams& p, bool dx, Isa isa) {
  switch (p.s.block) {
  case 16:
    return fused_of<O, 16>(p, dx, isa);
  case 32:
    return fused_of<O, 32>(p, dx, isa);
  case 64:
    return fused_of<O, 64>(p, dx, isa);
  default:
    return fused_of<O, 128>(p, dx, isa);
  }
}

}  // namespace
}  // namespace nibblock
