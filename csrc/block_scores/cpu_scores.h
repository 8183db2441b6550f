// block_scores for AVX2 and AVX-512.
//
// Both modes are one product P = g^T X reduced to squared norms of blocks while it lies in cache:
// X is x itself (exact: B columns a block) or its sketch (s columns a block, made first: m rows of
// ceil(k / B) s numbers). A task is a panel of at most kPanelTiles x kPanelTiles tiles of 32 x 32
// of P. It goes down the tokens in chunks: packs its columns of g (and x) as [tile][token][32],
// runs the register tiles of block_weight_grad on every pair of tiles, and keeps the sums, 256 KiB,
// in L2 beside as much packed data. At the end each tile is squared and summed by columns, and
// these sums go to their blocks. Whatever N, K and m: no more memory than that a thread, 16 bytes a
// block, and the sketch.
//
// A last tile of at most 16 columns is 16 wide. Panels hold whole blocks, so that one task owns
// each block's sum.
//
// Determinism: an element of P is one chain of FMAs over m, a block's sum has a fixed order; how
// panels are cut depends on shapes alone.
#pragma once

#include "../block_sparse_linear/cpu_weight_grad.h"
#include "block_scores.h"

namespace nibblock {
namespace {

constexpr int64_t kEdge = 32;
constexpr int64_t kChunk = kPieceFloats / kEdge;  // tokens
constexpr int64_t kPanelTiles = 8;
constexpr int64_t kNarrowPanelTiles = 3;  // below that packing costs more than threads gain
constexpr int64_t kTasks = 24;            // wanted, where panels can be that small

// Columns of X in tiles: which blocks a tile holds.
struct ScorePlan {
  int64_t rows, cols;   // blocks
  int64_t width;        // columns of X of a block: B or s
  int64_t tile_blocks;  // sketch: whole blocks in a tile; 0: exact, columns run on through tiles
  int64_t row_tiles, col_tiles;
  int64_t row_unit, col_unit;  // tiles that share blocks
  int64_t row_parts, col_parts;
  int64_t high, wide;  // tiles of the largest panel

  int64_t live(const BlockScoresParams& p, int64_t tile) const {
    if (!tile_blocks) return min64(kEdge, p.k - tile * kEdge);
    return min64(tile_blocks, cols - tile * tile_blocks) * width;
  }
  int64_t tile_width(const BlockScoresParams& p, int64_t tile) const {
    return live(p, tile) <= 16 ? 16 : 32;
  }
  int64_t first_block(int64_t tile) const {
    return tile_blocks ? tile * tile_blocks : tile * kEdge / width;
  }
};

static int64_t part_begin(int64_t tiles, int64_t unit, int64_t parts, int64_t i) {
  return min64(tiles, ceil_div(tiles, unit) * i / parts * unit);
}

static ScorePlan make_plan(const BlockScoresParams& p) {
  ScorePlan s;
  s.rows = ceil_div(p.n, p.block);
  s.cols = ceil_div(p.k, p.block);
  s.width = p.sketch ? p.sketch : p.block;
  s.tile_blocks = p.sketch ? kEdge / p.sketch : 0;
  s.row_tiles = ceil_div(p.n, kEdge);
  s.col_tiles = p.sketch ? ceil_div(s.cols, s.tile_blocks) : ceil_div(p.k, kEdge);
  s.row_unit = max64(1, p.block / kEdge);
  s.col_unit = p.sketch ? 1 : s.row_unit;
  const int64_t row_units = ceil_div(s.row_tiles, s.row_unit);
  const int64_t col_units = ceil_div(s.col_tiles, s.col_unit);
  s.col_parts = ceil_div(col_units, max64(1, kPanelTiles / s.col_unit));
  const int64_t least = ceil_div(row_units, max64(1, kPanelTiles / s.row_unit));
  const int64_t most = ceil_div(row_units, max64(1, kNarrowPanelTiles / s.row_unit));
  s.row_parts = max64(least, min64(most, ceil_div(kTasks, s.col_parts)));
  s.high = ceil_div(row_units, s.row_parts) * s.row_unit;
  s.wide = ceil_div(col_units, s.col_parts) * s.col_unit;
  return s;
}

// Tiles [t0, t1) of 32 columns, rows [m0, m0 + rows), as [tile][kChunk][32] float32; zeros behind
// the last column. With `narrow` a tile of at most 16 columns has rows of 16.
template <class O>
static void pack_tiles(const void* x, Dtype type, int64_t stride, int64_t size, int64_t t0,
                       int64_t t1, bool narrow, int64_t m0, int64_t rows, float* out) {
  with_type(type, [&](auto tag, int bytes) {
    for (int64_t r = 0; r < rows; ++r) {
      const char* row = static_cast<const char*>(x) + (m0 + r) * stride * bytes;
      for (int64_t t = t0; t < t1; ++t) {
        const int64_t count = min64(kEdge, size - t * kEdge);
        const int64_t width = narrow && count <= 16 ? 16 : kEdge;
        float* to = out + (t - t0) * kChunk * kEdge + r * width;
        if (count < width) memset(to, 0, static_cast<size_t>(width) * 4);
        widen<O>(tag, bytes, row + t * kEdge * bytes, count, to);
      }
    }
  });
}

// --- the sketch ----------------------------------------------------------------------------------

// Signs as float32 [column of z][B], zeros in columns that belong to no block, and where in x each
// column's block begins.
static void make_signs(const BlockScoresParams& p, const ScorePlan& s, float* signs,
                       int64_t* begin) {
  for (int64_t c = 0; c < s.col_tiles * kEdge; ++c) {
    const int64_t tile = c / kEdge, i = c % kEdge;
    const bool dead = i >= s.live(p, tile);
    const int64_t j = dead ? 0 : tile * s.tile_blocks + i / p.sketch, q = i % p.sketch;
    begin[c] = j * p.block;
    for (int64_t b = 0; b < p.block; ++b) {
      const uint64_t bits = dead ? 0 : block_scores_signs(p.seed, j * p.block + b);
      signs[c * p.block + b] = dead ? 0.0f : (bits >> q & 1 ? -1.0f : 1.0f);
    }
  }
}

// z = x Omega for rows [m0, m1), as [tile][m][16 or 32]. `row` holds cols * B floats.
template <class O, int B>
static void sketch_rows(const BlockScoresParams& p, const ScorePlan& s, const float* signs,
                        const int64_t* begin, int64_t m0, int64_t m1, float* row, float* z) {
  using F = typename O::F;
  memset(row, 0, static_cast<size_t>(s.cols * B) * 4);
  for (int64_t m = m0; m < m1; ++m) {
    with_type(p.xtype, [&](auto tag, int bytes) {
      widen<O>(tag, bytes, static_cast<const char*>(p.x) + m * p.x_stride * bytes, p.k, row);
    });
    for (int64_t t = 0; t < s.col_tiles; ++t) {
      const int64_t width = s.tile_width(p, t);
      for (int64_t c = 0; c < width; c += O::kLanes) {
        F lanes[O::kLanes];
        NB_UNROLL
        for (int i = 0; i < O::kLanes; ++i) {
          const int64_t at = t * kEdge + c + i;
          const float* x = row + begin[at];
          const float* sign = signs + at * B;
          F sum = O::mulf(O::loadf(x), O::loadf(sign));
          for (int b = O::kLanes; b < B; b += O::kLanes) {
            sum = O::fmaf(O::loadf(x + b), O::loadf(sign + b), sum);
          }
          lanes[i] = sum;
        }
        O::storef(z + t * p.m * kEdge + m * width + c, O::sum_lanes(lanes));
      }
    }
  }
}

template <class O>
static void sketch_rows_of(const BlockScoresParams& p, const ScorePlan& s, const float* signs,
                           const int64_t* begin, int64_t m0, int64_t m1, float* row, float* z) {
  switch (p.block) {
  case 16:
    return sketch_rows<O, 16>(p, s, signs, begin, m0, m1, row, z);
  case 32:
    return sketch_rows<O, 32>(p, s, signs, begin, m0, m1, row, z);
  case 64:
    return sketch_rows<O, 64>(p, s, signs, begin, m0, m1, row, z);
  default:
    return sketch_rows<O, 128>(p, s, signs, begin, m0, m1, row, z);
  }
}

// --- panels --------------------------------------------------------------------------------------

// Adds a finished tile's squares (and its products with w) to the sums of its blocks.
template <class O>
static void reduce_tile(const BlockScoresParams& p, const ScorePlan& s, int64_t i, int64_t j,
                        const float* tile, double* squares, double* moves) {
  using F = typename O::F;
  constexpr int kVectors = kEdge / O::kLanes;
  const int64_t width = s.tile_width(p, j), live = s.live(p, j), step = min64(p.block, kEdge);
  for (int64_t r0 = 0; r0 < kEdge && i * kEdge + r0 < p.n; r0 += step) {
    const int64_t row = i * kEdge + r0, count = min64(step, p.n - row);
    F square[kVectors], moved[kVectors];
    for (int c = 0; c < kVectors; ++c) square[c] = moved[c] = O::set1f(0.0f);
    for (int64_t r = 0; r < count; ++r) {
      const float* at = tile + (r0 + r) * width;
      for (int c = 0; c * O::kLanes < width; ++c) {
        const F v = O::loadf(at + c * O::kLanes);
        square[c] = O::fmaf(v, v, square[c]);
      }
      if (!p.movement) continue;
      float wide[kEdge] = {};
      with_type(p.wtype, [&](auto tag, int bytes) {
        const int64_t from = (row + r) * p.w_stride + j * kEdge;
        widen<O>(tag, bytes, static_cast<const char*>(p.w) + from * bytes, live, wide);
      });
      for (int c = 0; c * O::kLanes < width; ++c) {
        moved[c] = O::fmaf(O::loadf(at + c * O::kLanes), O::loadf(wide + c * O::kLanes), moved[c]);
      }
    }
    float lanes[2][kEdge];
    for (int c = 0; c < kVectors; ++c) {
      O::storef(lanes[0] + c * O::kLanes, square[c]);
      O::storef(lanes[1] + c * O::kLanes, moved[c]);
    }
    int64_t to = row / p.block * s.cols + s.first_block(j), left = s.width;
    if (!s.tile_blocks) left = s.width - j * kEdge % s.width;
    for (int64_t c = 0; c < live; ++c) {
      squares[to] += lanes[0][c];
      if (p.movement) moves[to] += lanes[1][c];
      if (--left == 0) ++to, left = s.width;
    }
  }
}

template <class O>
static void score_panel(const BlockScoresParams& p, const ScorePlan& s, int64_t task,
                        const float* z, float* memory, double* squares, double* moves) {
  const int64_t ri = task / s.col_parts, ci = task % s.col_parts;
  const int64_t r0 = part_begin(s.row_tiles, s.row_unit, s.row_parts, ri);
  const int64_t r1 = part_begin(s.row_tiles, s.row_unit, s.row_parts, ri + 1);
  const int64_t c0 = part_begin(s.col_tiles, s.col_unit, s.col_parts, ci);
  const int64_t c1 = part_begin(s.col_tiles, s.col_unit, s.col_parts, ci + 1);
  constexpr int64_t kTile = kEdge * kEdge, kPacked = kChunk * kEdge;
  float* g = memory + s.high * s.wide * kTile;
  float* x = g + s.high * kPacked;
  memset(memory, 0, static_cast<size_t>((r1 - r0) * (c1 - c0) * kTile) * 4);
  for (int64_t m = 0; m < p.m; m += kChunk) {
    const int64_t count = min64(kChunk, p.m - m);
    pack_tiles<O>(p.g, p.gtype, p.g_stride, p.n, r0, r1, false, m, count, g);
    if (!z) pack_tiles<O>(p.x, p.xtype, p.x_stride, p.k, c0, c1, true, m, count, x);
    for (int64_t i = r0; i < r1; ++i) {
      const float* gi = g + (i - r0) * kPacked;
      for (int64_t j = c0; j < c1; ++j) {
        const int64_t width = s.tile_width(p, j);
        const float* xj = z ? z + j * p.m * kEdge + m * width : x + (j - c0) * kPacked;
        float* sums = memory + ((i - r0) * (c1 - c0) + j - c0) * kTile;
        if (width == 16) {
          grad_block<O, kEdge, 16>(gi, xj, count, sums);
        } else {
          grad_block<O, kEdge, kEdge>(gi, xj, count, sums);
        }
      }
    }
  }
  for (int64_t i = r0; i < r1; ++i) {
    for (int64_t j = c0; j < c1; ++j) {
      const float* sums = memory + ((i - r0) * (c1 - c0) + j - c0) * kTile;
      reduce_tile<O>(p, s, i, j, sums, squares, moves);
    }
  }
}

static void add_sums(const ScorePlan& s, const double* sums, double scale, float* out,
                     const int64_t* stride) {
  for (int64_t i = 0; i < s.rows; ++i) {
    for (int64_t j = 0; j < s.cols; ++j) {
      out[i * stride[0] + j * stride[1]] += static_cast<float>(sums[i * s.cols + j] * scale);
    }
  }
}

template <class O>
static Status block_scores(const BlockScoresParams& p) {
  const ScorePlan s = make_plan(p);
  const int64_t blocks = s.rows * s.cols, columns = s.col_tiles * kEdge;
  const Parallel& parallel = p.m * p.n * s.cols * s.width < (1 << 17) ? kSerial : *p.parallel;
  const int64_t z_floats = p.sketch ? columns * p.m : 0;
  const int64_t sign_floats = p.sketch ? columns * p.block : 0;
  const int64_t begins = p.sketch ? columns : 0;
  double* sums = static_cast<double*>(
      aligned_malloc(2 * blocks * 8 + begins * 8 + (z_floats + sign_floats) * 4));
  if (!sums) return kOutOfMemory;
  memset(sums, 0, static_cast<size_t>(2 * blocks) * 8);
  int failed = 0;
  float* z = nullptr;
  if (p.sketch) {
    int64_t* begin = reinterpret_cast<int64_t*>(sums + 2 * blocks);
    z = reinterpret_cast<float*>(begin + begins);
    float* signs = z + z_floats;
    make_signs(p, s, signs, begin);
    auto sketch = [&](int64_t from, int64_t to) {
      float* row = static_cast<float*>(aligned_malloc(s.cols * p.block * 4));
      if (!row) {
        __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        return;
      }
      sketch_rows_of<O>(p, s, signs, begin, from, to, row, z);
      free(row);
    };
    parallel_for(parallel, p.m, sketch);
  }
  auto panels = [&](int64_t from, int64_t to) {
    const int64_t packed = (s.high + (z ? 0 : s.wide)) * kChunk * kEdge;
    float* memory =
        static_cast<float*>(aligned_malloc((s.high * s.wide * kEdge * kEdge + packed) * 4));
    if (!memory) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t t = from; t < to; ++t) score_panel<O>(p, s, t, z, memory, sums, sums + blocks);
    free(memory);
  };
  if (!failed) parallel_for(parallel, s.row_parts * s.col_parts, panels);
  if (!failed) {
    add_sums(s, sums, p.sketch ? 1.0 / static_cast<double>(p.sketch) : 1.0, p.scores,
             p.scores_stride);
    if (p.movement) add_sums(s, sums + blocks, 1.0, p.movement, p.movement_stride);
  }
  free(sums);
  return failed ? kOutOfMemory : kOk;
}

}  // namespace
}  // namespace nibblock
