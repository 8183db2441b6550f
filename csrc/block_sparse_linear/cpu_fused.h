// int4_block_sparse_linear and its input gradient for AVX2 and AVX-512: the adapter's side of the
// product.
//
// The int4 kernel of this level runs as ever and hands each tile of float32 sums to the adapter:
// finished ones to `add`, before bias, rounding and the store; or, where it has x as integers, the
// sums of a stretch of k to `add_part` while that stretch of x is in its cache. Source rows of x
// stand a power of two apart and have left the cache by then: reading them there costs more than
// the adapter's products at 2 %. Blocks are laid out, and x widened, when a tile meets them: no
// memory but the stack. From 1 to 4 rows nothing is laid out. The low-rank pair is t = x A^T
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
template <class O, int B, class Rows>
static void add_narrow(const Adapter<O, B>& a, const Rows& x, Entries entries, int64_t c0,
                       int64_t width, int64_t m0, int64_t rows, float* w, float* acc,
                       int64_t acc_stride) {
  using S = Shape<O, B>;
  constexpr int64_t kSlab = 4 * S::kRows;
  alignas(64) float aside[kSlab * S::kWidth];
  const int64_t left = c0 % S::kWidth;
  for (int64_t r0 = 0; r0 < rows; r0 += kSlab) {
    const int64_t count = min64(kSlab, rows - r0);
    multiply_entries<O, B>(a.walk, a.p->values, a.p->vtype, entries, c0 - left, x, m0 + r0, count,
                           w, aside, S::kWidth, true);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < width; i += O::kLanes) {
        float* to = acc + (r0 + r) * acc_stride + i;
        O::storef(to, O::addf(O::loadf(to), O::loadf(aside + r * S::kWidth + left + i)));
      }
    }
  }
}

// Columns [c0, c0 + width) of an output block, width a multiple of 16.
template <class O, int B, class Rows>
static void add_columns(const Adapter<O, B>& a, const Rows& x, Entries entries, int64_t c0,
                        int64_t width, int64_t m0, int64_t rows, float* acc, int64_t acc_stride) {
  using S = Shape<O, B>;
  alignas(64) float w[S::kPass * S::kPanelFloats];
  for (int64_t c = c0; c < c0 + width;) {
    const int64_t left = c0 + width - c;
    float* to = acc + (c - c0);
    if (left >= S::kWidth && c % S::kWidth == 0) {
      multiply_entries<O, B>(a.walk, a.p->values, a.p->vtype, entries, c, x, m0, rows, w, to,
                             acc_stride, false);
      c += S::kWidth;
    } else {
      const int64_t part = min64(left, S::kWidth - c % S::kWidth);
      add_narrow<O, B>(a, x, entries, c, part, m0, rows, w, to, acc_stride);
      c += part;
    }
  }
}

// Calls f(output block, its first column, columns) for what a tile covers: parts of several output
// blocks, or a part of one.
template <int B, class Fn>
NB_INLINE void each_block(int64_t n0, int64_t cols, Fn&& f) {
  const int64_t end = round_up(n0 + cols, 16);
  for (int64_t n = n0; n < n0 + cols;) {
    const int64_t u = n / B, stop = min64(end, (u + 1) * B);
    f(u, n - u * B, stop - n);
    n = stop;
  }
}

// TileAdd::add_rest.
template <class O, int B>
static void add_low_rank(const TileAdd* self, int64_t m0, int64_t rows, int64_t n0, int64_t cols,
                         float* acc, int64_t acc_stride) {
  const Adapter<O, B>& a = *reinterpret_cast<const Adapter<O, B>*>(self);
  a.low_rank.template add<O>(m0, rows, n0, cols, acc, acc_stride);
}

// TileAdd::add.
template <class O, int B>
static void add_tile(const TileAdd* self, int64_t m0, int64_t rows, int64_t n0, int64_t cols,
                     float* acc, int64_t acc_stride) {
  const Adapter<O, B>& a = *reinterpret_cast<const Adapter<O, B>*>(self);
  each_block<B>(n0, cols, [&](int64_t u, int64_t c0, int64_t width) {
    const Entries entries = {a.walk.ptr[u], a.walk.ptr[u + 1]};
    float* to = acc + (u * B + c0 - n0);
    if (entries.begin == entries.end) return;
    if (a.slots) {
      small_rows<O, B>(a.walk, a.p->values, a.p->vtype, u, a.small + m0 * B, a.slots, c0,
                       c0 + width, to, acc_stride, rows, true);
    } else {
      add_columns<O, B>(a, a.x, entries, c0, width, m0, rows, to, acc_stride);
    }
  });
  add_low_rank<O, B>(self, m0, rows, n0, cols, acc, acc_stride);
}

// TileAdd::add_part: the blocks whose last column lies in (k0, k1].
template <class O, int B>
static void add_part(const TileAdd* self, const IntegerRows& x, int64_t n0, int64_t cols,
                     int64_t k0, int64_t k1, float* acc, int64_t acc_stride) {
  const Adapter<O, B>& a = *reinterpret_cast<const Adapter<O, B>*>(self);
  const int64_t first = k0 / B, last = a.walk.in_size <= k1 ? a.walk.ins : k1 / B;
  each_block<B>(n0, cols, [&](int64_t u, int64_t c0, int64_t width) {
    Entries entries = {a.walk.ptr[u], a.walk.ptr[u + 1]};
    while (entries.begin < entries.end && a.walk.in[entries.begin] < first) ++entries.begin;
    while (entries.begin < entries.end && a.walk.in[entries.end - 1] >= last) --entries.end;
    if (entries.begin == entries.end) return;
    add_columns<O, B>(a, x, entries, c0, width, x.m0, x.rows, acc + (u * B + c0 - n0), acc_stride);
  });
}

template <class O, int B>
static Status fused_of(const Int4BlockSparseParams& p, bool dx, Isa isa) {
  Int4LinearParams base = p.base;
  const Int4LinearKernel* kernel = int4_base_kernel(base, dx, isa);
  if (!kernel) return kNoKernel;
  Adapter<O, B> a;
  a.base = {add_tile<O, B>, add_part<O, B>, add_low_rank<O, B>};
  a.p = &p;
  a.walk = make_walk(p.s, dx);
  a.x = {static_cast<const char*>(base.x), base.xtype, base.x_stride};
  a.slots = !dx && base.m <= kSmallRows ? small_slots(base.m) : 0;
  if (a.slots) a.base.add_part = nullptr;
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
