// int4_block_sparse_linear and its input gradient for AVX2 and AVX-512: the adapter's side of the product.
//
// The int4 kernel of this level runs as ever and hands each finished tile of float32 sums to `add`, before
// bias, rounding and the store. Rows go through in chunks (the int4 kernels' own size), whose x is packed
// once for all tiles; blocks are laid out when a tile meets them. From 1 to 4 rows nothing is laid out.
// The low-rank pair is t = x A^T (float32, once per chunk), then t C^T in the same place.
#pragma once

#include "cpu_small.h"

namespace nibblock {
namespace {

constexpr int64_t kFusedRows = 512;

template <class O, int B> struct Adapter {
  TileAdd base;  // first: the callback gets its address
  const Int4BlockSparseParams* p;
  Walk walk;
  PackedRows x;   // of the chunk; m0 is 0: the base runs on the chunk alone
  int64_t slots;  // 1, 2, 4 for few rows, when x.data is pack_small's; else 0
  const float* t; // [rows][rank]
};

// acc[0 .. lanes) of `rows` rows += t times the columns [n0, n0 + lanes) of C^T (of A for dx).
template <class O>
static void add_low_rank(const Int4BlockSparseParams& p, bool dx, const float* t, int64_t rows, int64_t n0,
                         int64_t count, float* acc, int64_t acc_stride) {
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
            widen<O>(tag, size, static_cast<const char*>(p.c) + ((n0 + i) * p.rank + j0) * size, depth, line);
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
static void add_narrow(const Adapter<O, B>& a, int64_t u, int64_t c0, int64_t width, int64_t m0, int64_t rows,
                       float* w, float* acc, int64_t acc_stride) {
  using S = Shape<O, B>;
  constexpr int64_t kSlab = 4 * S::kRows;
  alignas(64) float aside[kSlab * S::kWidth];
  const int64_t left = c0 % S::kWidth;
  for (int64_t r0 = 0; r0 < rows; r0 += kSlab) {
    const int64_t count = min64(kSlab, rows - r0);
    multiply_block_row<O, B>(a.walk, a.p->values, a.p->vtype, u, c0 - left, a.x, m0 + r0, count, w, aside,
                             S::kWidth, true);
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
static void add_tile(const TileAdd* self, int64_t m0, int64_t rows, int64_t n0, int64_t cols, float* acc,
                     int64_t acc_stride) {
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
      small_rows<O, B>(a.walk, a.p->values, a.p->vtype, u, a.x.data + m0 * B, a.slots, c0, c0 + width, to,
                       acc_stride, rows, true);
      n = stop;
    } else if (width >= S::kWidth && c0 % S::kWidth == 0) {
      multiply_block_row<O, B>(a.walk, a.p->values, a.p->vtype, u, c0, a.x, m0, rows, w, to, acc_stride, false);
      n += S::kWidth;
    } else {
      const int64_t part = min64(width, S::kWidth - c0 % S::kWidth);
      add_narrow<O, B>(a, u, c0, part, m0, rows, w, to, acc_stride);
      n += part;
    }
  }
  if (!a.p->rank) return;
  for (int64_t i = 0; i < cols; i += O::kLanes) {
    add_low_rank<O>(*a.p, a.walk.dx, a.t + m0 * a.p->rank, rows, n0 + i, min64(O::kLanes, cols - i), acc + i,
                    acc_stride);
  }
}

// The low-rank pair's inner side as float32 [rank][in]: A, or C^T for dx. Null when out of memory.
template <class O> static float* inner_rank(const Int4BlockSparseParams& p, bool dx) {
  const int64_t in = dx ? p.base.w.n : p.base.w.k;
  float* l = static_cast<float*>(aligned_malloc(p.rank * in * 4));
  if (!l) return nullptr;
  with_type(p.ltype, [&](auto tag, int size) {
    if (!dx) return widen<O>(tag, size, p.a, p.rank * in, l);
    for (int64_t n = 0; n < in; ++n) {
      for (int64_t j = 0; j < p.rank; ++j) l[j * in + n] = load_as_f32(p.c, p.ltype, n * p.rank + j);
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

template <class O, int B> static Status fused_of(const Int4BlockSparseParams& p, bool dx, Isa isa) {
  using S = Shape<O, B>;
  constexpr int H = S::kRows;
  const Int4LinearParams& base = p.base;
  const Int4LinearKernel* kernel = int4_base_kernel(base, dx, isa);
  if (!kernel) return kNoKernel;
  Adapter<O, B> a;
  a.base.add = add_tile<O, B>;
  a.p = &p;
  a.walk = make_walk(p.s, dx);
  a.slots = !dx && base.m <= kSmallRows ? small_slots(base.m) : 0;
  const int64_t most = min64(kFusedRows, base.m), tiles = ceil_div(most, H);
  const int64_t x_floats = a.walk.ins * B * (a.slots ? a.slots : tiles * H) + kSmallRows * B;
  float* memory = static_cast<float*>(aligned_malloc((x_floats + most * p.rank) * 4));
  float* inner = p.rank ? inner_rank<O>(p, dx) : nullptr;
  if (!memory || (p.rank && !inner)) {
    free(memory);
    free(inner);
    return kOutOfMemory;
  }
  float* t = memory + x_floats;
  a.t = t;
  static const Parallel serial = {nullptr, 1};
  Status status = kOk;
  for (int64_t m0 = 0; m0 < base.m && status == kOk; m0 += most) {
    Int4LinearParams part = base;
    part.add = &a.base;
    part.m = min64(most, base.m - m0);
    part.x = static_cast<const char*>(base.x) + m0 * base.x_stride * dtype_size(base.xtype);
    part.y = static_cast<char*>(base.y) + m0 * base.y_stride * dtype_size(base.xtype);
    a.x = {memory, 0, part.m, tiles};
    const Parallel& parallel = part.m * a.walk.in_size < 65536 ? serial : *base.parallel;
    if (a.slots) {
      pack_small<O, B>(a.walk, part.x, base.xtype, base.x_stride, part.m, a.slots, memory);
    } else if (p.s.count) {
      auto pack = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) pack_tile<O, B>(a.walk, part.x, base.xtype, base.x_stride, a.x, i);
      };
      parallel_for(parallel, ceil_div(part.m, H), pack);
    }
    int failed = 0;
    auto rank = [&](int64_t begin, int64_t end) {
      float* row = static_cast<float*>(aligned_malloc(a.walk.in_size * 4));
      if (!row) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
      for (int64_t m = begin; m < end; ++m) {
        with_type(base.xtype, [&](auto tag, int size) {
          widen<O>(tag, size, static_cast<const char*>(part.x) + m * base.x_stride * size, a.walk.in_size, row);
        });
        rank_row<O>(row, inner, a.walk.in_size, p.rank, t + m * p.rank);
      }
      free(row);
    };
    if (p.rank) parallel_for(parallel, part.m, rank);
    status = failed ? kOutOfMemory : kernel->run(part);
  }
  free(memory);
  free(inner);
  return status;
}

template <class O> static Status fused(const Int4BlockSparseParams& p, bool dx, Isa isa) {
  switch (p.s.block) {
  case 16: return fused_of<O, 16>(p, dx, isa);
  case 32: return fused_of<O, 32>(p, dx, isa);
  case 64: return fused_of<O, 64>(p, dx, isa);
  default: return fused_of<O, 128>(p, dx, isa);
  }
}

}  // namespace
}  // namespace nibblock
