// block_weight_grad, the product of two dense matrices over their rows where listed blocks ask for
// it, for AVX2 and AVX-512.
//
//     out_z[n, k] = sum_m g[m, I_z B + n] * x[m, J_z B + k]
//
// A column block of g or x is widened to float32 as [m][B]; then a listed block runs register tiles
// of R n x C vectors of k down the tokens, in pieces whose two operands fit L1. A step loads C
// vectors of x and broadcasts R neighbours of g. Columns that many blocks share are packed once for
// all of them, kTokens tokens at a time. Otherwise every block packs its own: a copy made by
// another core costs about what packing does, and the whole is one parallel loop instead of two a
// chunk (576 x 576, 8 % of 32 x 32, two threads: 2x).
//
// Determinism: an output is one chain of FMAs over m. Only where the list is short (few tasks) and
// the tokens many is the sum cut, into parts of kPartRows added in their order; the shapes alone
// decide.
#pragma once

#include "cpu_pieces.h"

namespace nibblock {
namespace {

constexpr int64_t kTokens = 256;
constexpr int64_t kPieceFloats = 4096;   // of one operand: 16 KiB
constexpr int64_t kShortList = 1 << 16;  // gradient elements up to which tokens are split
constexpr int64_t kPartRows = 512;
constexpr int64_t kMostParts = 16;
constexpr int64_t kWorthThreads = 1 << 17;  // multiply-adds from which threads pay
constexpr int64_t kAloneBelow = 8;          // packing for all pays from B / this blocks a column on

// out[R][C vectors] += g^T x: rows of g are GW apart, rows of x and out XW.
template <class O, int GW, int XW, int R>
static __attribute__((noinline)) void grad_tile(const float* g, const float* x, int64_t rows,
                                                float* out) {
  using F = typename O::F;
  constexpr int C = Shape<O, XW>::kCols;
  F sum[R][C];
  NB_UNROLL
  for (int r = 0; r < R; ++r) {
    NB_UNROLL
    for (int c = 0; c < C; ++c) sum[r][c] = O::loadf(out + r * XW + c * O::kLanes);
  }
  NB_UNROLL_DEPTH
  for (int64_t m = 0; m < rows; ++m, g += GW, x += XW) {
    F xv[C];
    NB_UNROLL
    for (int c = 0; c < C; ++c) xv[c] = O::loadf(x + c * O::kLanes);
    NB_UNROLL
    for (int r = 0; r < R; ++r) {
      const F gv = O::set1f(g[r]);
      NB_UNROLL
      for (int c = 0; c < C; ++c) sum[r][c] = O::fmaf(gv, xv[c], sum[r][c]);
    }
  }
  NB_UNROLL
  for (int r = 0; r < R; ++r) {
    NB_UNROLL
    for (int c = 0; c < C; ++c) O::storef(out + r * XW + c * O::kLanes, sum[r][c]);
  }
}

// out[GW][XW] += g[rows][GW]^T x[rows][XW]: GW rows in tiles of the full height and one of what is
// left (which the template knows).
template <class O, int GW, int XW>
static void grad_block(const float* g, const float* x, int64_t rows, float* out) {
  using S = Shape<O, XW>;
  constexpr int64_t kPiece = kPieceFloats / (GW > XW ? GW : XW);
  constexpr int kTiles = (GW + S::kRows - 1) / S::kRows;
  constexpr int kHigh = (GW + kTiles - 1) / kTiles, kHighs = GW - kTiles * (kHigh - 1);
  for (int64_t m = 0; m < rows; m += kPiece) {
    const int64_t count = min64(kPiece, rows - m);
    for (int k = 0; k < XW; k += S::kWidth) {
      const float* gm = g + m * GW;
      const float* xm = x + m * XW + k;
      float* o = out + k;
      for (int i = 0; i < kTiles; ++i) {
        const int height = i < kHighs ? kHigh : kHigh - 1;
        if (i < kHighs) {
          grad_tile<O, GW, XW, kHigh>(gm, xm, count, o);
        } else {
          grad_tile<O, GW, XW, kHigh - 1 ? kHigh - 1 : 1>(gm, xm, count, o);
        }
        gm += height;
        o += height * XW;
      }
    }
  }
}

// Columns [j * B, (j + 1) * B) of rows [m0, m0 + rows), as [rows][B]; zeros behind the last column.
template <class O, int B>
static void pack_columns(const void* x, Dtype type, int64_t stride, int64_t size, int64_t j,
                         int64_t m0, int64_t rows, float* out) {
  const int64_t count = min64(B, size - j * B);
  with_type(type, [&](auto tag, int bytes) {
    for (int64_t r = 0; r < rows; ++r, out += B) {
      if (count < B) memset(out, 0, B * sizeof(float));
      widen<O>(tag, bytes, static_cast<const char*>(x) + ((m0 + r) * stride + j * B) * bytes, count,
               out);
    }
  });
}

// One block's sums to its place: the sum of `parts` partial sums, zeros outside the matrix,
// rounded.
template <class O, int B>
static void finish_block(const BlockWeightGradParams& p, int64_t z, int64_t row, const float* sums,
                         int64_t parts, int64_t part_stride) {
  const int64_t rows = min64(B, p.s.n - row * B), cols = min64(B, p.s.k - p.s.col[z] * B);
  for (int64_t i = 0; i < B; ++i) {
    for (int64_t k = 0; k < B; k += O::kLanes) {
      typename O::F v = O::loadf(sums + i * B + k);
      for (int64_t q = 1; q < parts; ++q)
        v = O::addf(v, O::loadf(sums + q * part_stride + i * B + k));
      if (i >= rows || k + O::kLanes > cols) {
        float lanes[O::kLanes];
        O::storef(lanes, v);
        for (int64_t l = i < rows ? max64(0, cols - k) : 0; l < O::kLanes; ++l) lanes[l] = 0.0f;
        v = O::loadf(lanes);
      }
      const int64_t at = (z * B + i) * B + k;
      if (p.out_type == Dtype::kF32) {
        O::store_as(FloatBits::F32{}, static_cast<float*>(p.out) + at, v);
      } else {
        O::store_as(FloatBits::BF16{}, static_cast<uint16_t*>(p.out) + at, v);
      }
    }
  }
}

// What both ways share: tasks are (part of the rows, block), in this order.
struct GradSums {
  int64_t parts, part_rows;  // rows are summed in parts, which are added in their order
  float* sums;               // [parts][Z][B][B]

  // The rows of a part, at most `most` of them from its row `first` on.
  int64_t rows(int64_t m, int64_t part, int64_t first, int64_t most, int64_t* m0) const {
    *m0 = part * part_rows + first;
    return max64(0, min64(min64(most, part_rows - first), m - *m0));
  }
};

// Block row of entry z, found from that of an earlier one.
static inline int64_t row_of(const BlockLayout& s, int64_t z, int64_t row) {
  if (s.row_ptr[row] > z) row = 0;
  while (s.row_ptr[row + 1] <= z) ++row;
  return row;
}

// Where most columns hold a block or two, copies for all would be read about as often as written:
// every block packs its own pieces, on the stack.
template <class O, int B>
static void multiply_alone(const BlockWeightGradParams& p, const GradSums& a,
                           const Parallel& parallel) {
  constexpr int64_t kPiece = kPieceFloats / B;
  const int64_t Z = p.s.count;
  auto work = [&](int64_t begin, int64_t end) {
    alignas(64) float g[kPieceFloats], x[kPieceFloats];
    int64_t row = 0;
    for (int64_t t = begin, last; t < end; t = last) {  // the blocks of a row share g's pieces
      const int64_t part = t / Z, z = t % Z;
      row = row_of(p.s, z, row);
      last = min64(end, t - z + p.s.row_ptr[row + 1]);
      const int32_t* col = p.s.col + z;
      memset(a.sums + t * B * B, 0, static_cast<size_t>((last - t) * B * B) * 4);
      int64_t m;
      for (int64_t first = 0; first < a.part_rows; first += kPiece) {
        const int64_t count = a.rows(p.m, part, first, kPiece, &m);
        pack_columns<O, B>(p.g, p.gtype, p.g_stride, p.s.n, row, m, count, g);
        for (int64_t u = 0; u < last - t; ++u) {
          pack_columns<O, B>(p.x, p.gtype, p.x_stride, p.s.k, col[u], m, count, x);
          grad_block<O, B, B>(g, x, count, a.sums + (t + u) * B * B);
        }
      }
    }
  };
  parallel_for(parallel, a.parts * Z, work);
}

// Column blocks are packed once for all blocks: of kTokens rows of each part at a time.
template <class O, int B>
static void multiply_shared(const BlockWeightGradParams& p, const GradSums& a, int64_t tokens,
                            float* packed) {
  const int64_t rows = ceil_div(p.s.n, B), cols = ceil_div(p.s.k, B), Z = p.s.count;
  memset(a.sums, 0, static_cast<size_t>(a.parts * Z * B * B) * 4);
  for (int64_t first = 0; first < a.part_rows; first += tokens) {
    auto pack = [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t j = t % (rows + cols);
        int64_t m;
        const int64_t count = a.rows(p.m, t / (rows + cols), first, tokens, &m);
        float* out = packed + t * tokens * B;
        if (j < rows) {
          if (p.s.row_ptr[j] == p.s.row_ptr[j + 1]) continue;
          pack_columns<O, B>(p.g, p.gtype, p.g_stride, p.s.n, j, m, count, out);
        } else {
          const int64_t c = j - rows;
          if (p.s.col_ptr[c] == p.s.col_ptr[c + 1]) continue;
          pack_columns<O, B>(p.x, p.gtype, p.x_stride, p.s.k, c, m, count, out);
        }
      }
    };
    parallel_for(*p.parallel, a.parts * (rows + cols), pack);
    auto multiply = [&](int64_t begin, int64_t end) {
      int64_t row = 0;
      for (int64_t t = begin; t < end; ++t) {
        const int64_t part = t / Z, z = t % Z;
        row = row_of(p.s, z, row);
        int64_t m;
        const int64_t count = a.rows(p.m, part, first, tokens, &m);
        const float* at = packed + part * (rows + cols) * tokens * B;
        grad_block<O, B, B>(at + row * tokens * B, at + (rows + p.s.col[z]) * tokens * B, count,
                            a.sums + t * B * B);
      }
    };
    parallel_for(*p.parallel, a.parts * Z, multiply);
  }
}

template <class O, int B>
static Status weight_grad_of(const BlockWeightGradParams& p) {
  const int64_t rows = ceil_div(p.s.n, B), cols = ceil_div(p.s.k, B), Z = p.s.count;
  const int64_t size = Z * B * B;
  GradSums a;
  a.parts = size <= kShortList ? max64(1, min64(kMostParts, ceil_div(p.m, kPartRows))) : 1;
  a.part_rows = ceil_div(p.m, a.parts);
  const bool in_place = a.parts == 1 && p.out_type == Dtype::kF32;
  int64_t used = 0;
  for (int64_t c = 0; c < cols; ++c) used += p.s.col_ptr[c] != p.s.col_ptr[c + 1];
  const bool few = p.m * size < kWorthThreads, alone = few || Z * kAloneBelow < used * B;
  const Parallel& parallel = few ? kSerial : *p.parallel;
  const int64_t tokens = min64(kTokens, max64(1, a.part_rows));
  const int64_t packed = alone ? 0 : a.parts * (rows + cols) * tokens * B;
  float* memory =
      static_cast<float*>(aligned_malloc((packed + (in_place ? 0 : a.parts * size)) * 4));
  if (!memory) return kOutOfMemory;
  a.sums = in_place ? static_cast<float*>(p.out) : memory + packed;
  if (alone) {
    multiply_alone<O, B>(p, a, parallel);
  } else {
    multiply_shared<O, B>(p, a, tokens, memory);
  }
  auto finish = [&](int64_t begin, int64_t end) {
    int64_t row = 0;
    for (int64_t z = begin; z < end; ++z) {
      row = row_of(p.s, z, row);
      const bool ragged = (row + 1) * B > p.s.n || (p.s.col[z] + 1) * B > p.s.k;
      if (!in_place || ragged) finish_block<O, B>(p, z, row, a.sums + z * B * B, a.parts, size);
    }
  };
  const bool whole = p.s.n % B == 0 && p.s.k % B == 0;
  if (!in_place || !whole) parallel_for(parallel, Z, finish);
  free(memory);
  return kOk;
}

template <class O>
static Status weight_grad(const BlockWeightGradParams& p) {
  switch (p.s.block) {
  case 16:
    return weight_grad_of<O, 16>(p);
  case 32:
    return weight_grad_of<O, 32>(p);
  case 64:
    return weight_grad_of<O, 64>(p);
  default:
    return weight_grad_of<O, 128>(p);
  }
}

}  // namespace
}  // namespace nibblock
