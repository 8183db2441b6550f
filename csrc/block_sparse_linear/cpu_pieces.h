// The pieces the block-sparse kernels are put together from, for AVX2 and AVX-512: packing rows of
// x, laying out blocks for the register tile, the tile itself, and the way out to y.
//
// Everything is float32 FMA. On the CPUs measured VDPBF16PS has half its rate, so bfloat16 operands
// are widened once and reused: x once per chunk of rows, blocks once per chunk and panel.
//
// The register tile holds R rows of x times C vectors of output columns over all blocks of a block
// row. One step loads C vectors of the block and broadcasts R elements of x for R * C FMAs: with
// AVX-512 12 x 2 (blocks of 32) 14 loads in 12 cycles, 6 x 4 (64 and 128) 10 in 12, 16 x 1 (16) 17
// in 8. Packed x is [column block][tile of H rows][row of the tile][B]: every broadcast of a step
// is a constant distance from one pointer, rows never fall 4 KiB apart, and going down the rows a
// block reads on.
//
// Determinism: every output is one chain of FMAs over its blocks in the order of the layout, k
// ascending, whatever the tile, chunk, pass or thread.
#pragma once

#include <type_traits>

#include "../common/kernel.h"
#include "block_sparse_linear.h"

namespace nibblock {
namespace {

constexpr int64_t kPassBytes =
    24 << 10;  // blocks laid out at a time: they stay in L1 while x streams

// Calls f with the tag of an element type.
template <class Fn>
static inline void with_type(Dtype t, Fn&& f) {
  if (t == Dtype::kF32) {
    f(FloatBits::F32{}, 4);
  } else if (t == Dtype::kBF16) {
    f(FloatBits::BF16{}, 2);
  } else {
    f(FloatBits::F16{}, 2);
  }
}

// Forward and dx are one product read in two directions: `in` blocks of x give `out` blocks of y.
struct Walk {
  const int32_t* ptr;    // [out blocks + 1] entries of an output block
  const int32_t* in;     // input block of an entry
  const int32_t* block;  // place of an entry's values, or null: the entry itself
  const int32_t* used;   // [in blocks + 1] an input block is used where this climbs
  int64_t out_size, in_size, outs, ins;
  bool dx;
};

static inline Walk make_walk(const BlockLayout& s, bool dx) {
  const int64_t rows = ceil_div(s.n, s.block), cols = ceil_div(s.k, s.block);
  if (dx) return {s.col_ptr, s.col_row, s.col_block, s.row_ptr, s.k, s.n, cols, rows, true};
  return {s.row_ptr, s.col, nullptr, s.col_ptr, s.n, s.k, rows, cols, false};
}

template <class O, int B>
struct Shape {
  static constexpr int kCols = B / O::kLanes < O::kColsF ? B / O::kLanes : O::kColsF;
  static constexpr int kWidth = kCols * O::kLanes;   // output columns of a tile
  static constexpr int kRows = O::tile_rows(kCols);  // H
  static constexpr int kPanelFloats = B * kWidth;    // a block laid out for one tile
  static constexpr int kPass =
      kPassBytes / 4 / kPanelFloats > 1 ? kPassBytes / 4 / kPanelFloats : 1;
};

// out[0 .. count) = x[0 .. count) as float32. Reads nothing behind `count`.
template <class O, class T>
static inline void widen(T type, int size, const void* x, int64_t count, float* out) {
  const char* at = static_cast<const char*>(x);
  int64_t i = 0;
  for (; i + O::kLanes <= count; i += O::kLanes)
    O::storef(out + i, O::load_as(type, at + i * size));
  if (i == count) return;
  char rest[O::kLanes * 4] = {};
  float wide[O::kLanes];
  memcpy(rest, at + i * size, static_cast<size_t>((count - i) * size));
  O::storef(wide, O::load_as(type, rest));
  memcpy(out + i, wide, static_cast<size_t>(count - i) * 4);
}

// Rows [m0, m0 + rows) of x, packed with room for `tiles` tiles to a column block.
struct PackedRows {
  void* data;  // float32, or bfloat16 for AMX
  int64_t m0, rows, tiles;
};

template <class O, int B>
static void pack_tile(const Walk& w, const void* x, Dtype type, int64_t stride, const PackedRows& p,
                      int64_t tile) {
  constexpr int H = Shape<O, B>::kRows;
  float* out = static_cast<float*>(p.data) + tile * H * B;
  const int64_t rows = min64(H, p.rows - tile * H);
  with_type(type, [&](auto tag, int size) {
    for (int64_t r = 0; r < rows; ++r) {
      const char* row = static_cast<const char*>(x) + (p.m0 + tile * H + r) * stride * size;
      for (int64_t j = 0; j < w.ins; ++j) {
        if (w.used[j] == w.used[j + 1]) continue;
        const int64_t count = min64(B, w.in_size - j * B);
        widen<O>(tag, size, row + j * B * size, count, out + (j * p.tiles * H + r) * B);
      }
    }
  });
}

// Columns [c0, c0 + W) of one block as out[depth][W]: a block of S^T for the forward, of S for dx.
// Works on whole blocks: what lies outside a ragged matrix is laid out too and never used.
template <class O, int B, class T>
NB_INLINE void lay_out_as(T type, int size, const char* v, bool dx, int64_t c0, float* out) {
  constexpr int W = Shape<O, B>::kWidth;
  if (dx) {
    for (int64_t n = 0; n < B; ++n) {
      NB_UNROLL
      for (int c = 0; c < W; c += O::kLanes) {
        O::storef(out + n * W + c, O::load_as(type, v + (n * B + c0 + c) * size));
      }
    }
    return;
  }
  for (int64_t c = 0; c < W; c += O::kLanes) {
    for (int64_t k = 0; k < B; k += O::kLanes) {
      typename O::F rows[O::kLanes];
      NB_UNROLL
      for (int i = 0; i < O::kLanes; ++i)
        rows[i] = O::load_as(type, v + ((c0 + c + i) * B + k) * size);
      O::transpose_store(rows, out + k * W + c, W);
    }
  }
}

template <class O, int B>
static void lay_out(const void* values, Dtype type, int64_t z, bool dx, int64_t c0, float* out) {
  const char* v = static_cast<const char*>(values) + z * B * B * dtype_size(type);
  if (type == Dtype::kF32) {
    lay_out_as<O, B>(FloatBits::F32{}, 4, v, dx, c0, out);
  } else {
    lay_out_as<O, B>(FloatBits::BF16{}, 2, v, dx, c0, out);
  }
}

struct TileJob {
  const float* x;            // first row of the tile, column block 0
  int64_t x_row;             // from one row to the next, unless x is packed: B there
  const int32_t* at;         // which block of x an entry reads: its column block when x is packed
  int64_t x_block;           // from one column block to the next
  const int32_t* in;         // column block of each entry
  int64_t count;             // entries
  int64_t in_size;           // columns of x: the last block may be short
  const float* w;            // [entry][B][W]
  const char* const* ahead;  // values of each of the `fetched` entries that come next
  int64_t fetched;
  int64_t ahead_at, ahead_step;  // which part of them this tile fetches: bytes, bytes for each k
  float* acc;                    // [R][acc_stride]
  int64_t acc_stride;
  bool first;  // start from zero instead of from acc
};

template <class O, int B, bool PACKED, int R>
static __attribute__((noinline)) void tile(const TileJob& t) {
  using F = typename O::F;
  constexpr int C = Shape<O, B>::kCols, W = Shape<O, B>::kWidth, H = Shape<O, B>::kRows;
  F sum[R][C];
  NB_UNROLL
  for (int r = 0; r < R; ++r) {
    NB_UNROLL
    for (int c = 0; c < C; ++c) {
      sum[r][c] = t.first ? O::set1f(0.0f) : O::loadf(t.acc + r * t.acc_stride + c * O::kLanes);
    }
  }
  const float* w = t.w;
  const int64_t x_row = PACKED ? B : t.x_row;
  for (int64_t e = 0; e < t.count; ++e, w += B * W) {
    const int64_t j = t.in[e], depth = min64(B, t.in_size - j * B);
    const float* x = t.x + t.at[e] * t.x_block;
    const float* next = x + H * B;
    for (int r = R; !PACKED && r < 2 * R; ++r)
      for (int k = 0; k < B; k += 16) O::prefetch(x + r * x_row + k);
    const float* wk = w;
    // The next rows, and a part of the next values, in one burst: beside the FMAs of each k they
    // would be a tenth of its instructions.
    for (int k = 0; PACKED && k < R * B; k += 16) O::prefetch(next + k);
    if (e < t.fetched) {
      const char* ahead = t.ahead[e] + t.ahead_at;
      for (int64_t b = 0; b < B * t.ahead_step; b += 64) O::prefetch(ahead + b);
    }
    NB_UNROLL_DEPTH
    for (int64_t k = 0; k < depth; ++k, ++x, wk += W) {
      F wv[C];
      NB_UNROLL
      for (int c = 0; c < C; ++c) wv[c] = O::loadf(wk + c * O::kLanes);
      NB_UNROLL
      for (int r = 0; r < R; ++r) {
        const F xv = O::set1f(x[r * x_row]);
        NB_UNROLL
        for (int c = 0; c < C; ++c) sum[r][c] = O::fmaf(xv, wv[c], sum[r][c]);
      }
    }
  }
  NB_UNROLL
  for (int r = 0; r < R; ++r) {
    NB_UNROLL
    for (int c = 0; c < C; ++c) O::storef(t.acc + r * t.acc_stride + c * O::kLanes, sum[r][c]);
  }
}

template <class O, int B, bool PACKED, int R>
struct TileOf {
  static void run(int64_t rows, const TileJob& t) {
    if (rows == R) return tile<O, B, PACKED, R>(t);
    TileOf<O, B, PACKED, R - 1>::run(rows, t);
  }
};
template <class O, int B, bool PACKED>
struct TileOf<O, B, PACKED, 0> {
  static void run(int64_t, const TileJob&) {}
};

// acc[rows][W] += (or = with `first`) rows [r0, r0 + rows) of packed x times the entries laid out
// in w.
template <class O, int B>
static void multiply_rows(const PackedRows& x, int64_t r0, int64_t rows, TileJob t) {
  constexpr int H = Shape<O, B>::kRows;
  float* const acc = t.acc;
  t.x_block = x.tiles * H * B;
  t.ahead_step =
      t.ahead_step * H / max64(rows, H);  // of the whole block, shared out among the tiles
  for (int64_t i = 0; i < rows;) {
    const int64_t in_tile = (r0 + i) % H, height = min64(H - in_tile, rows - i);
    t.x = static_cast<const float*>(x.data) + (r0 + i) * B;
    t.acc = acc + i * t.acc_stride;
    t.ahead_at = i / H * t.ahead_step * B;
    TileOf<O, B, true, H>::run(height, t);
    i += height;
  }
}

// Rows of x as they lie. A fused product meets each block once for all rows, so widening x beside
// the tile costs no more than packing all of x would, and no memory. float32 is read in place where
// O has registers for the addresses of a tile's rows.
struct SourceRows {
  const char* data;
  Dtype type;
  int64_t stride;
};

// wide[r][B] = columns [k0, k0 + live) of rows [m, m + rows) of x, in whole vectors; fetches the
// rows behind them. Into L2 only: rows a power of two apart share one set of L1.
template <class O, int B>
static void widen_rows(const SourceRows& x, int64_t m, int64_t rows, int64_t k0, int64_t live,
                       float* wide) {
  with_type(x.type, [&](auto tag, int size) {
    const char* row = x.data + (m * x.stride + k0) * size;
    for (int64_t r = 0; r < rows; ++r, row += x.stride * size) {
      for (int64_t b = 0; b < live * size; b += 64) {
        __builtin_prefetch(row + rows * x.stride * size + b, 0, 2);
      }
      widen<O>(tag, size, row, live, wide + r * B);
    }
  });
}
template <class O, int B>
static void widen_rows(const IntegerRows& x, int64_t m, int64_t rows, int64_t k0, int64_t live,
                       float* wide) {
  for (int64_t done = 0; done < live; done += x.block) {
    const int64_t b = (k0 + done) / x.block, at = (k0 + done) % x.block;
    const int64_t count = min64(min64(live - done, x.block), B);
    const uint8_t* row = x.q + b * x.block_stride + (m - x.m0) * x.stride + at * 2;
    const float* scale = x.scale + b * x.rows + m - x.m0;
    for (int64_t r = 0; r < rows; ++r, row += x.stride) {
      const typename O::F s = O::set1f(scale[r]);
      for (int64_t i = 0; i < count; i += O::kLanes) {
        __builtin_prefetch(row + rows * x.stride + i * 2, 0, 2);
        O::storef(wide + r * B + done + i, O::mulf(O::load_i16(row + i * 2), s));
      }
    }
  }
}

// The same as multiply_rows from x as it lies: each tile's part of x is widened just before it is
// used, or read where it stands.
template <class O, int B, bool IN_PLACE, class Rows>
static void multiply_source(const Rows& x, int64_t r0, int64_t rows, TileJob t) {
  using S = Shape<O, B>;
  constexpr int H = S::kRows;
  alignas(64) float wide[IN_PLACE ? 1 : S::kPass * H * B];
  int32_t order[S::kPass];
  for (int i = 0; i < S::kPass; ++i) order[i] = i;
  float* const acc = t.acc;
  if constexpr (IN_PLACE) {
    t.x_row = x.stride;
    t.x_block = B;
  } else {
    t.x = wide;
    t.x_block = H * B;
    t.at = order;
  }
  t.ahead_step = t.ahead_step * H / max64(rows, H);
  for (int64_t i = 0; i < rows; i += H) {
    const int64_t height = min64(H, rows - i);
    if constexpr (IN_PLACE) {
      t.x = reinterpret_cast<const float*>(x.data) + (r0 + i) * x.stride;
    } else {
      for (int64_t e = 0; e < t.count; ++e) {
        const int64_t k0 = t.in[e] * B;
        widen_rows<O, B>(x, r0 + i, height, k0, min64(B, t.in_size - k0), wide + e * H * B);
      }
    }
    t.acc = acc + i * t.acc_stride;
    t.ahead_at = i / H * t.ahead_step * B;
    TileOf<O, B, !IN_PLACE, H>::run(height, t);
  }
}

template <class O, int B>
static void multiply_any(const PackedRows& x, int64_t r0, int64_t rows, const TileJob& t) {
  multiply_rows<O, B>(x, r0, rows, t);
}
template <class O, int B, class Rows>
static void multiply_any(const Rows& x, int64_t r0, int64_t rows, const TileJob& t) {
  if constexpr (O::kRowsInPlace && std::is_same_v<Rows, SourceRows>) {
    if (x.type == Dtype::kF32) return multiply_source<O, B, true>(x, r0, rows, t);
  }
  multiply_source<O, B, false>(x, r0, rows, t);
}

// A run of a walk's entries, all of one output block.
struct Entries {
  int64_t begin, end;
};

// acc[rows][W] += (or = with `first`) rows [r0, r0 + rows) of x times columns [c0, c0 + W) of these
// entries, in passes that fit L1. `w` holds Shape::kPass panels.
template <class O, int B, class Rows>
static void multiply_entries(const Walk& walk, const void* values, Dtype vtype, Entries entries,
                             int64_t c0, const Rows& x, int64_t r0, int64_t rows, float* w,
                             float* acc, int64_t acc_stride, bool first) {
  using S = Shape<O, B>;
  const int64_t all = walk.ptr[walk.outs];
  const char* ahead[S::kPass];
  const auto place = [&](int64_t e) { return walk.block ? walk.block[e] : e; };
  const int64_t bytes = B * B * dtype_size(vtype);
  for (int64_t e = entries.begin; e < entries.end; e += S::kPass) {
    const int64_t count = min64(S::kPass, entries.end - e);
    for (int64_t i = 0; i < count; ++i) {
      lay_out<O, B>(values, vtype, place(e + i), walk.dx, c0, w + i * S::kPanelFloats);
    }
    TileJob t;
    t.fetched = min64(count, all - e - count);
    for (int64_t i = 0; i < t.fetched; ++i) {
      ahead[i] = static_cast<const char*>(values) + place(e + count + i) * bytes;
    }
    t.ahead = ahead;
    t.ahead_at = 0;
    t.ahead_step = bytes / B;
    t.x = nullptr;
    t.in = t.at = walk.in + e;
    t.count = count;
    t.in_size = walk.in_size;
    t.w = w;
    t.acc = acc;
    t.acc_stride = acc_stride;
    t.first = first && e == entries.begin;
    multiply_any<O, B>(x, r0, rows, t);
  }
}

// The same for all stored blocks of output block `out`. Returns false, acc untouched, when there
// are none.
template <class O, int B>
static bool multiply_block_row(const Walk& walk, const void* values, Dtype vtype, int64_t out,
                               int64_t c0, const PackedRows& x, int64_t r0, int64_t rows, float* w,
                               float* acc, int64_t acc_stride) {
  const Entries entries = {walk.ptr[out], walk.ptr[out + 1]};
  multiply_entries<O, B>(walk, values, vtype, entries, c0, x, r0, rows, w, acc, acc_stride, true);
  return entries.begin < entries.end;
}

// y[m0 + r, at .. at + count) = acc[r] (+ bias) (+ y0), rounded to y's type. acc has room for whole
// vectors, and so has bias.
template <class O, class T>
static void store_rows_as(T type, int size, const BlockSparseParams& p, int64_t m0, int64_t rows,
                          int64_t at, int64_t count, const float* acc, int64_t acc_stride,
                          const float* bias) {
  const int64_t whole = count / O::kLanes * O::kLanes;
  const size_t left = static_cast<size_t>((count - whole) * size);
  for (int64_t r = 0; r < rows; ++r, acc += acc_stride) {
    char* y = static_cast<char*>(p.y) + ((m0 + r) * p.y_stride + at) * size;
    const char* y0 =
        p.y0 ? static_cast<const char*>(p.y0) + ((m0 + r) * p.y0_stride + at) * size : nullptr;
    const auto sum = [&](int64_t i, const char* y0_at) {
      typename O::F v = O::loadf(acc + i);
      if (bias) v = O::addf(v, O::loadf(bias + i));
      // An adapter of zeros must not change a bit of the base's result, -0 included.
      return y0_at ? O::add_keeping(O::load_as(type, y0_at), v) : v;
    };
    for (int64_t i = 0; i < whole; i += O::kLanes) {
      O::store_as(type, y + i * size, sum(i, y0 ? y0 + i * size : nullptr));
    }
    if (!left) continue;
    char rest[O::kLanes * 4] = {};
    if (y0) memcpy(rest, y0 + whole * size, left);
    O::store_as(type, rest, sum(whole, y0 ? rest : nullptr));
    memcpy(y + whole * size, rest, left);
  }
}

template <class O>
static void store_rows(const BlockSparseParams& p, int64_t m0, int64_t rows, int64_t at,
                       int64_t count, const float* acc, int64_t acc_stride, const float* bias) {
  with_type(p.xtype, [&](auto tag, int size) {
    store_rows_as<O>(tag, size, p, m0, rows, at, count, acc, acc_stride, bias);
  });
}

}  // namespace
}  // namespace nibblock
