// int4_linear input gradient in float32: one body for AVX2 and AVX-512.
//
//     dx[m, k] = sum_n dy[m, n] * w[n, k]
//
// The scale of a weight depends on n, which is summed over here, so the codes cannot be multiplied
// as integers: blocks of W are dequantised to float32 and transposed from the packed order (16 rows
// n in a vector) to the order of a product over n (neighbouring k in a vector), then multiplied
// with FMA.
//
// A task owns up to kDxTiles times kColsF vectors of k and all rows of a chunk of kDxRows of dy.
// For every kDxDepth n it dequantises kDxDepth n of them into L1 (16 KiB with AVX-512, 24 KiB with
// AVX2) and runs register tiles of kRowsF x kColsF over the rows. A 6 x 4 tile of AVX-512 loads 4
// vectors and 6 broadcasts for 24 FMAs: 10 loads in 12 cycles. Dequantising costs about 11
// instructions for 16 weights, shared by all rows of the chunk.
//
// dy is read once by each task, from the last cache or, if n is large, from memory: a tile of AVX2
// alone, 16 k wide, has 8 operations for each byte of it, which two cores cannot be fed. Six tiles
// side by side have 48: twice the rate for a head of 49152 rows, 10..17 % more for square layers.
//
// Determinism: each output is a sum over n in one order, in blocks of kDxDepth, whatever the tile
// it falls into.
#pragma once

#include "activations.h"
#include "vector_scales.h"

namespace nibblock {
namespace {

// Rows n0 .. n0 + depth and columns k0 .. k0 + width of W, as out[n][k] with row stride `width`.
template <class O, int BITS>
static void dequantize_block(const Int4LinearParams& p, const Int4Geometry& g, int64_t n0,
                             int64_t depth, int64_t k0, int64_t width, float* out) {
  using I = typename O::I;
  using F = typename O::F;
  constexpr int kPerPanel = 16 / O::kLanes;
  const F zero = O::set1f(BITS == 4 ? -8.0f : -128.0f);
  const I mask = O::set1(BITS == 8 ? 255 : 15);
  for (int64_t v = n0 / O::kLanes; v < (n0 + depth) / O::kLanes; ++v, out += O::kLanes * width) {
    if (v >= g.panels * kPerPanel) {
      memset(out, 0, static_cast<size_t>(O::kLanes * width) * sizeof(float));
      continue;
    }
    const uint8_t* panel = p.packed + (v / kPerPanel) * g.panel_stride;
    const int half = static_cast<int>(v % kPerPanel);
    for (int64_t k = k0; k < k0 + width; k += O::kLanes) {
      F columns[16];
      for (int64_t line = 0; line < O::kLanes / 8; ++line) {
        const int64_t k8 = k + 8 * line;
        // k_pad may reach past the last group (its codes are zero); stay inside the scales.
        const int64_t group = k8 / g.group < g.groups ? k8 / g.group : g.groups - 1;
        const int64_t lane = half * O::kLanes;
        const F scale = group_scales<O>(p.w, g, panel + g.scales_at, lane, group);
        const F offset =
            p.w.affine ? group_scales<O>(p.w, g, panel + g.offsets_at, lane, group) : zero;
        I c[8];
        if (BITS != 8) {
          const I codes = O::load(panel + k8 / 8 * 64 + half * O::kBytes);
          c[0] = O::and_(codes, mask);
          c[2] = O::and_(O::template shr32<4>(codes), mask);
          c[4] = O::and_(O::template shr32<8>(codes), mask);
          c[6] = O::and_(O::template shr32<12>(codes), mask);
          c[1] = O::and_(O::template shr32<16>(codes), mask);
          c[3] = O::and_(O::template shr32<20>(codes), mask);
          c[5] = O::and_(O::template shr32<24>(codes), mask);
          c[7] = O::template shr32<28>(codes);
          if (BITS == kPalette) {
            const I palette = O::load_table(panel + g.palette_at);
            NB_UNROLL
            for (int j = 0; j < 8; ++j) c[j] = O::and_(O::lookup(palette, c[j]), O::set1(255));
          }
        } else {
          const I a = O::load(panel + k8 / 8 * 128 + half * O::kBytes);
          const I b = O::load(panel + k8 / 8 * 128 + 64 + half * O::kBytes);
          c[0] = O::and_(a, mask);
          c[4] = O::and_(O::template shr32<8>(a), mask);
          c[1] = O::and_(O::template shr32<16>(a), mask);
          c[5] = O::template shr32<24>(a);
          c[2] = O::and_(b, mask);
          c[6] = O::and_(O::template shr32<8>(b), mask);
          c[3] = O::and_(O::template shr32<16>(b), mask);
          c[7] = O::template shr32<24>(b);
        }
        NB_UNROLL
        for (int j = 0; j < 8; ++j) {
          const F code = O::to_float(c[j]);
          columns[8 * line + j] =
              p.w.affine ? O::fmaf(code, scale, offset) : O::mulf(O::addf(code, offset), scale);
        }
      }
      O::transpose_store(columns, out + (k - k0), width);
    }
  }
}

template <class O, int R>
static void dx_tile(const float* g, int64_t depth, const float* w, float* acc, int64_t acc_stride,
                    bool first) {
  using F = typename O::F;
  constexpr int C = O::kColsF;
  F sum[R][C];
  NB_UNROLL
  for (int r = 0; r < R; ++r) {
    NB_UNROLL
    for (int c = 0; c < C; ++c)
      sum[r][c] = first ? O::set1f(0.0f) : O::loadf(acc + r * acc_stride + c * O::kLanes);
  }
  NB_UNROLL_DEPTH
  for (int64_t n = 0; n < depth; ++n) {
    F wv[C];
    NB_UNROLL
    for (int c = 0; c < C; ++c) wv[c] = O::loadf(w + n * C * O::kLanes + c * O::kLanes);
    NB_UNROLL
    for (int r = 0; r < R; ++r) {
      const F gv = O::set1f(g[r * depth + n]);
      NB_UNROLL
      for (int c = 0; c < C; ++c) sum[r][c] = O::fmaf(gv, wv[c], sum[r][c]);
    }
  }
  NB_UNROLL
  for (int r = 0; r < R; ++r) {
    NB_UNROLL
    for (int c = 0; c < C; ++c) O::storef(acc + r * acc_stride + c * O::kLanes, sum[r][c]);
  }
}

template <class O>
static void dx_rows(int rows, const float* g, int64_t depth, const float* w, float* acc,
                    bool first) {
  constexpr int64_t width = O::kColsF * O::kLanes;
  static_assert(O::kRowsF == 6, "one case for each height");
  switch (rows) {
  case 1:
    return dx_tile<O, 1>(g, depth, w, acc, width, first);
  case 2:
    return dx_tile<O, 2>(g, depth, w, acc, width, first);
  case 3:
    return dx_tile<O, 3>(g, depth, w, acc, width, first);
  case 4:
    return dx_tile<O, 4>(g, depth, w, acc, width, first);
  case 5:
    return dx_tile<O, 5>(g, depth, w, acc, width, first);
  default:
    return dx_tile<O, 6>(g, depth, w, acc, width, first);
  }
}

// Finished sums [rows][width] of the columns from k0 on: what rides on them, the type of x, y.
template <class O, int64_t width>
static void store_columns(const Int4LinearParams& p, int64_t m0, int64_t rows, int64_t k0,
                          float* acc) {
  const int64_t live = p.w.k - k0 < width ? p.w.k - k0 : width;
  if (p.add) p.add->add(p.add, m0, rows, k0, live, acc, width);
  for (int64_t r = 0; r < rows; ++r) {
    char* y = static_cast<char*>(p.y) + ((m0 + r) * p.y_stride + k0) * dtype_size(p.xtype);
    const float* a = acc + r * width;
    if (p.xtype == Dtype::kF32 && live == width) {
      for (int64_t i = 0; i < width; i += O::kLanes) {
        O::storef(reinterpret_cast<float*>(y) + i, O::loadf(a + i));
      }
    } else if (p.xtype == Dtype::kF32) {
      memcpy(y, a, static_cast<size_t>(live) * 4);
    } else {
      uint16_t half[width];
      if (p.xtype == Dtype::kBF16) {
        for (int64_t i = 0; i < live; ++i) half[i] = f32_to_bf16(a[i]);
      } else {
        for (int64_t i = 0; i < width; i += 8) O::store_f16(a + i, half + i);
      }
      memcpy(y, half, static_cast<size_t>(live) * 2);
    }
  }
}

// How many register tiles side by side a task owns: `most`, unless the threads would then get
// unequal shares.
static inline int64_t tiles_of_task(int64_t tiles, int64_t threads, int64_t most) {
  int64_t best = 1, least = ceil_div(tiles, threads);
  for (int64_t each = 2; each <= most; ++each) {
    const int64_t share = ceil_div(ceil_div(tiles, each), threads) * each;
    if (share <= least) best = each, least = share;
  }
  return best;
}

template <class O, int BITS>
static Status input_gradient(const Int4LinearParams& p) {
  constexpr int64_t width = O::kColsF * O::kLanes;
  const Int4Geometry g = int4_geometry(p.w);
  const int64_t N = p.w.n, K = p.w.k;
  const int64_t n_pad = round_up(N, kPanelRows);
  for (int64_t m0 = 0; m0 < p.m; m0 += O::kDxRows) {
    const int64_t rows = p.m - m0 < O::kDxRows ? p.m - m0 : O::kDxRows;
    float* grad = static_cast<float*>(aligned_malloc(rows * n_pad * 4));
    if (!grad) return kOutOfMemory;
    auto convert = [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        // Block by block along n, all rows of a block together: a tile's rows are one stretch.
        for (int64_t n = 0; n < n_pad; n += O::kDxDepth) {
          const int64_t depth = n_pad - n < O::kDxDepth ? n_pad - n : O::kDxDepth;
          const int64_t live = N - n < depth ? N - n : depth;
          load_block<O>(p.x, p.xtype, (m0 + r) * p.x_stride + n, live, depth,
                        grad + n * rows + r * depth);
        }
      }
    };
    parallel_for(rows * N < 65536 ? kSerial : *p.parallel, rows, convert);
    const int64_t tiles = ceil_div(rows, O::kRowsF), columns = ceil_div(K, width);
    const Parallel& parallel = rows * N * K < 131072 ? kSerial : *p.parallel;
    const int64_t each =
        tiles_of_task(columns, parallel.threads > 0 ? parallel.threads : 1, O::kDxTiles);
    bool failed = false;
    auto multiply = [&](int64_t begin, int64_t end) {
      float* acc = static_cast<float*>(aligned_malloc((rows + O::kDxDepth) * width * each * 4));
      if (!acc) {
        failed = true;
        return;
      }
      float* w = acc + rows * width * each;
      for (int64_t t = begin; t < end; ++t) {
        const int64_t c0 = t * each, count = columns - c0 < each ? columns - c0 : each;
        if (N == 0) memset(acc, 0, static_cast<size_t>(rows * width * count) * sizeof(float));
        for (int64_t n0 = 0; n0 < n_pad; n0 += O::kDxDepth) {
          const int64_t depth = n_pad - n0 < O::kDxDepth ? n_pad - n0 : O::kDxDepth;
          for (int64_t c = 0; c < count; ++c) {
            dequantize_block<O, BITS>(p, g, n0, depth, (c0 + c) * width, width,
                                      w + c * depth * width);
          }
          for (int64_t i = 0; i < tiles; ++i) {
            const int64_t r0 = rows * i / tiles, r1 = rows * (i + 1) / tiles;
            const float* gr = grad + n0 * rows + r0 * depth;
            for (int64_t c = 0; c < count; ++c) {
              dx_rows<O>(static_cast<int>(r1 - r0), gr, depth, w + c * depth * width,
                         acc + (c * rows + r0) * width, n0 == 0);
            }
          }
        }
        for (int64_t c = 0; c < count; ++c) {
          store_columns<O, width>(p, m0, rows, (c0 + c) * width, acc + c * rows * width);
        }
      }
      free(acc);
    };
    parallel_for(parallel, ceil_div(columns, each), multiply);
    free(grad);
    if (failed) return kOutOfMemory;
  }
  return kOk;
}

template <class O>
static Status input_gradient_any_bits(const Int4LinearParams& p) {
  if (p.w.palette) return input_gradient<O, kPalette>(p);
  return p.w.bits == 4 ? input_gradient<O, 4>(p) : input_gradient<O, 8>(p);
}

}  // namespace
}  // namespace nibblock
