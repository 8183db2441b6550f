// block_gain for AVX2 and AVX-512.
//
// A task is a panel of at most kHigh x kWide tiles of E x E of the weight, E = 32 (16 for blocks of
// 16); panels hold whole blocks. It goes over the tokens twice. First the register tiles of
// block_weight_grad make both halves' gradients, which become signs where they lie. Then, tile by
// tile and block by block, tokens meet the signs of the other half: P = D x_t in register tiles,
// lanes along the rows of the weight, and z_t = <g_t, P>, summed across lanes for as many tokens at
// a time as a vector has lanes. z of a chunk of tokens is all that is kept of them.
//
// Gradient tiles are held as [k][n], so that a step of P loads signs as vectors and broadcasts x.
// That is m (N K) FMAs twice, the work of a dense weight gradient and a dense forward. Memory
// a thread: 256 KiB of signs and 192 KiB of packed rows, whatever N, K and m; 16 bytes a block.
//
// Determinism: every gradient is one chain of FMAs over its half, z has a fixed order, and both
// sums are made chunk by chunk in float64; shapes alone decide.
#pragma once

#include "../block_sparse_linear/cpu_weight_grad.h"
#include "block_gain.h"

namespace nibblock {
namespace {

constexpr int64_t kGainHigh = 256, kGainWide = 128;  // rows and columns of the largest panel
constexpr int64_t kGainTokens = 128;                 // of a chunk; 32 columns of them fit L1

// Panels of whole blocks, in tiles of E.
template <int B>
struct GainPlan {
  static constexpr int64_t E = B < 32 ? B : 32;
  static constexpr int64_t kUnit = B / E;  // tiles of a block, one way
  int64_t rows, cols;                      // blocks
  int64_t row_parts, col_parts;
  int64_t high, wide;  // blocks of the largest panel

  explicit GainPlan(const BlockGainParams& p) {
    rows = ceil_div(p.n, B);
    cols = ceil_div(p.k, B);
    row_parts = ceil_div(rows, kGainHigh / B);
    col_parts = ceil_div(cols, kGainWide / B);
    high = ceil_div(rows, row_parts);
    wide = ceil_div(cols, col_parts);
  }
  static int64_t begin(int64_t blocks, int64_t parts, int64_t i) { return blocks * i / parts; }
};

// z[t] += g_t^T D x_t over one tile: d as [k][n], x and g as [token][E]; whole vectors of tokens.
template <class O, int E>
static __attribute__((noinline)) void walk_tile(const float* d, const float* x, const float* g,
                                                int64_t tokens, float* z) {
  using F = typename O::F;
  constexpr int C = E / O::kLanes, R = O::kLanes / C;
  for (int64_t t = 0; t < tokens; t += O::kLanes) {
    F lanes[O::kLanes];
    for (int part = 0; part < C; ++part) {
      const float* xt = x + (t + part * R) * E;
      const float* gt = g + (t + part * R) * E;
      F sum[R][C];
      NB_UNROLL
      for (int r = 0; r < R; ++r) {
        NB_UNROLL
        for (int c = 0; c < C; ++c) sum[r][c] = O::set1f(0.0f);
      }
      for (int k = 0; k < E; ++k) {
        F dv[C];
        NB_UNROLL
        for (int c = 0; c < C; ++c) dv[c] = O::loadf(d + k * E + c * O::kLanes);
        NB_UNROLL
        for (int r = 0; r < R; ++r) {
          const F xv = O::set1f(xt[r * E + k]);
          NB_UNROLL
          for (int c = 0; c < C; ++c) sum[r][c] = O::fmaf(xv, dv[c], sum[r][c]);
        }
      }
      NB_UNROLL
      for (int r = 0; r < R; ++r) {
        F dot = O::mulf(sum[r][0], O::loadf(gt + r * E));
        NB_UNROLL
        for (int c = 1; c < C; ++c) {
          dot = O::fmaf(sum[r][c], O::loadf(gt + r * E + c * O::kLanes), dot);
        }
        lanes[part * R + r] = dot;
      }
    }
    O::storef(z + t, O::addf(O::loadf(z + t), O::sum_lanes(lanes)));
  }
}

// NaN stays NaN.
static inline void to_signs(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float v = values[i];
    values[i] = v > 0.0f ? 1.0f : v < 0.0f ? -1.0f : v;
  }
}

// One panel and what it works in.
template <class O, int B>
struct GainPanel {
  using Plan = GainPlan<B>;
  static constexpr int64_t E = Plan::E, kTile = E * E, kPacked = kGainTokens * E;

  const BlockGainParams& p;
  int64_t r0, r1, c0, c1;  // tiles
  float *signs, *g, *x, *z;

  static int64_t floats(const Plan& s) {
    const int64_t high = s.high * Plan::kUnit, wide = s.wide * Plan::kUnit;
    return 2 * high * wide * kTile + (high + wide) * kPacked + kGainTokens;
  }
  GainPanel(const BlockGainParams& params, const Plan& s, int64_t task, float* memory) : p(params) {
    const int64_t ri = task / s.col_parts, ci = task % s.col_parts;
    r0 = Plan::begin(s.rows, s.row_parts, ri) * Plan::kUnit;
    r1 = Plan::begin(s.rows, s.row_parts, ri + 1) * Plan::kUnit;
    c0 = Plan::begin(s.cols, s.col_parts, ci) * Plan::kUnit;
    c1 = Plan::begin(s.cols, s.col_parts, ci + 1) * Plan::kUnit;
    signs = memory;
    g = signs + 2 * tiles() * kTile;
    x = g + (r1 - r0) * kPacked;
    z = x + (c1 - c0) * kPacked;
  }
  int64_t tiles() const { return (r1 - r0) * (c1 - c0); }
  float* tile(int half, int64_t i, int64_t j) const {
    return signs + (half * tiles() + (i - r0) * (c1 - c0) + j - c0) * kTile;
  }
  const float* rows_of(int64_t i) const { return g + (i - r0) * kPacked; }
  const float* columns_of(int64_t j) const { return x + (j - c0) * kPacked; }

  // Tokens [m, m + count) of the panel's columns; zeros behind the last column, and up to a whole
  // vector of tokens.
  void pack(int64_t m, int64_t count) const {
    for (int64_t i = r0; i < r1; ++i) {
      pack_tile_of(p.g, p.gtype, p.g_stride, p.n, i, m, count, g + (i - r0) * kPacked);
    }
    for (int64_t j = c0; j < c1; ++j) {
      pack_tile_of(p.x, p.xtype, p.x_stride, p.k, j, m, count, x + (j - c0) * kPacked);
    }
  }
  static void pack_tile_of(const void* from, Dtype type, int64_t stride, int64_t size, int64_t tile,
                           int64_t m, int64_t count, float* to) {
    const int64_t live = tile * E < size ? count : 0;  // a ragged block may end before its tiles
    if (live) pack_columns<O, E>(from, type, stride, size, tile, m, count, to);
    const int64_t whole = ceil_div(count, O::kLanes) * O::kLanes;
    memset(to + live * E, 0, static_cast<size_t>((whole - live) * E) * 4);
  }
  // f(half, rows) for every chunk of tokens, packed.
  template <class Fn>
  void each_chunk(Fn&& f) const {
    const int64_t middle = (p.m + 1) / 2;
    for (int half = 0; half < 2; ++half) {
      const int64_t end = half ? p.m : middle;
      for (int64_t m = half ? middle : 0; m < end; m += kGainTokens) {
        const int64_t count = min64(kGainTokens, end - m);
        pack(m, count);
        f(half, count);
      }
    }
  }
  void make_signs() const {
    memset(signs, 0, static_cast<size_t>(2 * tiles() * kTile) * 4);
    each_chunk([&](int half, int64_t count) {
      for (int64_t i = r0; i < r1; ++i) {
        for (int64_t j = c0; j < c1; ++j) {
          grad_block<O, E, E>(columns_of(j), rows_of(i), count, tile(half, i, j));
        }
      }
    });
    to_signs(signs, 2 * tiles() * kTile);
  }
  // Adds to `sums`, [rows][cols] of both statistics in turn.
  void add(const Plan& s, double* sums) const {
    constexpr int64_t U = Plan::kUnit;
    each_chunk([&](int half, int64_t count) {
      const int64_t tokens = ceil_div(count, O::kLanes) * O::kLanes;
      for (int64_t i = r0; i < r1; i += U) {
        for (int64_t j = c0; j < c1; j += U) {
          memset(z, 0, static_cast<size_t>(tokens) * 4);
          for (int64_t t = 0; t < U * U; ++t) {
            const int64_t it = i + t / U, jt = j + t % U;
            walk_tile<O, E>(tile(1 - half, it, jt), columns_of(jt), rows_of(it), tokens, z);
          }
          reduce(tokens, sums + (i / U * s.cols + j / U) * 2);
        }
      }
    });
  }
  void reduce(int64_t tokens, double* sums) const {
    using F = typename O::F;
    F total = O::set1f(0.0f), squares = total;
    for (int64_t t = 0; t < tokens; t += O::kLanes) {
      const F v = O::loadf(z + t);
      total = O::addf(total, v);
      squares = O::fmaf(v, v, squares);
    }
    float lanes[2][O::kLanes];
    O::storef(lanes[0], total);
    O::storef(lanes[1], squares);
    for (int i = 0; i < O::kLanes; ++i) {
      sums[0] += lanes[0][i];
      sums[1] += lanes[1][i];
    }
  }
};

template <class O, int B>
static Status block_gain_of(const BlockGainParams& p) {
  using Panel = GainPanel<O, B>;
  const GainPlan<B> s(p);
  const Parallel& parallel = p.m * p.n * p.k < (1 << 16) ? kSerial : *p.parallel;
  double* sums = static_cast<double*>(aligned_malloc(2 * s.rows * s.cols * 8));
  if (!sums) return kOutOfMemory;
  memset(sums, 0, static_cast<size_t>(2 * s.rows * s.cols) * 8);
  int failed = 0;
  auto panels = [&](int64_t from, int64_t to) {
    float* memory = static_cast<float*>(aligned_malloc(Panel::floats(s) * 4));
    if (!memory) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t t = from; t < to; ++t) {
      const Panel panel(p, s, t, memory);
      panel.make_signs();
      panel.add(s, sums);
    }
    free(memory);
  };
  parallel_for(parallel, s.row_parts * s.col_parts, panels);
  if (!failed) add_gain_sums(p, sums);
  free(sums);
  return failed ? kOutOfMemory : kOk;
}

template <class O>
static Status block_gain(const BlockGainParams& p) {
  switch (p.block) {
  case 16:
    return block_gain_of<O, 16>(p);
  case 32:
    return block_gain_of<O, 32>(p);
  case 64:
    return block_gain_of<O, 64>(p);
  default:
    return block_gain_of<O, 128>(p);
  }
}

}  // namespace
}  // namespace nibblock
