// int4_block_sparse_linear and its input gradient for AVX2 and AVX-512: the adapter's side of the product.
//
// The int4 kernel of this level runs as ever and hands each finished tile of float32 sums to `add`, before
// bias, rounding and the store. Blocks are laid out, and x widened, when a tile meets them: no memory but the
// stack. From 1 to 4 rows nothing is laid out. The low-rank pair is t = x A^T (float32, once), then t C^T in
// the same place.
#pragma once

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
  const float* t;      // [rows][rank]
};

// acc[0 .. lanes) of `rows` rows += t times the columns [n0, n0 + lanes) of C^T (of A for dx).
template <class O>
static void add_low_rank(const Int4BlockSparseParams& p, bool dx, const float* t, int64_t rows,
                         int64_t n0, int64_t count, float* acc, int64_t acc_stride) {
  const int64_t width = dx ? p.base.w.k : p.base.w.n;
  alignas(64) float panel[16 * O::kLanes];
  with_type(p.ltype, [&](auto tag, int size) {
    for (int64_t j0 = 0; j0 < p.rank; j0 += O::kLanes) {
      const int64_t depth = min64(O::kLanes, p.rank - j0);
      if (dx) {
        for (int64_t j = 0; j < depth; ++j) {
          const char* a = static_cast<const char*>(p.a) + ((j0 + j) * width + n0) * size;
          widen<O>(tag, size, a, count, panel + j * O::kLanes);
        }
      } else {
        typename O::F lines[O::kLanes];
        for (int64_t i = 0; i < O::kLanes; ++i) {
          float line[O::kLanes] = {};
          if (i < count) {
            widen<O>(tag, size, static_cast<const char*>(p.c) + ((n0 + i) * p.rank + j0) * size,
                     depth, line);
          }
          lines[i] = O::loadf(line);
        }
        O::transpose_store(lines, panel, O::kLanes);
      }
      for (int64_t r = 0; r < rows; ++r) {
        typename O::F sum = O::loadf(acc + r * acc_stride);
        for (int64_t j = 0; j < depth; ++j) {
          sum = O::fmaf(O::set1f(t[r * p.rank + j0 + j]), O::loadf(panel + j * O::kLanes), sum);
        }
        O::storef(acc + r * acc_stride, sum);
      }
    }
  });
}

// Part [c0, c0 + width) of an output block that is narrower than a register tile: the tile around it is
// computed aside, a few rows at a time.
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
  if (!a.p->rank) return;
  for (int64_t i = 0; i < cols; i += O::kLanes) {
    add_low_rank<O>(*a.p, a.walk.dx, a.t + m0 * a.p->rank, rows, n0 + i, min64(O::kLanes, cols - i),
                    acc + i, acc_stride);
  }
}

// The low-rank pair's inner side as float32 [rank][in]: A, or C^T for dx. Null when out of memory.
template <class O>
static float* inner_rank(const Int4BlockSparseParams& p, bool dx) {
  const int64_t in = dx ? p.base.w.n : p.base.w.k;
  float* l = static_cast<float*>(aligned_malloc(p.rank * in * 4));
  if (!l) return nullptr;
  with_type(p.ltype, [&](auto tag, int size) {
    if (!dx) return widen<O>(tag, size, p.a, p.rank * in, l);
    for (int64_t n = 0; n < in; ++n) {
      for (int64_t j = 0; j < p.rank; ++j)
        l[j * in + n] = load_as_f32(p.c, p.ltype, n * p.rank + j);
    }
  });
  return l;
}

// t[j] = x . l[j] for one row, four at a time.
template <class O>
static void rank_row(const float* x, const float* l, int64_t in, int64_t rank, float* t) {
  for (int64_t j = 0; j < rank; j += 4) {
    const float* at[4];
    typename O::F sum[4];
    NB_UNROLL
    for (int q = 0; q < 4; ++q) at[q] = l + min64(j + q, rank - 1) * in, sum[q] = O::set1f(0.0f);
    int64_t i = 0;
    for (; i + O::kLanes <= in; i += O::kLanes) {
      NB_UNROLL
      for (int q = 0; q < 4; ++q) sum[q] = O::fmaf(O::loadf(x + i), O::loadf(at[q] + i), sum[q]);
    }
    for (int q = 0; q < 4 && j + q < rank; ++q) {
      float lanes[O::kLanes], total = 0.0f;
      O::storef(lanes, sum[q]);
      for (int c = 0; c < O::kLanes; ++c) total += lanes[c];
      for (int64_t c = i; c < in; ++c) total += x[c] * at[q][c];
      t[j + q] = total;
    }
  }
}

template <class O>
static void rank_rows(const Int4BlockSparseParams& p, const float* inner, int64_t in, int64_t begin,
                      int64_t end, float* row, float* t) {
  const Int4LinearParams& b = p.base;
  with_type(b.xtype, [&](auto tag, int size) {
    for (int64_t m = begin; m < end; ++m) {
      widen<O>(tag, size, static_cast<const char*>(b.x) + m * b.x_stride * size, in, row);
      rank_row<O>(row, inner, in, p.rank, t + m * p.rank);
    }
  });
}

template <class O, int B>
static Status fused_of(const Int4BlockSparseParams& p, bool dx, Isa isa) {
  Int4LinearParams base = p.base;
  base.add = nullptr;
  const Int4LinearKernel* kernel = int4_base_kernel(base, dx, isa);
  if (!kernel) return kNoKernel;
  Adapter<O, B> a;
  a.base.add = add_tile<O, B>;
  a.p = &p;
  a.walk = make_walk(p.s, dx);
  a.x = {static_cast<const char*>(base.x), base.xtype, base.x_stride};
  a.slots = !dx && base.m <= kSmallRows ? small_slots(base.m) : 0;
  const int64_t in = a.walk.in_size,
                x_floats = a.slots ? (a.walk.ins * a.slots + kSmallRows) * B : 0;
  float* memory = static_cast<float*>(aligned_malloc((x_floats + base.m * p.rank) * 4));
  float* inner = p.rank ? inner_rank<O>(p, dx) : nullptr;
  float* t = memory + x_floats;
  int failed = !memory || (p.rank && !inner);
  if (!failed && a.slots) {
    pack_small<O, B>(a.walk, base.x, base.xtype, base.x_stride, base.m, a.slots, memory);
  }
  if (!failed && p.rank) {
    static const Parallel serial = {nullptr, 1};
    auto rank = [&](int64_t begin, int64_t end) {
      float* row = static_cast<float*>(aligned_malloc(in * 4));
      if (row) {
        rank_rows<O>(p, inner, in, begin, end, row, t);
      } else {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      }
      free(row);
    };
    parallel_for(base.m * in * p.rank < (1 << 18) ? serial : *base.parallel, base.m, rank);
  }
  a.small = memory;
  a.t = t;
  base.add = &a.base;
  const Status status = failed ? kOutOfMemory : kernel->run(base);
  free(memory);
  free(inner);
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
